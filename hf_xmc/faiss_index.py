"""Faster search with FAISS: it proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
from torch import Tensor

from hf_xmc.faiss_state import restore, state_of
from hf_xmc.index import LabelIndex
from hf_xmc.proposals import ProposingIndex

EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def default_factory(num_labels: int) -> str:
    """What to use at a scale: int8 codes that are all scanned, a graph, or inverted lists of int8 codes.

    >>> default_factory(19_000), default_factory(131_000), default_factory(5_000_000)
    ('SQ8', 'HNSW32', 'IVF8192,SQ8')
    """
    if num_labels <= 50_000:
        return "SQ8"
    return "HNSW32" if num_labels <= 2_000_000 else f"IVF{2 ** round(np.log2(4 * num_labels**0.5))},SQ8"


class FaissIndex(ProposingIndex):
    """A label index that looks at some of the labels only, or at codes of them.

    Args:
        embeddings: as in :class:`LabelIndex`; they rank what is proposed, so that scores are exact.
        factory: a factory string of FAISS, such as ``"HNSW32"``, ``"IVF1024,SQ8"`` or ``"PCAR64,IVF1024,PQ32"``; by
            default :func:`default_factory`. Of codes that are all scanned (``"SQ8"``, ``"SQfp16"``) the result is that
            of exact search: more are proposed until their error can hide nothing.
        effort: lists or graph nodes that are looked at (``nprobe``, ``efSearch``); more where labels are hidden. See
            :meth:`tune`.
        refine: labels proposed for each that is wanted.
        state: the tables that :meth:`state` gave of an index of these embeddings, which are not built again then.

    Raises:
        ValueError: embeddings as in :class:`LabelIndex`, or a ``state`` of something else.
    """

    def __init__(
        self,
        embeddings: np.ndarray | Tensor,
        factory: str | None = None,
        *,
        effort: int = 64,
        refine: int = 4,
        state: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.factory, self.effort = factory or default_factory(len(embeddings)), effort
        self._state = state
        super().__init__(embeddings, refine)

    def _fill(self, vectors: np.ndarray) -> None:
        metric = faiss.METRIC_INNER_PRODUCT if self._by_product else faiss.METRIC_L2
        self._index = faiss.index_factory(vectors.shape[1], self.factory, metric)
        state, self._state = self._state, None
        if state is None:
            self._index.train(vectors)
            self._index.add(vectors)
        else:
            restore(self._index, vectors, state)
        self._error = 0.0
        if self.scans:
            codes = (self._index.reconstruct_n(at, min(4096, len(vectors) - at)) for at in range(0, len(vectors), 4096))
            errors = (
                np.linalg.norm(vectors[4096 * n : 4096 * (n + 1)] - part, axis=1).max() for n, part in enumerate(codes)
            )
            self._error = 1.001 * float(max(errors, default=0.0))  # and a little for the rounding of float32

    def _insert(self, vectors: np.ndarray, places: np.ndarray) -> None:
        self._index.add(vectors)

    def _renew(self) -> None:
        if self._is_graph and len(self._label_of) > 2 * self.num_labels:
            self._build()

    def _better_scored(self, wanted: int, visible: int) -> bool:
        nodes = self.refine if self._is_graph else 1  # that are walked to, one after the other, for each that is wanted
        return super()._better_scored(wanted * nodes, visible)

    def state(self) -> dict[str, np.ndarray]:
        """What takes long to build: a graph or lists, as tables; none where all labels are looked at.

        An index that labels went from is built anew first.
        """
        if not np.array_equal(self._label_of, np.arange(self.num_labels)):
            self._build()
        return state_of(self._index)

    @property
    def scans(self) -> bool:
        """Whether every label is looked at."""
        return self.factory == "Flat" or (self.factory.startswith("SQ") and "," not in self.factory)

    @property
    def _is_graph(self) -> bool:
        return self.factory.startswith("HNSW")

    @property
    def _by_product(self) -> bool:
        return self.scans or self._is_graph

    def _fits(self, new: Tensor) -> bool:
        return not self.scans and super()._fits(new)  # ranges of codes are those of the labels they were made for

    def _rank(
        self, queries: Tensor, k: int, proposed: int, shown: np.ndarray | None, pairs: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        while True:
            best, best_ids, last = super()._rank(queries, k, proposed, shown, pairs)
            # Whatever was not proposed has a code no better than the last one's, and is better by the error at most.
            hides = last + self._error * np.linalg.norm(queries.numpy(), axis=1) >= best[:, -1]
            if not self.scans or proposed >= len(self._label_of) or not (hides & np.isfinite(last)).any():
                return best, best_ids, last
            proposed *= 4

    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        settings, times = {}, 1.0
        if shown is not None:
            settings["sel"] = faiss.IDSelectorBitmap(np.packbits(shown, bitorder="little"))
            times = 1 / shown.mean()  # what may not be returned is looked at all the same
        parameters = _parameters(self._index, times * self.effort, times * k, settings)
        near, places = self._index.search(vectors, k, params=parameters)
        return near, places

    def tune(self, queries: np.ndarray | Tensor, *, recall: float = 0.99, k: int = 10) -> float:
        """The smallest ``effort`` whose share of the exact best ``k`` reaches ``recall`` on these queries.

        That of more labels is lower: a graph by inner product has few ways to labels of small norm.

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


def _parameters(index: Any, effort: float, found: float, settings: dict[str, Any]) -> Any:
    """Of a search; a graph must look at as many nodes as are to be found, or finds few of them."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, effort, found, settings))
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(index.base_index, effort, found, settings)
        return faiss.IndexRefineSearchParameters(base_index_params=base)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=math.ceil(max(effort, found)), **settings)
    if isinstance(index, faiss.IndexIVF):
        kind = faiss.IVFPQSearchParameters if isinstance(index, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(nprobe=math.ceil(effort), **settings)
    return faiss.SearchParameters(**settings)
