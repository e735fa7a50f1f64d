"""Save and load what a model knows about labels that it has not seen yet."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_xmc.hub.manifest import LAYOUT
from hf_xmc.hub.release import Release
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.search.lexical import WordCounts
from hf_xmc.search.new_labels import NewLabelScores


def write_new_labels(folder: Path, scores: NewLabelScores) -> dict[str, Any]:
    """Write the map from scores to probabilities, and the words of known texts. Return the metadata."""
    (folder / LAYOUT.new_labels).mkdir()
    words = scores.words
    pq.write_table(pa.table({"word": list(words.words), "count": words.counts}), folder / LAYOUT.new_label_words)
    (folder / LAYOUT.new_label_map).write_text(json.dumps(asdict(scores.calibration)), encoding="utf-8")
    return {"num_words": len(words.words), "num_texts": words.num_texts}


def read_new_labels(release: Release) -> NewLabelScores | None:
    """Return what :func:`write_new_labels` wrote, ``None`` if a release has none or it was not wanted.

    Raises:
        ValueError: if the files do not hold it.
    """
    if LAYOUT.new_labels not in release.parts:
        return None
    folder, about = release.folder, release.parts[LAYOUT.new_labels]
    try:
        table = pq.read_table(folder / LAYOUT.new_label_words)
        words = tuple(table["word"].cast(pa.string()).to_pylist())
        counts = table["count"].cast(pa.int64()).to_numpy()
        calibration = Calibration.of(json.loads((folder / LAYOUT.new_label_map).read_text(encoding="utf-8")))
        return NewLabelScores(calibration, WordCounts(words, counts, int(about["num_texts"])))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / LAYOUT.new_labels} does not hold the scores of new labels as they were saved ({error})."
        ) from None
