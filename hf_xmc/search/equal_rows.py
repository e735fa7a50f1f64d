"""Rows of a table that are equal: found once, compared once, and given one score."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from torch import Tensor

ROWS_AT_ONCE = 16384


def codes_of(rows: Tensor) -> np.ndarray:
    """Return a 64-bit code of each row, ``(L,)``. Equal rows have equal codes; other rows almost never do."""
    codes = np.empty(len(rows), dtype=np.uint64)
    weights = np.random.default_rng(0).integers(0, 2**63, rows.shape[1], dtype=np.uint64) * 2 + 1
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = np.ascontiguousarray(rows[start : start + ROWS_AT_ONCE].numpy() + 0)  # which makes -0 the same as 0
        words = part.view(np.uint32 if part.dtype == np.float32 else np.uint16)
        codes[start : start + ROWS_AT_ONCE] = words.astype(np.uint64) @ weights
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
        codes: those of :func:`codes_of`. Only rows of one code are compared.
    """
    first = np.arange(len(codes))
    candidates = first
    while len(candidates):  # again only if two different rows have one code
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
    """The labels at each place of an index. Labels of equal embeddings share a place.

    Args:
        place_of: ``(L,)``, the place of each label.
        num_places: ``P``. A place may have no label.

    Attributes:
        first: ``(P,)``, the first label of each place, which represents them all; -1 for a place without labels.
        size: ``(P,)``, how many labels of each place may be returned.
        shared: whether any place has several labels.
        partial: whether some labels may not be returned.
    """

    def __init__(self, place_of: np.ndarray, num_places: int) -> None:
        self.place_of = place_of
        self._labels = np.argsort(place_of, kind="stable")  # by place, and by id at each place
        self.size = np.bincount(place_of, minlength=num_places)
        self._start = self.size.cumsum() - self.size
        self.first = np.full(num_places, -1)
        self.first[self.size > 0] = self._labels[self._start[self.size > 0]]
        self.shared, self.partial = bool((self.size > 1).any()), False

    def __len__(self) -> int:
        return len(self.size)

    @cached_property
    def idle(self) -> np.ndarray:
        """Labels that do not stand for a place with a label that may be returned, rising."""
        idle = np.ones(len(self.place_of), dtype=bool)
        idle[self.first[self.size > 0]] = False
        return np.flatnonzero(idle)

    def restricted(self, visible: np.ndarray) -> Groups:
        """Return the same places with those labels only that may be returned; ``visible`` is a mask ``(L,)``.

        The first label stands for its place even if it is not returned itself, so that scores stay the same.
        """
        groups = object.__new__(Groups)
        groups.place_of, groups.first, groups.shared = self.place_of, self.first, self.shared
        groups._labels = self._labels[visible[self._labels]]
        groups.partial = len(groups._labels) < len(self.place_of)
        groups.size = np.bincount(self.place_of[groups._labels], minlength=len(self))
        groups._start = groups.size.cumsum() - groups.size
        return groups

    def emptied_by(self, pairs: np.ndarray) -> np.ndarray:
        """Return the pairs (row, place) of which no label is left once the pairs (row, label) are excluded."""
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
            places: ``(B, m)``, different ones in each row.
            scores: theirs; minus infinity is padding.
            k: how many labels to return; -1 and minus infinity pad.
            pairs: ``(M, 2)``, row and label, that are left out.
        """
        wanted = k + (int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0)
        order = np.argsort(-scores, axis=1, kind="stable")
        places, scores = np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)
        count = np.minimum(self.size[places], wanted) if len(self) else np.zeros_like(places)
        count[scores == -np.inf] = 0
        if self.shared and scores.shape[1]:  # places behind the first `wanted` labels are not needed
            before = count.cumsum(1) - count
            before[:, 1:][scores[:, 1:] == scores[:, :-1]] = 0  # but for those of equal score
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


def best_of_rows(
    rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_rows: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores, ``(num_rows, k)`` both, of the best labels of each row, which padding follows.

    Args:
        rows, labels, scores: of each candidate, in any order. Of equal scores the smaller label comes first.

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
