"""The positives of queries: checked label ids and scores, with each label once per row."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from hf_xmc.data.columns import QUERY_COLUMNS, Positives, as_dataset, ragged, row_of, shown, texts_of

logger = logging.getLogger(__name__)


def checked_queries(queries: object, num_labels: int, name: str) -> Dataset:
    """Return the columns of queries for training, with every value checked and repeated positives merged.

    Args:
        queries: Data set with columns ``text``, ``label_ids`` and optionally ``label_scores``.
        num_labels: Number of labels, which all label ids must be below.
        name: Name of the data set in messages.

    Raises:
        ValueError: if a column is missing, or a column or value is invalid. The message names row and column.
    """
    dataset = check_queries(queries, num_labels, name)
    dataset = dataset.select_columns([column for column in QUERY_COLUMNS if column in dataset.column_names])
    given = ragged(dataset)
    merged = _merged(given, num_labels, f"{name}, row ")
    return dataset if merged is given else with_positives(dataset, merged)


def checked_splits(queries: object, num_labels: int, name: str) -> Dataset | DatasetDict:
    """Return :func:`checked_queries` of one data set, or of each one in a mapping."""
    if not isinstance(queries, dict):
        return checked_queries(queries, num_labels, name)
    return DatasetDict({key: checked_queries(part, num_labels, f"{name}[{key!r}]") for key, part in queries.items()})


def check_queries(queries: object, num_labels: int, name: str) -> Dataset:
    """Return a data set of queries after checking its columns; arguments and errors as in :func:`checked_queries`.

    Repeated labels of a row stay, because finding them takes a sort, which every reader of positives does.
    """
    dataset = as_dataset(queries, name)
    if missing := {"text", "label_ids"} - set(dataset.column_names):
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}, only {', '.join(dataset.column_names)}. "
            "`load_xmc(...).train` has the right columns."
        )
    texts_of(dataset, f"{name}, row ")
    check_positives(*ragged(dataset, f"{name}, row "), num_labels, (f"{name}, row " + "{}").format)
    return dataset


def with_positives(dataset: Dataset, positives: Positives) -> Dataset:
    """Return a data set with other positives in the columns ``label_ids`` and, if they are graded, ``label_scores``."""
    offsets = pa.array(positives.offsets, pa.int32())
    others = [column for column in dataset.column_names if column not in QUERY_COLUMNS[1:]]
    dataset = dataset.select_columns(others)
    dataset = dataset.add_column("label_ids", pa.ListArray.from_arrays(offsets, pa.array(positives.label_ids)))
    if positives.scores is None:
        return dataset
    scores = pa.array(positives.scores, pa.float32())
    return dataset.add_column("label_scores", pa.ListArray.from_arrays(offsets, scores))


def positives_of(queries: Dataset, num_labels: int, where: str = "row ") -> Positives:
    """Return the positives of queries, with every value checked.

    A repeated label of a row counts once, with its largest score, and a label with score 0 is not a positive, as in
    :func:`hf_xmc.load_xmc`. A log line counts both.

    Args:
        queries: Data set with columns ``label_ids`` and optionally ``label_scores``.
        num_labels: Number of labels, which all label ids must be below.
        where: Beginning of messages, which a row number follows.

    Raises:
        ValueError: if a column or value is invalid. The message names row and column.
    """
    return _merged(ragged(queries, where), num_labels, where)


def _merged(positives: Positives, num_labels: int, where: str) -> Positives:
    offsets, label_ids, scores = positives
    check_positives(*positives, num_labels, (where + "{}").format)
    keep, zeros, repeated = kept_positives(*positives, num_labels)
    if not zeros and not repeated:
        return positives
    logger.warning(
        "%s: %d repeated labels count once, and %d labels with score 0 are not positives.",
        where.removesuffix("row ").rstrip(", ") or "queries",
        repeated,
        zeros,
    )
    counts = np.add.reduceat(np.append(keep, False), offsets[:-1], dtype=np.int64) * (np.diff(offsets) > 0)
    return Positives(np.append(0, counts.cumsum()), label_ids[keep], None if scores is None else scores[keep])


def check_positives(
    offsets: np.ndarray,
    label_ids: np.ndarray,
    scores: np.ndarray | None,
    num_labels: int,
    where: Callable[[int], str],
) -> None:
    """Raise if a label id or a score is wrong.

    Args:
        offsets, label_ids, scores: As in :class:`hf_xmc.data.columns.Positives`.
        num_labels: Number of labels, which all label ids must be below.
        where: Function that returns the name of a row for messages.

    Raises:
        ValueError: if a label id is out of range, a score is negative or not finite, or rows are flags instead of ids.
    """
    for at in np.flatnonzero((label_ids < 0) | (label_ids >= num_labels))[:1]:
        raise ValueError(
            f"{where(row_of(offsets, at))}: label id {label_ids[at]}, but there are only {num_labels} labels "
            f"(label_ids go from 0 to {num_labels - 1}). Are the queries and the labels from the same data set?"
        )
    check_not_multi_hot(offsets, label_ids, num_labels, where)
    if scores is not None:
        check_scores(offsets, label_ids, scores, where)


def check_scores(offsets: np.ndarray, label_ids: np.ndarray, scores: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise ``ValueError`` if a score is negative or not finite; arguments as in :func:`check_positives`."""
    for at in np.flatnonzero(~(np.isfinite(scores) & (scores >= 0)))[:1]:
        raise ValueError(
            f"{where(row_of(offsets, at))}: label_scores must be finite and at least 0, got {scores[at]} for label "
            f"{label_ids[at]}."
        )


def kept_positives(
    offsets: np.ndarray, label_ids: np.ndarray, scores: np.ndarray | None, num_labels: int
) -> tuple[np.ndarray, int, int]:
    """Return a mask of the positives that count, and the numbers with score 0 and of repetitions in a row.

    Among repetitions of a label in a row, the one with the largest score counts.
    """
    keep = np.ones(len(label_ids), dtype=bool) if scores is None else scores > 0
    zeros = len(keep) - int(keep.sum())
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    cells = rows * num_labels + label_ids.astype(np.int64, copy=False)
    order = np.argsort(cells, kind="stable")  # fast, since rows ascend
    if (np.diff(cells[order]) > 0).all():
        return keep, zeros, 0
    order = order if scores is None else np.lexsort((-scores, cells))
    again = np.zeros(len(cells), dtype=bool)
    again[order[1:]] = cells[order[1:]] == cells[order[:-1]]
    return keep & ~again, zeros, int((keep & again).sum())


def check_not_multi_hot(
    offsets: np.ndarray, label_ids: np.ndarray, num_labels: int, where: Callable[[int], str]
) -> None:
    """Raise ``ValueError`` if rows contain flags, one per label, instead of label ids.

    Rows are flags if each is as long as the list of labels and contains only 0 and 1, and some row is not 0, 1: as
    label ids, such rows would repeat a label, or name every label in an order that is not ascending. Several rows are
    also flags if all have another common length above two, which may count label texts or other labels.
    """
    lengths = np.diff(offsets)
    size = int(lengths[0]) if len(lengths) else 0
    if (
        not (size == num_labels > 1 or (size > 2 and len(lengths) > 1))
        or (lengths != size).any()
        or label_ids.max() > 1
    ):
        return
    flags = label_ids.reshape(-1, size)
    ids = size == 2 and (flags.sum(1) == 1).all()  # with two labels, these rows may be ids
    about = "as long as the list of labels" if size == num_labels else f"every row has {size} numbers"
    for row in np.flatnonzero((flags[:, 0] != 0) | (flags[:, 1] != 1) | (size > 2))[:1]:
        raise ValueError(
            f"{where(0)}: label_ids is {shown(flags[0].tolist())}, {about}, and all rows contain only 0 and 1. "
            "They look like flags, one per label, but label ids are expected. `np.flatnonzero(row)` gives the ids: "
            f"{np.flatnonzero(flags[row]).tolist()} for row {row}."
            + (" If they are ids, write each row in ascending order: [0, 1]." if ids else "")
        )
