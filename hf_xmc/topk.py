"""The best labels of each query, as returned by indexes and read by metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike


class TopK(NamedTuple):
    """The best labels of each query, best first.

    A row with fewer than ``k`` labels is padded with the label id -1 and a score of minus infinity.
    """

    label_ids: np.ndarray  # (N, k) int64
    scores: np.ndarray  # (N, k) float32; float64 if they are probabilities

    @classmethod
    def empty(cls, num_queries: int, k: int, dtype: DTypeLike = np.float32) -> TopK:
        """Return ``num_queries`` rows of padding, with scores of type ``dtype``.

        >>> TopK.empty(1, 2)
        TopK(label_ids=array([[-1, -1]]), scores=array([[-inf, -inf]], dtype=float32))
        """
        return cls(np.full((num_queries, k), -1), np.full((num_queries, k), -np.inf, dtype))


def distinct(found: TopK, k: int) -> TopK:
    """Return the first ``k`` distinct labels of each row.

    >>> distinct(TopK(np.array([[4, 4, 2, 1]]), np.array([[0.9, 0.8, 0.7, 0.6]])), 2).label_ids
    array([[4, 2]])
    """
    order = np.argsort(found.label_ids, axis=1, kind="stable")
    ordered = np.take_along_axis(found.label_ids, order, axis=1)
    new = np.diff(ordered, axis=1, prepend=-1) > 0  # padding is not new
    first = np.zeros_like(new)
    np.put_along_axis(first, order, new, axis=1)
    place = first.cumsum(axis=1) - 1
    rows, columns = np.nonzero(first & (place < k))
    best = TopK.empty(len(first), k)
    for into, values in zip(best, found, strict=True):
        into[rows, place[rows, columns]] = values[rows, columns]
    return best


def recall_of(found: TopK, exact: TopK) -> float:
    """Return the fraction of the exact best labels for which a label of at least the same score was found.

    Labels are compared by score, up to the rounding of float32, so any of several tied labels is correct. Padding is
    ignored. The result is 1 if there is nothing to find.

    >>> exact = TopK(np.array([[2, 3]]), np.array([[0.9, 0.8]]))
    >>> recall_of(TopK(np.array([[2, 1]]), np.array([[0.9, 0.7]])), exact)
    0.5
    """
    real = exact.label_ids >= 0
    border = np.where(real, exact.scores, np.inf).min(1, initial=np.inf)
    rounding = 1e-5 * np.abs(np.where(real, exact.scores, 0)).max(1, initial=0)
    hits = (found.label_ids >= 0) & (found.scores >= (border - rounding)[:, None])
    wanted = real.sum(1)
    return float(np.minimum(hits.sum(1), wanted).sum() / wanted.sum()) if wanted.any() else 1.0


def checked_k(k: Any, name: str = "k") -> int:
    """Return a number of labels as a plain integer.

    Raises:
        ValueError: if ``k`` is not a whole number of at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise ValueError(f"{name} must be a whole number, got {k!r}.")
    if k < 1:
        raise ValueError(f"{name} must be at least 1, got {k}.")
    return int(k)
