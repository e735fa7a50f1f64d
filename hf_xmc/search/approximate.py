"""Approximate search: find candidates fast, then rank them by their stored embeddings in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.candidates import Candidates, Change, checked_count, vectors_of
from hf_xmc.search.equal_rows import Groups
from hf_xmc.search.exact import FEW, LabelIndex, rows_of
from hf_xmc.search.stored_rows import StoredRows

RANKED_AT_ONCE = 64  # queries whose candidates are gathered together


class ApproximateIndex(LabelIndex):
    """A label index that scores only candidates, which :class:`hf_xmc.search.candidates.Candidates` finds.

    Scores and order are exact for the candidates, because the stored embeddings rank them in float32. Labels with equal
    embeddings share one vector, so that they cannot crowd out others. The search is exact if few labels are visible,
    or if many are requested.

    Args:
        embeddings: ``(L, D)``, as in :class:`hf_xmc.LabelIndex`.
        candidates: Search for candidates that no other index uses. This class builds it.
        refine: Number of candidates per requested label, the ``k_factor`` of FAISS.

    Raises:
        ValueError: if ``LabelIndex`` refuses the embeddings, or ``refine`` is not a whole number of at least 1.
    """

    _stored_rows: StoredRows | None = None  # the embeddings in a file, until labels change

    def __init__(self, embeddings: np.ndarray | Tensor, candidates: Candidates, *, refine: int = 4) -> None:
        self._start(embeddings, candidates, refine, candidates.build)

    def _start(
        self,
        embeddings: np.ndarray | Tensor,
        candidates: Candidates,
        refine: int,
        build: Callable[[np.ndarray, Tensor], None],
    ) -> None:
        self.refine = checked_count("refine", refine)
        super().__init__(embeddings)
        self.candidates = candidates
        self._groups = _built(build, self.embeddings, self._groups.place_of)

    def _start_unchecked(
        self, embeddings: np.ndarray | Tensor, candidates: Candidates, refine: int, groups: Groups
    ) -> None:
        """Start with candidates that are built already, and the places of the labels, without reading a row."""
        self.refine = checked_count("refine", refine)
        super().__init__(embeddings, check=False)
        self.candidates, self._groups = candidates, groups

    def __getstate__(self) -> dict[str, Any]:  # another process gets the embeddings, not the name of their file
        return {**self.__dict__, "_stored_rows": None}

    def _become(self, embeddings: Tensor, source: np.ndarray) -> None:
        self._stored_rows = None
        super()._become(embeddings, source)

    def _regrouped(self, embeddings: Tensor, first: np.ndarray, source: np.ndarray) -> Groups:
        known, size = source >= 0, self.candidates.num_places
        place = np.full(len(first), -1)  # of the first row of each group
        place[first[known]] = self._groups.place_of[source[known]]
        new = np.flatnonzero((first == np.arange(len(first))) & (place < 0))
        place[new] = size + np.arange(len(new))
        groups = Groups(place[first], size + len(new))
        before = self._groups.size > 0
        removed = np.flatnonzero(before & (groups.size[: len(before)] == 0))
        num_used = int((groups.size > 0).sum())
        removed_rows = self._groups.first[removed]
        if self.candidates.update(Change(self.embeddings, embeddings, new, removed, removed_rows, num_used)):
            return groups
        return _built(self.candidates.build, embeddings, first)

    def _rebuild(self) -> None:
        """Build again, so that places number the distinct embeddings in the order of the labels."""
        first = self._groups.first[self._groups.place_of]
        self._groups = _built(self.candidates.build, self.embeddings, first)

    def _searches_exactly(self, wanted: int, visible: int) -> bool:
        """Return whether exact search is the better choice for ``wanted`` results out of ``visible`` places.

        It is if at most the fraction ``FEW`` is visible, or more than that is requested.
        """
        distinct = self._groups.num_used
        steps = wanted * (self.refine if self.candidates.is_graph else 1)
        return visible <= max(FEW * distinct, steps / FEW) or wanted > self.candidates.max_candidates

    def _search_block(self, queries: Tensor, k: int, groups: Groups, pairs: Tensor) -> tuple[Tensor, Tensor]:
        wanted = k + int(torch.bincount(pairs[:, 0]).max() if len(pairs) else 0)
        num_visible, num_places = groups.num_used, self.candidates.num_places
        if self._searches_exactly(wanted, num_visible):
            return super()._search_block(queries, k, groups, pairs)
        visible = None
        if num_visible < num_places:
            visible = np.zeros(num_places, dtype=bool)
            visible[: len(groups)] = groups.size > 0
        requested = min(wanted * self.refine, self.candidates.max_candidates)
        best, best_ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for start in range(0, len(queries), RANKED_AT_ONCE):
            rows = slice(start, start + RANKED_AT_ONCE)
            here = rows_of(pairs, start, start + RANKED_AT_ONCE).numpy()
            best_ids[rows], best[rows] = self._rank(queries[rows], k, requested, visible, groups, here)
        scores, label_ids = torch.from_numpy(best), torch.from_numpy(best_ids)
        short = (label_ids < 0).any(1)  # every query has more than k labels to choose from
        if short.any():
            left = pairs[short[pairs[:, 0]]]
            left[:, 0] = (short.cumsum(0) - 1)[left[:, 0]]
            scores[short], label_ids[short] = super()._search_block(queries[short], k, groups, left)
        return scores, label_ids

    def _rank(
        self, queries: Tensor, k: int, requested: int, visible: np.ndarray | None, groups: Groups, pairs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores of the best ``k`` labels among at least ``requested`` candidates of each query."""
        vectors = np.ascontiguousarray(queries.numpy())
        num_places, error = self.candidates.num_places, self.candidates.error
        while True:
            near, places = self.candidates.nearest(vectors, min(requested, num_places), visible)
            if visible is not None:
                places = np.where(visible[places], places, -1)
            table = self.embeddings.numpy() if self._stored_rows is None else self._stored_rows
            rows = table[groups.first[places]].astype(np.float32, copy=False)  # (B, requested, D)
            scores = np.matmul(rows, vectors[:, :, None])[:, :, 0]
            scores[places < 0] = -np.inf
            best_ids, best = groups.best(places, scores, k, pairs)
            if error is None or requested >= num_places:
                return best_ids, best
            # Other vectors have a code score of at most the last candidate's, and a true score at most the error above
            # it.
            last = np.where((places < 0).any(1), -np.inf, near[:, -1])  # padding: there are no other vectors
            missing = (last + error * np.linalg.norm(vectors, axis=1) >= best[:, -1]) & np.isfinite(last)
            if not missing.any():
                return best_ids, best
            requested *= 4


def _built(build: Callable[[np.ndarray, Tensor], None], embeddings: Tensor, first: np.ndarray) -> Groups:
    """Build with the distinct rows of ``embeddings``, and return the place of each row."""
    distinct = np.flatnonzero(first == np.arange(len(first)))
    groups = Groups(np.searchsorted(distinct, first), len(distinct))
    build(vectors_of(embeddings, distinct), embeddings)
    return groups
