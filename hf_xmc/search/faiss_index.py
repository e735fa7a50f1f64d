"""Faster search with FAISS: it proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
from torch import Tensor

from hf_xmc.search.approximate import ProposingIndex, checked_count, vectors_of
from hf_xmc.search.equal_rows import Groups
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.faiss_factory import GRAPHS, MOST, TooFewLabels, inner_of, made_of, search, untrained
from hf_xmc.search.faiss_tables import FACTORY, restore, state_of
from hf_xmc.topk import recall_of

logger = logging.getLogger(__name__)

EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def default_factory(num_labels: int) -> str:
    """Return the factory string for a number of labels: scanned int8 codes, a graph, or inverted lists of int8 codes.

    >>> default_factory(19_000), default_factory(131_000), default_factory(5_000_000)
    ('SQ8', 'HNSW32', 'IVF8192,SQ8')
    """
    if num_labels <= 50_000:
        return "SQ8"
    return "HNSW32" if num_labels <= 2_000_000 else f"IVF{2 ** round(np.log2(4 * num_labels**0.5))},SQ8"


class FaissIndex(ProposingIndex):
    """A label index that looks at some of the labels only, or at codes of them.

    If labels go, and too few are left for the factory string, all that are left are scanned, until there are more.

    Args:
        embeddings: as in :class:`LabelIndex`; they rank what is proposed, so that scores are exact.
        factory: a factory string of FAISS for as many dimensions as the embeddings have, such as ``"HNSW32"``,
            ``"IVF1024,SQ8"`` or ``"PCAR64,IVF1024,PQ32"``; by default :func:`default_factory`. Of codes that are all
            scanned (``"SQ8"``, ``"SQfp16"``) the result is that of exact search: more are proposed until their error
            can hide nothing.
        effort: lists or graph nodes that are looked at (``nprobe``, ``efSearch``); more if labels are hidden. See
            :meth:`tune`.
        refine: labels proposed for each that is wanted.
        state: the tables that :meth:`state` gave of an index of these embeddings, which are then not built again.

    Raises:
        ValueError: if :class:`LabelIndex` refuses the embeddings, FAISS cannot build ``factory`` for inner products of
            so many labels and dimensions, ``effort`` or ``refine`` is below 1, or ``state`` is of another index.
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
        if not (factory is None or isinstance(factory, str)):
            raise ValueError(f"`factory` must be a factory string of FAISS, such as 'HNSW32', got {factory!r}.")
        self.factory = default_factory(len(embeddings)) if factory is None else factory
        self.effort = checked_count("effort", effort)
        self._state = state
        self._index: Any = None
        self.built = self.factory  # or what stands in for it
        super().__init__(embeddings, refine)
        if not self.num_labels:
            untrained(self.factory, MOST, self.embedding_dim)  # which refuses what can never be built

    def _fill(self, vectors: np.ndarray) -> None:
        built = self.factory
        try:
            if not len(vectors):
                raise TooFewLabels("There is no label.")
            index = _built(built, vectors, self._state)
        except ValueError as error:
            if self._index is None and len(vectors):
                raise
            if self._index is not None and self.built == self.factory:
                logger.warning("%s All labels are scanned until there are more.", error)
            built = "Flat"
            index = _built(built, vectors, None)
        worst = 0.0
        if _scans(index):
            codes = (index.reconstruct_n(at, min(4096, len(vectors) - at)) for at in range(0, len(vectors), 4096))
            errors = (
                np.linalg.norm(vectors[4096 * n : 4096 * (n + 1)] - part, axis=1).max() for n, part in enumerate(codes)
            )
            worst = 1.001 * float(max(errors, default=0.0))  # and a little for the rounding of float32
        self._index, self._error, self.built, self._state = index, worst, built, None

    def _update(self, vectors: np.ndarray, gone: np.ndarray) -> None:
        if len(vectors):
            self._index.add(vectors)

    @property
    def _num_places(self) -> int:
        return int(self._index.ntotal)

    def _renews(self, num_new: int, num_used: int, num_distinct: int) -> bool:
        """Fill again once more places are empty than not, and to add what cannot be added to: a graph of FAISS's NSG,
        and codes whose range is that of the labels they were made for."""
        fixed = self.scans or self.built != self.factory or isinstance(inner_of(self._index), faiss.IndexNSG)
        return num_used > 2 * num_distinct or (num_new > 0 and fixed)

    def _better_scored(self, wanted: int, visible: int) -> bool:
        graph = isinstance(inner_of(self._index), GRAPHS)
        nodes = self.refine if graph else 1  # that are walked to, one after the other, for each that is wanted
        return super()._better_scored(wanted * nodes, visible)

    def state(self) -> dict[str, np.ndarray]:
        """Return what takes long to build: a graph or lists, as tables; none if all labels are looked at.

        An index that labels went from is built again first.
        """
        if FACTORY.fullmatch(self.built) is None:
            return {}
        distinct = self._groups.first[self._groups.size > 0]
        if len(distinct) < self._num_places or (np.diff(distinct) < 0).any():
            first = self._groups.first[self._groups.place_of]
            self._groups = self._filled(self.embeddings, first)
        return state_of(self._index, vectors_of(self.embeddings, self._groups.first))

    @property
    def scans(self) -> bool:
        """Whether a search looks at every label."""
        return _scans(self._index)

    def _rank(
        self, queries: Tensor, k: int, proposed: int, shown: np.ndarray | None, groups: Groups, pairs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        while True:
            best_ids, best, last = super()._rank(queries, k, proposed, shown, groups, pairs)
            # Whatever was not proposed has a code no better than the last one's, and is better by the error at most.
            hides = last + self._error * np.linalg.norm(queries.numpy(), axis=1) >= best[:, -1]
            if not self.scans or proposed >= self._num_places or not (hides & np.isfinite(last)).any():
                return best_ids, best, last
            proposed *= 4

    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return search(self._index, vectors, k, self.effort, shown)

    def tune(self, queries: np.ndarray | Tensor, *, recall: float = 0.99, k: int = 10) -> float:
        """Choose the smallest ``effort`` with which :func:`recall_of` the best ``k`` reaches ``recall`` here.

        That of more labels is lower: a graph by inner product has few ways to labels of small norm.

        Returns the recall reached, which is that of the largest effort if none is enough.

        Raises:
            ValueError: if there is no query. The effort is then as before, as after any error.
        """
        if not len(queries):
            raise ValueError("`queries` must hold at least one query to tune on, got none.")
        exact = LabelIndex(self.embeddings).search(queries, k)
        reached, before = 0.0, self.effort
        try:
            for effort in EFFORTS:
                self.effort = effort
                reached = recall_of(self.search(queries, k), exact)
                if reached >= recall:
                    break
        except BaseException:
            self.effort = before
            raise
        return reached


def _built(factory: str, vectors: np.ndarray, state: Mapping[str, np.ndarray] | None) -> Any:
    if state is None:
        return made_of(factory, vectors)
    index = untrained(factory, *vectors.shape)
    restore(index, vectors, state)
    return index


def _scans(index: Any) -> bool:
    return isinstance(faiss.downcast_index(index), (faiss.IndexFlat, faiss.IndexScalarQuantizer))
