"""Candidates from int8 codes in inverted lists, which FAISS can read from a file mapped into memory."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import faiss
import numpy as np
from torch import Tensor

from hf_xmc.search import faiss_lists
from hf_xmc.search.candidates import Candidates, Change, checked_count
from hf_xmc.search.equal_rows import fingerprint
from hf_xmc.search.faiss_factory import TooFewLabels
from hf_xmc.search.faiss_lists import (
    centroids_of,
    empty,
    in_memory,
    lists_by_norm,
    multiple,
    norm_limits,
    norms_of,
    on_disk,
    padded,
    stored_lists,
    visited,
)

logger = logging.getLogger(__name__)

INT8 = re.compile(r"(?:IVF([1-9]\d{0,8}),)?Int8")
_MOST = 127  # absolute value of a code
_AT_ONCE = 65536  # vectors that are encoded together
_SAMPLE, _ITERATIONS = 64, 10  # of k-means: vectors per list
_Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_FIRST = 32  # of the lists of descending norms, this part is visited first, and then twice as many


class CodeCandidates(Candidates):
    """Candidates that are scored by int8 codes; arguments as in :class:`hf_xmc.FaissIndex`.

    A code is a vector times one factor, rounded to whole numbers. So is the query, and FAISS multiplies whole numbers.
    ``error`` bounds what the rounding hides.

    With ``"Int8"``, lists hold vectors of similar norms, the largest first. No inner product exceeds the product of
    the norms, so a search stops at the first list that cannot hold a candidate, even if it may visit every list.
    Otherwise codes lie in lists around the centres of k-means. The search is exact if it may visit every list.

    Attributes:
        built: ``factory``, or ``"Int8"`` if there are too few labels for its lists.
    """

    def __init__(self, factory: str, effort: int) -> None:
        self.factory, self.effort, self.built = factory, checked_count("effort", effort), factory
        self.index: Any = None  # of FAISS
        self._norms: np.ndarray | None = None  # largest norm of each list, if lists are visited by norm
        self._scale = self._error = self._reach = 1.0

    def __getstate__(self) -> dict[str, Any]:  # another process gets the codes, not the name of their file
        return {**self.__dict__, "index": None if self.index is None else in_memory(self.index)}

    @property
    def num_places(self) -> int:
        return int(self.index.ntotal)

    @property
    def scans(self) -> bool:
        """Whether every search finds the codes of all labels that can be among the best."""
        return bool(self.effort >= self.index.nlist)

    @property
    def error(self) -> float | None:  # type: ignore[override]
        return self._error if self.scans else None

    def build(self, vectors: np.ndarray, embeddings: Tensor) -> None:
        num_lists, built = lists_of(self.factory), self.factory
        if len(vectors) < num_lists:
            message = f"`factory` {self.factory!r} needs {num_lists} different labels, and there are {len(vectors)}. "
            if self.index is None and len(vectors):
                raise TooFewLabels(f"{message}Write a smaller number, or 'Int8'.")
            if self.built == self.factory and self.index is not None:
                logger.info("%sAll codes are scanned until there are more.", message)
            num_lists, built = 1, "Int8"
        norms = norm_limits(vectors) if num_lists == 1 else None
        centroids = _centres(vectors, num_lists) if norms is None else np.zeros((len(norms), vectors.shape[1]))
        index = empty(padded(centroids))
        peak = float(np.abs(vectors).max(initial=0)) or 1.0
        scale = _MOST / peak
        error, reach = _fill(index, vectors, scale, 0, norms)
        self.index, self.built, self._norms = index, built, norms
        self._scale, self._error, self._reach = scale, error, reach

    def update(self, change: Change) -> bool:
        """Add vectors, unless most places are unused, or the factor of the codes is too large for a new vector."""
        num_places = self.num_places + len(change.added_rows)
        if num_places > 2 * change.num_used or (self.built != self.factory and len(change.added_rows)):
            return False
        if len(change.added_rows):
            vectors = change.added_vectors()
            if np.abs(vectors).max() * self._scale > _MOST + 0.5:
                return False
            index, norms = in_memory(self.index), self._norms
            if norms is not None:
                norms = np.append(max(norms[0], norms_of(vectors).max()), norms[1:])
            error, reach = _fill(index, vectors, self._scale, self.num_places, norms)
            self._norms = norms
            self.index, self._error, self._reach = index, max(error, self._error), max(reach, self._reach)
        return True

    def nearest(self, queries: np.ndarray, k: int, visible: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        chosen = {} if visible is None else {"sel": faiss.IDSelectorBitmap(np.packbits(visible, bitorder="little"))}
        scale = np.abs(queries).max(axis=1, keepdims=True)
        scale = np.where(scale > 0, scale, np.float32(1)) / np.float32(_MOST)
        whole = np.rint(queries / scale)
        # The rounding of the query is allowed for here, that of the vectors in `error`.
        allowed = np.linalg.norm(queries - whole * scale, axis=1, keepdims=True) * self._reach
        scale = scale / np.float32(self._scale)
        more = 1.0 if visible is None else len(visible) / max(1, int(visible.sum()))  # hidden codes are visited, too
        lists = self.index.nlist if self.scans else min(math.ceil(more * self.effort), self.index.nlist)
        if self._norms is not None:

            def search(lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                near, places = visited(self.index, padded(whole), k, lists, chosen)
                return np.where(places < 0, -np.inf, near * scale + allowed), places

            return self._by_norm(search, np.linalg.norm(queries, axis=1), self._norms[:lists], k)
        parameters = faiss.SearchParametersIVF(nprobe=lists, **chosen)
        near, places = self.index.search(padded(whole), k, params=parameters)
        return near * scale + allowed, places

    def _by_norm(
        self, search: _Search, norms: np.ndarray, largest: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Visit lists of descending norms until no other can hold a score above that of the last candidate."""
        near, places = np.empty((len(norms), 0), np.float32), np.empty((len(norms), 0), np.int64)
        start, needed = 0, np.full(len(norms), len(largest))
        while start < (most := int(needed.max(initial=0))):
            stop = min(most, max(2 * start, -(-len(largest) // _FIRST)))
            lists = np.arange(start, stop)
            new, new_places = search(np.where(lists < needed[:, None], lists, -1))
            near, places = np.concatenate([near, new], axis=1), np.concatenate([places, new_places], axis=1)
            order = np.argsort(-near, axis=1, kind="stable")[:, :k]
            near, places = np.take_along_axis(near, order, 1), np.take_along_axis(places, order, 1)
            least = near[:, -1] / np.maximum(norms, np.finfo(np.float32).tiny) + self._error
            start, needed = stop, np.searchsorted(-largest, -least)
        return near, places

    def state(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """Return the codes and lists as tables, for :meth:`restore`; ``vectors`` (P, D) are those of all places."""
        codes, sizes = stored_lists(self.index)
        return {
            "codes": codes,
            **({"centroids": centroids_of(self.index)} if self._norms is None else {"norms": self._norms}),
            "sizes": sizes,
            "numbers": np.array([self._scale, self._error, self._reach]),
            "vectors": np.frombuffer(fingerprint(vectors), dtype=np.uint8),
        }

    def restore(self, state: Mapping[str, np.ndarray], vectors: np.ndarray, embeddings: Tensor) -> None:
        """Use the tables of an index of the same vectors. Codes in an ``np.memmap`` stay in their file.

        Raises:
            ValueError: if the tables are invalid, or belong to other vectors.
        """
        self.restore_unchecked(state, vectors.shape)
        if _table(state, "vectors", np.uint8, (32,)).tobytes() != fingerprint(vectors):
            raise ValueError("the tables belong to other embeddings")

    def restore_unchecked(self, state: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
        """Use the tables of an index of ``shape`` (P, D), without a check that they belong to the embeddings.

        Raises:
            ValueError: if the tables are invalid.
        """
        size, width = shape[0], multiple(shape[1])
        num_lists, norms = lists_of(self.factory), None
        if num_lists == 1:
            num_lists = len(state.get("norms", ()))
            norms = _table(state, "norms", np.float64, (min(max(1, num_lists), 1 + size // faiss_lists.BY_NORM),))
            centroids = np.zeros((num_lists, width), np.float32)
            if (np.diff(norms) > 0).any() or not np.isfinite(norms).all():
                raise ValueError("`norms` must be finite and descending")
        else:
            centroids = _table(state, "centroids", np.float32, (num_lists, width))
        sizes = _table(state, "sizes", np.int64, (num_lists,))
        numbers = _table(state, "numbers", np.float64, (3,))
        codes = _table(state, "codes", np.uint8, (size * (width + 8),))
        if not (np.isfinite(centroids).all() and np.isfinite(numbers).all() and numbers[0] > 0):
            raise ValueError("`centroids` and `numbers` must be finite")
        if sizes.min(initial=0) < 0 or sizes.max(initial=0) > size or sizes.sum() != size:
            raise ValueError(f"`sizes` must be those of lists of {size} vectors")
        starts = np.append(0, (sizes * (width + 8)).cumsum())
        rows = np.asarray(codes)
        ids = [
            rows[start + count * width : stop].view(np.int64)
            for start, stop, count in zip(starts[:-1], starts[1:], sizes, strict=True)
        ]
        places = np.concatenate(ids)
        if places.min(initial=0) < 0 or places.max(initial=-1) >= size or (np.bincount(places) != 1).any():
            raise ValueError(f"`codes` must hold each place below {size} once")
        index = empty(centroids)
        if isinstance(codes, np.memmap):
            index.replace_invlists(on_disk(codes, width, sizes, starts), True)
        else:
            for number, (start, here) in enumerate(zip(starts, ids, strict=False)):
                part, own = rows[start : start + len(here) * width].copy(), here.copy()
                index.invlists.add_entries(number, len(own), faiss.swig_ptr(own), faiss.swig_ptr(part))
        index.ntotal = size
        self.index, self._norms, (self._scale, self._error, self._reach) = index, norms, numbers.tolist()


def stored_places(state: Mapping[str, np.ndarray], num_labels: int) -> np.ndarray:
    """Return the place of each label from the tables of an index, after a check that places are numbered in order.

    Raises:
        ValueError: if the table is missing, or the first labels of the places are not in ascending order.
    """
    places = _table(state, "places", np.int64, (num_labels,))
    highest = np.maximum.accumulate(places)
    if places.min(initial=0) < 0 or (np.diff(highest, prepend=-1) > 1).any():
        raise ValueError("`places` must number the distinct embeddings in the order of the labels")
    return places


def lists_of(factory: str) -> int:
    """Return the number of lists of a factory string that :data:`INT8` matches.

    >>> lists_of("IVF1024,Int8"), lists_of("Int8")
    (1024, 1)
    """
    found = INT8.fullmatch(factory)
    return int((found and found[1]) or 1)


def most_code_bytes(factory: str, num_labels: int, embedding_dim: int) -> int:
    """Return an upper bound of the size of the tables of ``num_labels`` vectors, in bytes.

    >>> most_code_bytes("Int8", 1000, 16)
    105616
    """
    width = multiple(embedding_dim)
    return 2**16 + num_labels * (width + 24) + lists_of(factory) * (4 * width + 16)


def _centres(vectors: np.ndarray, num_lists: int) -> np.ndarray:
    # Lists of neighbours, so by distance. They are visited by inner product, the score.
    means = faiss.Kmeans(
        vectors.shape[1],
        num_lists,
        niter=_ITERATIONS,
        seed=0,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLE,
    )
    means.train(vectors)
    return np.asarray(means.centroids)


def _fill(index: Any, vectors: np.ndarray, scale: float, first: int, norms: np.ndarray | None) -> tuple[float, float]:
    """Add codes from place ``first`` on. Return the largest rounding error, and the largest norm of a code.

    Lists are those of the nearest centroids, or of the norms, by :func:`hf_xmc.search.faiss_lists.lists_by_norm`.
    """
    nearest = faiss.IndexFlatL2(index.d)
    nearest.add(centroids_of(index))
    error = reach = 0.0
    for start in range(0, len(vectors), _AT_ONCE):
        part = padded(vectors[start : start + _AT_ONCE])
        by_norm = None if norms is None else lists_by_norm(norms, norms_of(part), start)
        lists = nearest.search(part, 1)[1][:, 0] if by_norm is None else by_norm
        whole = np.rint(part * np.float32(scale)).clip(-_MOST, _MOST)
        error = max(error, float(np.linalg.norm(part - whole / np.float32(scale), axis=1).max()))
        reach = max(reach, float(np.linalg.norm(whole, axis=1).max()) / scale)
        places = np.arange(first + start, first + start + len(part), dtype=np.int64)
        index.add_core(len(part), faiss.swig_ptr(whole), faiss.swig_ptr(places), faiss.swig_ptr(lists), None)
    return error * (1 + 1e-5), reach * (1 + 1e-5)


def _table(state: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    table = state.get(name)
    if table is None or table.dtype != dtype or table.shape != shape:
        raise ValueError(f"`{name}` must be a table of {np.dtype(dtype)} with shape {shape}")
    return table
