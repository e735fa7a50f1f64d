"""Approximate search with FAISS, whose candidates the stored embeddings rank in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import faiss
import numpy as np
from torch import Tensor

from hf_xmc.search.approximate import ApproximateIndex
from hf_xmc.search.candidates import Candidates, Change, checked_count, vectors_of
from hf_xmc.search.equal_rows import Groups
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.faiss_codes import INT8, CodeCandidates, lists_of, stored_places
from hf_xmc.search.faiss_factory import (
    GRAPHS,
    MOST,
    TooFewLabels,
    default_factory,
    inner_of,
    made_of,
    search,
    untrained,
)
from hf_xmc.search.faiss_tables import FACTORY, restore, tables_of
from hf_xmc.search.stored_rows import StoredRows
from hf_xmc.topk import recall_of

logger = logging.getLogger(__name__)

_EFFORTS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # that `tune` tries
_ALL = 2**16  # lists
_DECODED_AT_ONCE = 4096


class FaissCandidates(Candidates):
    """Candidates from a FAISS index; arguments as in :class:`FaissIndex`.

    Attributes:
        built: Factory string of the current FAISS index: ``factory``, or ``"Flat"`` if there are too few labels for it.
    """

    def __init__(self, factory: str, effort: int) -> None:
        self.factory, self.effort, self.built = factory, checked_count("effort", effort), factory
        self.index: Any = None  # of FAISS

    @property
    def num_places(self) -> int:
        return int(self.index.ntotal)

    @property
    def scans(self) -> bool:
        """Whether every search looks at the codes of all labels."""
        return self.error is not None

    def build(self, vectors: np.ndarray, embeddings: Tensor) -> None:
        self._build(vectors, made_of)

    def restore(self, state: Mapping[str, np.ndarray], vectors: np.ndarray, embeddings: Tensor) -> None:
        """Build from the tables of an index of the same vectors.

        Raises:
            ValueError: if the tables are invalid, or if they belong to another index.
        """
        self._build(vectors, partial(_restored, state=state))

    def _build(self, vectors: np.ndarray, make: Callable[[str, np.ndarray], Any]) -> None:
        first, built = self.index is None, self.factory
        if first and not len(vectors):
            untrained(self.factory, MOST, vectors.shape[1])  # refuses a factory string that never works
        try:
            if not len(vectors):
                raise TooFewLabels("The index has no labels.")
            index = make(built, vectors)
        except ValueError as error:
            if first and len(vectors):
                raise
            if not first and self.built == self.factory:
                logger.info("%s All labels are scanned until there are more.", error)
            built = "Flat"
            index = made_of(built, vectors)
        worst = None
        if isinstance(faiss.downcast_index(index), (faiss.IndexFlat, faiss.IndexScalarQuantizer)):  # scans all codes
            starts = range(0, len(vectors), _DECODED_AT_ONCE)
            errors = [
                np.linalg.norm(part - index.reconstruct_n(start, len(part)), axis=1).max()
                for start in starts
                for part in [vectors[start : start + _DECODED_AT_ONCE]]
            ]
            worst = 1.001 * float(max(errors, default=0.0))  # the factor covers the rounding of float32
        self.index, self.error, self.built = index, worst, built
        self.is_graph = isinstance(inner_of(index), GRAPHS)

    def update(self, change: Change) -> bool:
        """Add vectors, unless the index must be built again.

        This happens when most places are unused, or if vectors are added to an index that cannot take them: NSG graphs,
        codes whose range was chosen for the previous labels, and the replacement for too few labels.
        """
        num_places = self.num_places + len(change.added_rows)
        fixed = self.scans or self.built != self.factory or isinstance(inner_of(self.index), faiss.IndexNSG)
        if num_places > 2 * change.num_used or (fixed and len(change.added_rows)):
            return False
        if len(change.added_rows):
            self.index.add(change.added_vectors())
        return True

    def nearest(self, queries: np.ndarray, k: int, visible: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return search(self.index, queries, k, self.effort, visible)


class FaissIndex(ApproximateIndex):
    """Approximate search with FAISS: ``effort`` is ``efSearch`` or ``nprobe``, and ``refine`` is ``k_factor``.

    FAISS finds candidates, and the stored embeddings rank them in float32. If so many labels are removed that too few
    remain for the factory string, all labels are scanned until there are enough again.

    Args:
        embeddings: ``(L, D)``, as in :class:`hf_xmc.LabelIndex`.
        factory: ``"Int8"`` or ``"IVF1024,Int8"`` for int8 codes that a saved model keeps in a file mapped into memory;
            or a factory string of FAISS, such as ``"HNSW32"``, ``"IVF1024,SQ8"`` or ``"PCAR64,IVF1024,PQ32"``. By
            default :func:`hf_xmc.search.faiss_factory.default_factory` chooses. With scanned codes (``"Int8"``,
            ``"SQ8"``, ``"SQfp16"``, or all lists of ``Int8``) the results are those of exact search: candidates are
            added until the error of the codes cannot hide a better label. ``"Int8"`` visits large norms first, and
            stops at norms that are too small for a better label.
        effort: Number of graph nodes (``efSearch``) or inverted lists (``nprobe``) to visit, by default 64. The lists
            of ``"Int8"`` hold 8,192 labels of similar norms each, and all may be visited by default. It is raised if
            labels are hidden. :meth:`tune` chooses it.
        refine: Number of candidates per requested label (``k_factor``).

    Raises:
        ValueError: if :class:`LabelIndex` refuses the embeddings, if FAISS cannot build ``factory`` for inner products
            and this number of labels and dimensions, or if ``effort`` or ``refine`` is not a whole number of at least
            1.

    >>> labels = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    >>> index = FaissIndex(labels, "HNSW16", effort=64)  # efSearch
    >>> index.search(labels[:1], 3).label_ids.shape
    (1, 3)
    """

    candidates: FaissCandidates | CodeCandidates

    def __init__(
        self,
        embeddings: np.ndarray | Tensor,
        factory: str | None = None,
        *,
        effort: int | None = None,
        refine: int = 4,
    ) -> None:
        if not (factory is None or isinstance(factory, str)):
            raise ValueError(f"`factory` must be a factory string of FAISS, such as 'HNSW32', got {factory!r}.")
        if factory is None:
            factory = default_factory(len(embeddings))
            logger.info("%d labels are indexed with %r, the default for this number.", len(embeddings), factory)
        super().__init__(embeddings, _candidates(factory, effort), refine=refine)

    @classmethod
    def from_state(
        cls,
        embeddings: np.ndarray | Tensor,
        factory: str,
        state: Mapping[str, np.ndarray],
        *,
        effort: int | None = None,
        refine: int = 4,
        stored_rows: StoredRows | None = None,
        check: bool = True,
    ) -> FaissIndex:
        """Restore an index of the same embeddings from its graph or inverted lists.

        Args:
            embeddings: The embeddings that the state was saved with, in the same order.
            factory: The factory string that the state was saved with.
            state: The tables that :meth:`state` returned.
            effort, refine: As in the class.
            stored_rows: The same embeddings in a file, from which candidates are read until labels change. By default
                they are taken from ``embeddings``.
            check: Whether to read all embeddings, to check that they are finite and that the tables belong to them.
                Only ``"Int8"`` and its lists can leave this out.

        Raises:
            ValueError: if the tables are invalid, or if they belong to other embeddings or to another factory string.
        """
        index, candidates = cls.__new__(cls), _candidates(factory, effort)
        if check or isinstance(candidates, FaissCandidates):
            index._start(embeddings, candidates, refine, partial(candidates.restore, state))
        else:
            places = stored_places(state, len(embeddings))
            groups = Groups(places, int(places.max(initial=-1)) + 1)
            candidates.restore_unchecked(state, (len(groups), embeddings.shape[1]))
            index._start_unchecked(embeddings, candidates, refine, groups)
        index._stored_rows = stored_rows
        return index

    @property
    def factory(self) -> str:
        """The factory string."""
        return self.candidates.factory

    @property
    def built(self) -> str:
        """The factory string of the current FAISS index; ``"Flat"`` if there are too few labels for ``factory``."""
        return self.candidates.built

    @property
    def effort(self) -> int:
        """The number of graph nodes (``efSearch``) or inverted lists (``nprobe``) to visit."""
        return self.candidates.effort

    @effort.setter
    def effort(self, effort: int) -> None:
        self.candidates.effort = checked_count("effort", effort)

    @property
    def scans(self) -> bool:
        """Whether every search looks at the codes of all labels."""
        return self.candidates.scans

    def state(self) -> dict[str, np.ndarray]:
        """Return graph, inverted lists or ``Int8`` codes as tables, for :meth:`from_state`; empty for other codes.

        The index is built again first if labels were removed or moved.
        """
        codes = isinstance(self.candidates, CodeCandidates) and self.num_labels > 0
        if not codes and FACTORY.fullmatch(self.built) is None:
            return {}
        distinct = self._groups.first[self._groups.size > 0]
        if len(distinct) < self.candidates.num_places or (np.diff(distinct) < 0).any():
            self._rebuild()
        vectors = vectors_of(self.embeddings, self._groups.first)
        if isinstance(self.candidates, CodeCandidates):
            return {**self.candidates.state(vectors), "places": self._groups.place_of.astype(np.int64)}
        return tables_of(self.candidates.index, vectors)

    def tune(self, queries: np.ndarray | Tensor, *, recall: float = 0.99, k: int = 10) -> float:
        """Choose the smallest ``effort`` whose :func:`hf_xmc.topk.recall_of` the best ``k`` labels reaches ``recall``.

        The recall of more labels is lower, because a graph has few links to labels of small norm.

        Args:
            queries: ``(N, D)``, at least one.
            recall: Recall to reach.
            k: Number of labels.

        Returns:
            The recall that was reached, with the largest effort if none is enough.

        Raises:
            ValueError: if there is no query. The effort is unchanged after any error.
        """
        if not len(queries):
            raise ValueError("`queries` must hold at least one query to tune on, got none.")
        exact = LabelIndex(self.embeddings).search(queries, k)
        reached, before = 0.0, self.effort
        try:
            for effort in _EFFORTS:
                self.effort = effort
                reached = recall_of(self.search(queries, k), exact)
                if reached >= recall:
                    break
        except BaseException:
            self.effort = before
            raise
        return reached


def _candidates(factory: str, effort: int | None) -> FaissCandidates | CodeCandidates:
    codes = INT8.fullmatch(factory)
    if effort is None:
        effort = _ALL if codes and lists_of(factory) == 1 else 64
    return (CodeCandidates if codes else FaissCandidates)(factory, effort)


def _restored(factory: str, vectors: np.ndarray, state: Mapping[str, np.ndarray]) -> Any:
    index = untrained(factory, *vectors.shape)
    restore(index, vectors, state)
    return index
