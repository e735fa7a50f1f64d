"""Check the parts of a data set and put them together. Corrections are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_xmc.data.labels import count_labels
from hf_xmc.data.positives import check_positives, kept_positives
from hf_xmc.data.prepared import Parts
from hf_xmc.data.readers.formats import Rows


def label_table(texts: pa.ChunkedArray, ids: Iterable[object], name: str, load_report: Counter[str]) -> Dataset:
    """Check labels, and return them as a data set.

    Raises:
        ValueError: if there are no labels. The message calls the data set ``name``.
    """
    if not len(texts):
        raise ValueError(f"{name}: there are no labels.")
    labels = Dataset(pa.table({"uid": pa.array(map(str, ids), pa.string()), "text": texts}))
    count(load_report, "labels: texts beyond the first of their label", len(texts) - count_labels(labels))
    count(load_report, "labels: repeated texts", len(texts) - pc.count_distinct(texts).as_py())
    count(load_report, "labels: empty texts", _num_empty(texts))
    return labels


def assemble(
    labels: Dataset, splits: dict[str, Rows], pairs: dict[str, np.ndarray], load_report: Counter[str]
) -> Parts:
    """Check queries, and return the parts of a data set.

    Raises:
        ValueError: if a label id or a score of a query is out of range.
    """
    datasets = {name: _checked(rows, count_labels(labels), name, load_report) for name, rows in splits.items()}
    return Parts({"labels": labels, **datasets}, pairs, dict(load_report))


def _checked(rows: Rows, num_labels: int, name: str, load_report: Counter[str]) -> Dataset:
    offsets, label_ids = rows.offsets.astype(np.int64), rows.label_ids.astype(np.int64)
    check_positives(offsets, label_ids, rows.scores, num_labels, rows.where)
    keep, zeros, repeated = kept_positives(offsets, label_ids, rows.scores, num_labels)
    count(load_report, f"{name}: relevance 0, not a positive", zeros)
    count(load_report, f"{name}: repeated label of a query", repeated)
    row_of = np.repeat(np.arange(len(rows.texts)), np.diff(offsets))
    counts = np.bincount(row_of[keep], minlength=len(rows.texts))
    count(load_report, f"{name}: queries without labels", int((counts == 0).sum()))
    count(load_report, f"{name}: empty texts", _num_empty(rows.texts))

    new_offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    columns = {
        "text": rows.texts,
        "label_ids": pa.ListArray.from_arrays(new_offsets, pa.array(label_ids[keep].astype(np.int32))),
    }
    if rows.scores is not None and not (rows.scores[keep] == 1).all():
        columns["label_scores"] = pa.ListArray.from_arrays(new_offsets, pa.array(rows.scores[keep]))
    return Dataset(pa.table(columns))


def _num_empty(texts: pa.ChunkedArray) -> int:
    empty: int = pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py() or 0
    return empty


def count(load_report: Counter[str], what: str, number: int) -> None:
    """Add a number to an entry of the report. Zero adds no entry."""
    if number:
        load_report[what] += number
