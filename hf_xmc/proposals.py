"""Search in two steps: something fast proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_xmc.index import LabelIndex, rows_of

RANKED_AT_ONCE = 64  # queries whose proposals are gathered together
FEW = 1 / 20  # where no larger share of the labels may be returned, or a larger one of those is wanted, all are scored


class ProposingIndex(LabelIndex, ABC):
    """What :class:`hf_xmc.FaissIndex` and :class:`hf_xmc.MilvusIndex` share: all but what proposes.

    Labels are found by inner product. A graph does that best as it is (Morozov & Babenko, Non-metric Similarity Graphs,
    NeurIPS 2018): on labels of different length it finds 0.99 of the best ten where one of distances finds 0.8 with the
    same effort. For lists it is the other way round: labels are given one more number that makes all of one length,
    after which the nearest is the one of the largest product (Bachrach et al., Speeding Up the Xbox Recommender System,
    RecSys 2014).

    A child has ``_by_product``, ``_fill``, ``_insert`` and ``_propose``. It knows a label by its place, the number in
    the order of coming, which stays when others go.
    """

    most_proposed = 2**31  # of one query; where more are wanted, all labels are scored

    def __init__(self, embeddings: np.ndarray | Tensor, refine: int) -> None:
        super().__init__(embeddings)
        self.refine = refine
        self._build()

    def _build(self) -> None:
        self._length = float(self.embeddings.float().norm(dim=1).max()) if self.num_labels else 0.0
        self._label_of = np.arange(self.num_labels)  # of each place; -1 once it is removed
        self._fill(self._vectors(self.embeddings))

    @abstractmethod
    def _fill(self, vectors: np.ndarray) -> None:
        """Start anew with these vectors, the number of each being its place."""

    @abstractmethod
    def _insert(self, vectors: np.ndarray, places: np.ndarray) -> None:
        """More vectors, whose places follow those that are there."""

    def _forget(self, places: np.ndarray) -> None:
        """Vectors that are of no label any more; they may stay."""

    @abstractmethod
    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """What is near each query, and the places, ``(B, k)`` both, of those ``shown`` (P,), or of all; -1 pads."""

    @property
    @abstractmethod
    def _by_product(self) -> bool:
        """Whether what proposes compares inner products, or distances of vectors of one length."""

    def _vectors(self, embeddings: Tensor, *, queries: bool = False) -> np.ndarray:
        vectors = embeddings.float().numpy()
        if self._by_product:
            return np.ascontiguousarray(vectors)
        rest = np.zeros(len(vectors))
        if not queries:
            rest = np.sqrt(np.maximum(self._length**2 - (vectors.astype(np.float64) ** 2).sum(1), 0))
        return np.ascontiguousarray(np.hstack([vectors, rest[:, None].astype(np.float32)]))

    def _fits(self, new: Tensor) -> bool:
        return self._by_product or float(new.float().norm(dim=1).max()) <= self._length

    def add(self, embeddings: np.ndarray | Tensor) -> None:
        """More labels; their ids follow those that are there. Longer ones than all before make the index anew."""
        before = self.num_labels
        super().add(embeddings)
        self._append(np.arange(before, self.num_labels))

    def remove(self, label_ids: Iterable[int]) -> None:
        """Labels that go, and ids that close up. A graph keeps their nodes as ways to others, until they are more than
        the labels: then it is made anew."""
        kept = ~self._marked(label_ids := list(label_ids))
        super().remove(label_ids)
        self._renumber(np.where(kept, kept.cumsum() - 1, -1))
        self._renew()

    def replace(self, label_ids: Sequence[int], embeddings: np.ndarray | Tensor) -> None:
        """Other embeddings for labels; what was in their place is treated as removed."""
        super().replace(label_ids, embeddings)
        self._renumber(np.where(np.isin(np.arange(self.num_labels), label_ids), -1, np.arange(self.num_labels)))
        self._append(np.unique(label_ids))
        self._renew()

    def _renew(self) -> None:
        """After labels went: what is used up may be made anew."""

    def _renumber(self, new_id: np.ndarray) -> None:
        before = self._label_of
        self._label_of = np.where(before >= 0, new_id[before], -1)
        self._forget(np.flatnonzero((before >= 0) & (self._label_of < 0)))

    def _append(self, label_ids: np.ndarray) -> None:
        new = self.embeddings[torch.from_numpy(label_ids)]
        if not len(new):
            return
        if self._fits(new):
            self._insert(self._vectors(new), np.arange(len(self._label_of), len(self._label_of) + len(new)))
            self._label_of = np.append(self._label_of, label_ids)
        else:
            self._build()

    def _better_scored(self, wanted: int, visible: int) -> bool:
        """Whether to score all labels, where so many are wanted of so many that may be returned."""
        return visible <= max(FEW * self.num_labels, wanted / FEW) or wanted > self.most_proposed

    def _search_block(self, queries: Tensor, k: int, hidden: Tensor | None, pairs: Tensor) -> tuple[Tensor, Tensor]:
        wanted = k + int(torch.bincount(pairs[:, 0]).max() if len(pairs) else 0)
        visible = self.num_labels if hidden is None else len(hidden) - int(hidden.sum())
        if self._better_scored(wanted, visible):
            return super()._search_block(queries, k, hidden, pairs)
        shown = None
        if hidden is not None:
            shown = np.append(~hidden.numpy(), False)[self._label_of]  # -1 leads to the last, which is not shown
        elif len(self._label_of) > self.num_labels:
            shown = self._label_of >= 0
        proposed = min(wanted * self.refine, self.most_proposed)
        best, best_ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for start in range(0, len(queries), RANKED_AT_ONCE):
            rows = slice(start, start + RANKED_AT_ONCE)
            here = rows_of(pairs, start, start + RANKED_AT_ONCE)
            found, found_ids, _ = self._rank(queries[rows], k, proposed, shown, here)
            best[rows, : found.shape[1]] = found
            best_ids[rows, : found.shape[1]] = np.where(found == -np.inf, -1, found_ids)
        scores, label_ids = torch.from_numpy(best), torch.from_numpy(best_ids)
        short = (label_ids < 0).any(1)  # there are more than k labels for every query
        if short.any():
            here = pairs[short[pairs[:, 0]]]
            here[:, 0] = (short.cumsum(0) - 1)[here[:, 0]]
            scores[short], label_ids[short] = super()._search_block(queries[short], k, hidden, here)
        return scores, label_ids

    def _rank(
        self, queries: Tensor, k: int, proposed: int, shown: np.ndarray | None, pairs: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best ``k`` of those proposed: scores, label ids, and how near the last that was proposed is."""
        near, places = self._propose(self._vectors(queries, queries=True), min(proposed, len(self._label_of)), shown)
        label_ids = np.where(places >= 0, self._label_of[places], -1)
        rows = self.embeddings.numpy()[label_ids].astype(np.float32, copy=False)  # (B, proposed, D)
        scores = np.matmul(rows, queries.numpy()[:, :, None])[:, :, 0]
        scores[label_ids < 0] = -np.inf
        for row, label in pairs.tolist():
            scores[row, label_ids[row] == label] = -np.inf
        order = np.lexsort((label_ids, -scores), axis=1)[:, :k]  # ties in the order of ids
        last = np.where((label_ids < 0).any(1), -np.inf, near[:, -1])  # no more to propose
        return np.take_along_axis(scores, order, 1), np.take_along_axis(label_ids, order, 1), last
