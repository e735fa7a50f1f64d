"""Search in two steps: something fast proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.equal_rows import Groups
from hf_xmc.search.exact import LabelIndex, rows_of

RANKED_AT_ONCE = 64  # queries whose proposals are gathered together
FEW = 1 / 20  # if no larger share of the labels may be returned, or a larger one of those is wanted, all are scored


class ProposingIndex(LabelIndex, ABC):
    """Base class of :class:`hf_xmc.FaissIndex` and :class:`hf_xmc.MilvusIndex`, which make the proposals.

    Labels are found by inner product, in as many dimensions as the embeddings have. Labels of equal embeddings are one
    vector, so that they cannot crowd out others. A vector is known by its place: the number in the order of coming,
    which stays when others go.

    A child has ``_fill``, ``_update``, ``_num_places`` and ``_propose``.
    """

    most_proposed = 2**31  # for one query; if more are wanted, all labels are scored

    def __init__(self, embeddings: np.ndarray | Tensor, refine: int) -> None:
        self.refine = checked_count("refine", refine)
        super().__init__(embeddings)

    def _place(self, first: np.ndarray) -> None:
        self._groups = self._filled(self.embeddings, first)

    @abstractmethod
    def _fill(self, vectors: np.ndarray) -> None:
        """Start again with these vectors, whose places are their rows. What is there stays if that fails."""

    @abstractmethod
    def _update(self, vectors: np.ndarray, gone: np.ndarray) -> None:
        """Take more vectors, whose places start at ``_num_places``, and forget the places that are ``gone``.

        If that fails, what was there must still be found. Vectors without a label may stay: they are not returned.
        """

    @property
    @abstractmethod
    def _num_places(self) -> int:
        """The number of places that were ever assigned since the index was filled."""

    @abstractmethod
    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return how near, and the places, ``(B, k)`` both, among those ``shown`` (P,), or all; -1 pads."""

    def _renews(self, num_new: int, num_used: int, num_distinct: int) -> bool:
        """Return whether to fill again, rather than update, with so many new vectors and places."""
        return False

    def _filled(self, embeddings: Tensor, first: np.ndarray) -> Groups:
        distinct = np.flatnonzero(first == np.arange(len(first)))
        groups = Groups(np.searchsorted(distinct, first), len(distinct))
        self._fill(vectors_of(embeddings, distinct))
        return groups

    def _regrouped(self, embeddings: Tensor, first: np.ndarray, source: np.ndarray) -> Groups:
        known, size = source >= 0, self._num_places
        place = np.full(len(first), -1)  # of the first row of each group
        place[first[known]] = self._groups.place_of[source[known]]
        new = np.flatnonzero((first == np.arange(len(first))) & (place < 0))
        place[new] = size + np.arange(len(new))
        groups = Groups(place[first], size + len(new))
        if self._renews(len(new), len(groups), int((groups.size > 0).sum())):
            return self._filled(embeddings, first)
        before = self._groups.size > 0
        self._update(vectors_of(embeddings, new), np.flatnonzero(before & (groups.size[: len(before)] == 0)))
        return groups

    def _better_scored(self, wanted: int, visible: int) -> bool:
        """Return whether to score all labels, if so many vectors are wanted of so many that may be returned."""
        distinct = int((self._groups.size > 0).sum())
        return visible <= max(FEW * distinct, wanted / FEW) or wanted > self.most_proposed

    def _search_block(self, queries: Tensor, k: int, groups: Groups, pairs: Tensor) -> tuple[Tensor, Tensor]:
        wanted = k + int(torch.bincount(pairs[:, 0]).max() if len(pairs) else 0)
        visible = int((groups.size > 0).sum())
        if self._better_scored(wanted, visible):
            return super()._search_block(queries, k, groups, pairs)
        shown = None
        if visible < self._num_places:
            shown = np.zeros(self._num_places, dtype=bool)
            shown[: len(groups)] = groups.size > 0
        proposed = min(wanted * self.refine, self.most_proposed)
        best, best_ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for start in range(0, len(queries), RANKED_AT_ONCE):
            rows = slice(start, start + RANKED_AT_ONCE)
            here = rows_of(pairs, start, start + RANKED_AT_ONCE).numpy()
            best_ids[rows], best[rows], _ = self._rank(queries[rows], k, proposed, shown, groups, here)
        scores, label_ids = torch.from_numpy(best), torch.from_numpy(best_ids)
        short = (label_ids < 0).any(1)  # there are more than k labels for every query
        if short.any():
            left = pairs[short[pairs[:, 0]]]
            left[:, 0] = (short.cumsum(0) - 1)[left[:, 0]]
            scores[short], label_ids[short] = super()._search_block(queries[short], k, groups, left)
        return scores, label_ids

    def _rank(
        self, queries: Tensor, k: int, proposed: int, shown: np.ndarray | None, groups: Groups, pairs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids and scores of the best ``k`` of those proposed, and how near the last that was proposed is."""
        vectors = np.ascontiguousarray(queries.numpy())
        near, places = self._propose(vectors, min(proposed, self._num_places), shown)
        if shown is not None:
            places = np.where(shown[places], places, -1)
        rows = self.embeddings.numpy()[groups.first[places]].astype(np.float32, copy=False)  # (B, proposed, D)
        scores = np.matmul(rows, vectors[:, :, None])[:, :, 0]
        scores[places < 0] = -np.inf
        last = np.where((places < 0).any(1), -np.inf, near[:, -1])  # no more to propose
        return *groups.best(places, scores, k, pairs), last


def checked_count(name: str, value: int) -> int:
    """Return a number of which at least one is needed.

    Raises:
        ValueError: if it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def vectors_of(embeddings: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return those rows as one block of float32."""
    return np.ascontiguousarray(embeddings[torch.from_numpy(rows)].float().numpy())
