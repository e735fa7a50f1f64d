"""Cells (row, label) of predictions and of relevance: find the positives, and drop the filter pairs of a benchmark."""

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
SparseMatrix: TypeAlias = "sp.csr_array | sp.csr_matrix"


def drop_filter_pairs(
    label_ids: ArrayLike, filter_pairs: ArrayLike, scores: ArrayLike | None = None, *, num_labels: int | None = None
) -> tuple[IntArray, Any]:
    """Remove the cells ``filter_pairs`` from the predictions: later labels move up, and the end is padded.

    Benchmarks list the pairs that leak the answer: a query and the label that is the same item, or its reciprocal.

    Args:
        label_ids: ``(N, k_max)`` predicted labels, best first.
        filter_pairs: ``(M, 2)`` pairs (row, label), possibly repeated or empty.
        scores: ``(N, k_max)`` scores, which move with the labels.
        num_labels: Number of labels, to check ``filter_pairs`` against. Rows are always checked.

    Returns:
        ``label_ids`` padded with -1, and ``scores`` padded with minus infinity (``None`` if not given).

    >>> drop_filter_pairs([[5, 7, 9]], [[0, 7]], scores=[[0.75, 0.5, 0.25]])
    (array([[ 5,  9, -1]]), array([[0.75, 0.25, -inf]]))
    """
    label_ids = integers(label_ids, "label_ids")
    pairs = integers(filter_pairs, "filter_pairs") if np.size(filter_pairs) else np.empty((0, 2), dtype=np.int64)
    if pairs.shape[1] != 2:
        raise ValueError(f"`filter_pairs` must have two columns, row and label, got shape {pairs.shape}.")
    bounds = (len(label_ids), np.inf if num_labels is None else num_labels)
    for row, label in pairs[((pairs < 0) | (pairs >= bounds)).any(axis=1)][:1]:
        raise ValueError(
            f"`filter_pairs` has (row {row}, label {label}), outside of {bounds}. Is it the file of this split?"
        )
    if scores is not None and np.shape(scores) != label_ids.shape:
        raise ValueError(f"`scores` must have the shape of `label_ids`, {label_ids.shape}, got {np.shape(scores)}.")
    dropped = cells_among(label_ids, rows=pairs[:, 0], labels=pairs[:, 1])
    order = np.argsort(dropped, axis=1, kind="stable")  # remaining labels first, in their old order
    label_ids = np.take_along_axis(np.where(dropped, -1, label_ids), order, axis=1)
    return label_ids, scores if scores is None else np.take_along_axis(
        np.where(dropped, -np.inf, scores), order, axis=1
    )


def cells_among(label_ids: IntArray, rows: IntArray, labels: IntArray) -> BoolArray:
    """Return which cells (row, ``label_ids[row, place]``) are among the cells (``rows[i]``, ``labels[i]``)."""
    # One integer per cell, so that a lookup is a binary search, and no array is larger than its input.
    width = 1 + max(label_ids.max(initial=0), labels.max(initial=0))
    cells = np.sort(rows * width + labels)
    asked = np.arange(len(label_ids))[:, None] * width + label_ids
    found: BoolArray = (
        np.append(cells, -1)[np.searchsorted(cells, asked)] == asked
    )  # index -1 for a cell after the last one
    return found & (label_ids >= 0)


def binarize(relevance: SparseMatrix) -> sp.csr_array:
    """Return the positives as a new boolean matrix, with sorted indices and no duplicates."""
    if not sp.issparse(relevance) or len(relevance.shape) != 2:
        raise ValueError(f"`relevance` must be a sparse (queries, labels) matrix, got {type(relevance).__name__}.")
    positives = sp.csr_array(relevance, copy=True)
    positives.sum_duplicates()
    positives.data = positives.data > 0
    positives.eliminate_zeros()
    return positives


def integers(values: ArrayLike, name: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be a two-dimensional array of integers, got {array.dtype} of shape {array.shape}."
        )
    return array.astype(np.int64, copy=False)
