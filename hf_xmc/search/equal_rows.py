"""Find equal rows of a table, so that they share one vector and one score."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from torch import Tensor

ROWS_AT_ONCE = 16384
CODED_AT_ONCE = 256  # rows that stay in the cache


def codes_of(rows: Tensor) -> np.ndarray:
    """Return a 64-bit code of each row, ``(L,)``. Equal rows have equal codes; other rows almost never do."""
    codes = np.empty(len(rows), dtype=np.uint64)
    weights = np.random.default_rng(0).integers(0, 2**63, rows.shape[1], dtype=np.uint64) * 2 + 1
    for start in range(0, len(rows), CODED_AT_ONCE):
        part = np.ascontiguousarray(rows[start : start + CODED_AT_ONCE].numpy())
        words = part.view(np.uint32 if part.dtype == np.float32 else np.uint16).astype(np.uint64)
        words[words == 2 ** (8 * part.itemsize - 1)] = 0  # turns -0 into 0
        codes[start : start + CODED_AT_ONCE] = np.einsum("ij,j->i", words, weights)
    return codes


def fingerprint(rows: np.ndarray) -> bytes:
    """Return the SHA-256 of the type, the shape and all rows of a table."""
    found = hashlib.sha256(f"{rows.dtype.str} {rows.shape}".encode())
    found.update(np.ascontiguousarray(rows).data)
    return found.digest()


def first_equal(rows: Tensor, codes: np.ndarray) -> np.ndarray:
    """Return the first row that is equal to each row, ``(L,)``.

    Args:
        rows: ``(L, D)``.
        codes: Codes of the rows, from :func:`codes_of`. Only rows with the same code are compared.
    """
    first = np.arange(len(codes))
    candidates = first
    while len(candidates):  # more than once only if different rows have the same code
        _, start, inverse = np.unique(codes[candidates], return_index=True, return_inverse=True)
        firsts = candidates[start[inverse]]
        later = firsts != candidates
        candidates, firsts = candidates[later], firsts[later]
        same = np.empty(len(candidates), dtype=bool)
        for at in range(0, len(candidates), ROWS_AT_ONCE):
            here = slice(at, at + ROWS_AT_ONCE)
            same[here] = (rows[candidates[here]] == rows[firsts[here]]).all(1).numpy()
        first[candidates[same]] = firsts[same]
        candidates = candidates[~same]
    return first


class Groups:
    """The labels at each place of an index. Labels with equal embeddings share a place.

    Args:
        place_of: ``(L,)``, the place of each label.
        num_places: ``P``, the number of places. A place may have no label.

    Attributes:
        first: ``(P,)``, the first label of each place, which represents its other labels; -1 for an empty place.
        shared: Whether a place has several labels.
        partial: Whether some labels are hidden.
    """

    def __init__(self, place_of: np.ndarray, num_places: int) -> None:
        size, labels = np.bincount(place_of, minlength=num_places), np.arange(len(place_of))
        self.place_of, self._num_places = _compact(place_of), num_places
        self._visible: np.ndarray | None = None
        self.shared, self.partial = bool((size > 1).any()), False
        self._all_labels = _compact(np.argsort(place_of, kind="stable"))  # by place, and by id at each place
        first = np.full(num_places, -1)
        first[place_of[::-1]] = labels[::-1]  # of equal labels the first one is written last
        self.first = _compact(first)

    def __len__(self) -> int:
        return self._num_places

    # These tables cost more than a search among few labels, so they are computed only when needed.

    @cached_property
    def _labels(self) -> np.ndarray:
        """The visible labels by place, and by id at each place."""
        return self._all_labels if self._visible is None else self._all_labels[self._visible[self._all_labels]]

    @cached_property
    def size(self) -> np.ndarray:
        """``(P,)``, the number of visible labels at each place."""
        return np.bincount(self.place_of[self._labels], minlength=len(self))

    @cached_property
    def num_used(self) -> int:
        """The number of places with a visible label."""
        return int(np.count_nonzero(self.size))

    @cached_property
    def _start(self) -> np.ndarray:
        """``(P,)``, where the labels of each place begin in ``_labels``."""
        start: np.ndarray = self.size.cumsum() - self.size
        return start

    @cached_property
    def idle(self) -> np.ndarray:
        """The labels that do not represent a place with a visible label, in ascending order."""
        if not self.shared:
            return np.empty(0, np.int64) if self._visible is None else np.flatnonzero(~self._visible)
        idle = np.ones(len(self.place_of), dtype=bool)
        idle[self.first[self.size > 0]] = False
        return np.flatnonzero(idle)

    def restricted(self, visible: np.ndarray) -> Groups:
        """Return the same places with only the labels that may be returned; ``visible`` is a mask ``(L,)``.

        A place keeps its first label even if that label is hidden, so that scores stay the same.
        """
        groups = object.__new__(Groups)
        groups.place_of, groups._num_places, groups._visible = self.place_of, self._num_places, visible
        groups._all_labels, groups.first, groups.shared = self._all_labels, self.first, self.shared
        groups.partial = not bool(visible.all())
        return groups

    def emptied_by(self, pairs: np.ndarray) -> np.ndarray:
        """Return the pairs (row, place) that have no label left once the pairs (row, label) are excluded."""
        rows, places = pairs[:, 0], self.place_of[pairs[:, 1]]
        if not self.shared or not len(pairs):
            return np.stack([rows, places], axis=1)
        pairs = np.unique(pairs[np.isin(pairs[:, 1], self._labels)], axis=0)
        left = np.stack([pairs[:, 0], self.place_of[pairs[:, 1]]], axis=1)
        left, excluded = np.unique(left, axis=0, return_counts=True)
        return left[excluded == self.size[left[:, 1]]]

    def best(self, places: np.ndarray, scores: np.ndarray, k: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores, ``(B, k)`` both, of the best labels; of equal scores the smaller id comes first.

        Args:
            places: ``(B, m)``, without repetition in a row.
            scores: ``(B, m)``, their scores; minus infinity is padding.
            k: Number of labels to return, padded with -1 and minus infinity.
            pairs: ``(M, 2)`` excluded pairs (row, label).
        """
        if not self.shared and not self.partial and not len(pairs) and len(self):
            return _best_single(np.where(scores == -np.inf, -1, self.first[places]), scores, k)
        wanted = k + (int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0)
        order = np.argsort(-scores, axis=1, kind="stable")
        places, scores = np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)
        count = np.minimum(self.size[places], wanted) if len(self) else np.zeros_like(places)
        count[scores == -np.inf] = 0
        if self.shared and scores.shape[1]:  # places after the first `wanted` labels are not needed
            before = count.cumsum(1) - count
            before[:, 1:][scores[:, 1:] == scores[:, :-1]] = 0  # unless they tie
            count[np.maximum.accumulate(before, axis=1) >= wanted] = 0
        rows = np.repeat(np.arange(len(places)), count.sum(1))
        counts = count.ravel()
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        labels = self._labels[np.repeat(self._start[places.ravel()] if len(self) else counts, counts) + within]
        found = np.repeat(scores.ravel(), counts)
        if len(pairs):
            wide = len(self.place_of)
            kept = ~np.isin(rows * wide + labels, pairs[:, 0] * wide + pairs[:, 1])
            rows, labels, found = rows[kept], labels[kept], found[kept]
        return best_of_rows(rows, labels, found, len(places), k)


def _compact(ids: np.ndarray) -> np.ndarray:
    """Return ids in the smaller of two types of integers; a table of millions of labels has many."""
    return ids.astype(np.int32 if len(ids) < 2**30 else np.int64)  # places may be twice as many as labels


def _best_single(labels: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores of the best labels, as :func:`best_of_rows` does, given the one label of each place."""
    order = np.lexsort((labels, np.where(labels < 0, np.inf, -scores)), axis=1)[:, :k]
    best_ids, best = np.full((len(labels), k), -1), np.full((len(labels), k), -np.inf, np.float32)
    best_ids[:, : order.shape[1]] = np.take_along_axis(labels, order, 1)
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, 1)
    best[best_ids < 0] = -np.inf
    return best_ids, best


def best_of_rows(
    rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_rows: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores, ``(num_rows, k)`` both, of the best labels of each row, padded.

    Of equal scores the smaller label comes first.

    Args:
        rows, labels, scores: Row, label and score of each candidate, in any order.
        num_rows: Number of rows.
        k: Number of labels per row.

    >>> best_of_rows(np.array([0, 0, 0]), np.array([7, 3, 5]), np.array([1.0, 2.0, 2.0]), 1, 2)[0]
    array([[3, 5]])
    """
    order = np.lexsort((labels, -scores, rows))
    rows, labels, scores = rows[order], labels[order], scores[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = place < k
    best_ids, best = np.full((num_rows, k), -1), np.full((num_rows, k), -np.inf, np.float32)
    best_ids[rows[kept], place[kept]] = labels[kept]
    best[rows[kept], place[kept]] = scores[kept]
    return best_ids, best
