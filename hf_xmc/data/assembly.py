"""Check the parts of a data set that a reader has read, and put them together. Corrections are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_xmc.data.dataset import XMCData
from hf_xmc.data.formats import Rows
from hf_xmc.data.labels import count_labels
from hf_xmc.data.positives import check_positives, kept_positives


def label_table(texts: pa.ChunkedArray, ids: Iterable[object], name: str, notes: Counter[str]) -> Dataset:
    """Check the labels that a reader read, and make a data set of them.

    Raises:
        ValueError: if there is no label. The message calls the data set ``name``.
    """
    if not len(texts):
        raise ValueError(f"{name}: there is no label.")
    labels = Dataset(pa.table({"label_id": pa.array(map(str, ids), pa.string()), "text": texts}))
    count(notes, "labels: texts beyond the first of their label", len(texts) - count_labels(labels))
    count(notes, "labels: texts that occur again", len(texts) - pc.count_distinct(texts).as_py())
    count(notes, "labels: empty texts", _num_empty(texts))
    return labels


def assemble(labels: Dataset, splits: dict[str, Rows], pairs: dict[str, np.ndarray], notes: Counter[str]) -> XMCData:
    """Check the queries that a reader read, and make data sets of them.

    Raises:
        ValueError: if a query has a label or a score that cannot be.
    """
    datasets = {name: _checked(rows, count_labels(labels), name, notes) for name, rows in splits.items()}
    return XMCData(labels=labels, filter_pairs=pairs, notes=dict(notes), **datasets)


def _checked(rows: Rows, num_labels: int, name: str, notes: Counter[str]) -> Dataset:
    offsets, label_ids = rows.offsets.astype(np.int64), rows.label_ids.astype(np.int64)
    check_positives(offsets, label_ids, rows.scores, num_labels, rows.where)
    keep, zeros, repeated = kept_positives(offsets, label_ids, rows.scores, num_labels)
    count(notes, f"{name}: relevance 0, not a positive", zeros)
    count(notes, f"{name}: label named again for a query", repeated)
    row_of = np.repeat(np.arange(len(rows.texts)), np.diff(offsets))
    counts = np.bincount(row_of[keep], minlength=len(rows.texts))
    count(notes, f"{name}: queries without labels", int((counts == 0).sum()))
    count(notes, f"{name}: empty texts", _num_empty(rows.texts))

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


def count(notes: Counter[str], what: str, number: int) -> None:
    """Add to a note; one that would be zero is not made."""
    if number:
        notes[what] += number
