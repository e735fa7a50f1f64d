"""The parts of a model as a release holds them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.hub import release, repository, saved_new_labels
from hf_xmc.hub.backends import Loading
from hf_xmc.hub.manifest import LAYOUT
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.model.calibrated import FittedCalibration
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.new_labels import NewLabelScores
from hf_xmc.storage.snapshots import Snapshot

logger = logging.getLogger(__name__)


class SavedModel(NamedTuple):
    """A loaded encoder with the other parts of its release."""

    encoder: SentenceTransformer
    release: release.Release | None  # None for a plain model of sentence-transformers
    labels: Dataset | None = None
    embeddings: Tensor | None = None
    memory: TrainingMemory | None = None
    calibration: Calibration | None = None
    label_vectors: Tensor | None = None
    new_labels: NewLabelScores | None = None


def read_model(
    place: Path | Snapshot, parts: Iterable[str] | None, loading: Loading, *, verify: bool = True
) -> SavedModel:
    """Read the wanted parts of a model, or a plain encoder.

    Args:
        place: The :func:`hf_xmc.hub.repository.source` of the model.
        parts: Names of the wanted parts, ``None`` for all.
        loading: How the encoder is loaded.
        verify: Whether to compare the content of each file with the one that was saved, and not its size alone.

    Raises:
        ValueError: if the model is incomplete or was modified, or if a part is unknown, missing, or given without a
            part that it needs; or if the encoder does not load like this.
        ModuleNotFoundError: if the packages of the backend are missing, or do not import together.
    """
    loading.check()
    checked = repository.find(place, parts=parts, verify=verify, backend=loading.backend)
    if checked is None:
        return SavedModel(repository.plain_encoder(place, loading), None)
    saved = release.load(checked, loading)
    if LAYOUT.label_index not in saved.parts:
        return SavedModel(saved.encoder, saved)
    labels, embeddings = release.read_label_index(saved)
    memory, calibration = release.read_training_memory(saved), release.read_calibration(saved)
    vectors = release.read_label_vectors(saved)
    new = saved_new_labels.read_new_labels(saved)
    return SavedModel(saved.encoder, saved, labels, embeddings, memory, calibration, vectors, new)


def writers(
    labels: LabelTexts,
    index: LabelIndex,
    memory: TrainingMemory | None,
    fitted: FittedCalibration | None,
    label_vectors: Tensor | None = None,
    new_labels: NewLabelScores | None = None,
) -> dict[str, release.Writer]:
    """Return a writer for each part that a model has, by the file or folder of the part.

    A calibration for scores of a reranker is left out with a warning, because a release holds no function.
    """
    parts: dict[str, release.Writer] = {}
    if len(labels):
        about: dict[str, Any] = {"labels": labels.texts, "index": index, "label_vectors": label_vectors}
        parts[LAYOUT.label_index] = partial(release.write_label_index, **about)
    if memory is not None:
        parts[LAYOUT.training_memory] = partial(release.write_training_memory, memory=memory)
    if fitted is not None and fitted.reranking is not None:
        logger.warning(
            "The calibration is for scores with %s. A saved model cannot hold a function: the calibration is left out, "
            "and the loaded model needs `calibrate` again.",
            fitted.reranking,
        )
    elif fitted is not None:
        parts[LAYOUT.calibration] = partial(release.write_calibration, calibration=fitted.calibration)
    if new_labels is not None:
        parts[LAYOUT.new_labels] = partial(saved_new_labels.write_new_labels, scores=new_labels)
    return parts
