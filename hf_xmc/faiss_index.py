"""Faster search with FAISS: it proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from hf_xmc.index import LabelIndex

EFFORTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
RANKED_AT_ONCE = 64  # queries whose proposals are gathered together
FEW = 1 / 20  # where no more than this share of the labels may be returned, they are all scored


def default_factory(num_labels: int) -> str:
    """What to use at a scale: int8 codes that are all scanned, a graph, or inverted lists of int8 codes.

    >>> default_factory(19_000), default_factory(131_000), default_factory(5_000_000)
    ('SQ8', 'HNSW32', 'IVF8192,SQ8')
    """
    if num_labels <= 50_000:
        return "SQ8"
    return "HNSW32" if num_labels <= 2_000_000 else f"IVF{2 ** round(np.log2(4 * num_labels**0.5))},SQ8"


class FaissIndex(LabelIndex):
    """A label index that looks at some of the labels only, or at codes of them.

    Labels are found by inner product, which graphs and lists serve badly where norms differ; they are given one more
    number that makes all of one length, after which the nearest label is the one of the largest product (Bachrach et
    al., Speeding Up the Xbox Recommender System, RecSys 2014).

    Args:
        embeddings: as in :class:`LabelIndex`; they rank what is proposed, so that scores are exact.
        factory: a factory string of FAISS, such as ``"HNSW32"``, ``"IVF1024,SQ8"`` or ``"PCAR64,IVF1024,PQ32"``; by
            default :func:`default_factory`. Of codes that are all scanned (``"SQ8"``, ``"SQfp16"``) the result is that
            of exact search: more are proposed until their error can hide nothing.
        effort: lists or graph nodes that are looked at (``nprobe``, ``efSearch``); see :meth:`tune`.
        refine: labels proposed for each that is wanted.
    """

    def __init__(
        self, embeddings: np.ndarray | Tensor, factory: str | None = None, *, effort: int = 64, refine: int = 4
    ) -> None:
        super().__init__(embeddings)
        self.factory, self.effort, self.refine = factory or default_factory(self.num_labels), effort, refine
        self._build()

    def _build(self) -> None:
        self._length = float(self.embeddings.float().norm(dim=1).max()) if self.num_labels else 0.0
        metric = faiss.METRIC_INNER_PRODUCT if self.scans else faiss.METRIC_L2
        self._index = faiss.index_factory(self.embedding_dim + (not self.scans), self.factory, metric)
        vectors = self._vectors(self.embeddings)
        self._index.train(vectors)
        self._index.add(vectors)
        self._label_of = np.arange(self.num_labels)  # of each place of the FAISS index; -1 once it is removed
        self._error = 0.0
        if self.scans:
            codes = (self._index.reconstruct_n(at, min(4096, len(vectors) - at)) for at in range(0, len(vectors), 4096))
            errors = (
                np.linalg.norm(vectors[4096 * n : 4096 * (n + 1)] - part, axis=1).max() for n, part in enumerate(codes)
            )
            self._error = 1.001 * float(max(errors, default=0.0))  # and a little for the rounding of float32

    @property
    def scans(self) -> bool:
        """Whether every label is looked at."""
        return self.factory == "Flat" or (self.factory.startswith("SQ") and "," not in self.factory)

    def _vectors(self, embeddings: Tensor) -> np.ndarray:
        vectors = embeddings.float().numpy()
        if self.scans:
            return np.ascontiguousarray(vectors)
        rest = np.sqrt(np.maximum(self._length**2 - (vectors.astype(np.float64) ** 2).sum(1), 0))
        return np.ascontiguousarray(np.hstack([vectors, rest[:, None].astype(np.float32)]))

    def add(self, embeddings: np.ndarray | Tensor) -> None:
        """More labels; their ids follow those that are there. Longer ones than all before make the index anew."""
        before = self.num_labels
        super().add(embeddings)
        self._append(np.arange(before, self.num_labels))

    def remove(self, label_ids: Iterable[int]) -> None:
        """Labels that go, and ids that close up. A graph keeps their nodes as ways to others until it is made anew."""
        kept = ~self._marked(label_ids := list(label_ids))
        super().remove(label_ids)
        new_id = np.where(kept, kept.cumsum() - 1, -1)
        self._label_of = np.where(self._label_of >= 0, new_id[self._label_of], -1)

    def replace(self, label_ids: Sequence[int], embeddings: np.ndarray | Tensor) -> None:
        """Other embeddings for labels; what was in their place is treated as removed."""
        super().replace(label_ids, embeddings)
        self._label_of[np.isin(self._label_of, label_ids)] = -1
        self._append(np.unique(label_ids))

    def _append(self, label_ids: np.ndarray) -> None:
        new = self.embeddings[torch.from_numpy(label_ids)]
        if not len(new):
            return
        if self.scans or float(new.float().norm(dim=1).max()) > self._length:
            self._build()
        else:
            self._index.add(self._vectors(new))
            self._label_of = np.append(self._label_of, label_ids)

    def _search_block(self, queries: Tensor, k: int, hidden: Tensor | None, pairs: Tensor) -> tuple[Tensor, Tensor]:
        shown = np.append(np.ones(self.num_labels, bool) if hidden is None else ~hidden.numpy(), False)
        wanted = k + int(torch.bincount(pairs[:, 0]).max() if len(pairs) else 0)
        if shown.sum() <= max(FEW * self.num_labels, 2 * wanted):
            return super()._search_block(queries, k, hidden, pairs)
        selector = shown[self._label_of]  # -1 leads to the last, which is not shown
        found = []
        for start in range(0, len(queries), RANKED_AT_ONCE):
            rows = slice(start, start + RANKED_AT_ONCE)
            here = pairs[(start <= pairs[:, 0]) & (pairs[:, 0] < start + RANKED_AT_ONCE)] - torch.tensor([start, 0])
            found.append(self._rank(queries[rows], k, wanted * self.refine, selector, here))
        scores, label_ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scores, label_ids

    def _rank(
        self, queries: Tensor, k: int, proposed: int, selector: np.ndarray, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        while True:
            proposed = min(proposed, len(selector))
            near, places = self._propose(queries, proposed, selector)
            label_ids = torch.from_numpy(np.where(places >= 0, self._label_of[places], -1))
            rows = self.embeddings[label_ids.clamp(min=0)].float()  # (B, proposed, D)
            scores = torch.bmm(rows, queries.unsqueeze(2)).squeeze(2).masked_fill(label_ids < 0, -torch.inf)
            for row, label in pairs.tolist():
                scores[row, label_ids[row] == label] = -torch.inf
            label_ids, order = label_ids.sort(dim=1, stable=True)  # ties in the order of ids
            best, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
            best, best_ids = best[:, :k], label_ids.gather(1, by_score)[:, :k]
            # Whatever was not proposed has a code no better than the last one's, and is better by the error at most.
            hides = torch.from_numpy(near[:, -1]) + self._error * queries.norm(dim=1) >= best[:, -1]
            if not self.scans or proposed == len(selector) or not bool((hides & (label_ids[:, 0] >= 0)).any()):
                short = k - best.shape[1]
                best = torch.nn.functional.pad(best, (0, short), value=-torch.inf)
                best_ids = torch.nn.functional.pad(best_ids, (0, short), value=-1)
                return best, best_ids.masked_fill(best == -torch.inf, -1)
            proposed *= 4

    def _propose(self, queries: Tensor, k: int, selector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors = queries.numpy()
        if not self.scans:
            vectors = np.hstack([vectors, np.zeros((len(vectors), 1), np.float32)])
        chosen = None if selector.all() else faiss.IDSelectorBitmap(np.packbits(selector, bitorder="little"))
        near, places = self._index.search(np.ascontiguousarray(vectors), k, params=self._settings(self._index, chosen))
        return near, places

    def _settings(self, index: Any, selector: Any) -> Any:
        index = faiss.downcast_index(index)
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexPreTransform):
            return faiss.SearchParametersPreTransform(index_params=self._settings(index.index, selector))
        if isinstance(index, faiss.IndexRefine):
            return faiss.IndexRefineSearchParameters(base_index_params=self._settings(index.base_index, selector))
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=self.effort, **chosen)
        if isinstance(index, faiss.IndexIVF):
            kind = faiss.IVFPQSearchParameters if isinstance(index, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
            return kind(nprobe=self.effort, **chosen)
        return faiss.SearchParameters(**chosen)

    def tune(self, queries: np.ndarray | Tensor, *, recall: float = 0.99, k: int = 10) -> float:
        """The smallest ``effort`` whose share of the exact best ``k`` reaches ``recall`` on these queries.

        Returns the recall reached, which is that of the largest effort where none is enough.
        """
        exact = LabelIndex(self.embeddings).search(queries, k).label_ids
        reached = 0.0
        for effort in EFFORTS:
            self.effort = effort
            reached = recall_of(self.search(queries, k).label_ids, exact)
            if reached >= recall:
                break
        return reached


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact label ids that were found, padding aside.

    >>> recall_of(np.array([[1, 2]]), np.array([[2, 3]]))
    0.5
    """
    hits = (found[:, :, None] == exact[:, None, :]) & (exact[:, None, :] >= 0)
    return float(hits.sum() / max(1, (exact >= 0).sum()))
