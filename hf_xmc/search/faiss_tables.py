"""Store the graph of a FAISS index, or the inverted list of each vector, as plain tables, and restore it.

FAISS trusts the files that it reads: a link beyond the last node reads beyond the end of memory. So this package never
reads FAISS files. It checks the tables, and copies them into an index that it has built itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np

from hf_xmc.search.equal_rows import fingerprint
from hf_xmc.search.faiss_codes import INT8, lists_of, most_code_bytes
from hf_xmc.search.faiss_factory import MOST_LINKS, inner_of, transformed

_NUMBER = r"([1-9]\d{0,8})"
_SCALARS = r"Flat|SQ4|SQ6|SQ8|SQfp16|SQbf16"
_CODES = rf"(?:{_SCALARS}|PQ{_NUMBER}(?:x4)?)"
FACTORY = re.compile(rf"(?:PCAR?{_NUMBER},)?(?:(?:IVF{_NUMBER},)?{_CODES}|HNSW{_NUMBER}(?:[_,](?:{_SCALARS}))?)")
LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)


def checked_settings(settings: Any, num_labels: int, embedding_dim: int) -> dict[str, Any]:
    """Return ``factory``, ``effort`` and ``refine`` from a file, if the memory of such an index has a known bound.

    Raises:
        ValueError: if a setting is missing or out of range, or if the memory of the index has no known bound.
    """
    settings = settings if isinstance(settings, dict) else {}
    factory, effort, refine = (settings.get(name) for name in ("factory", "effort", "refine"))
    if not all(type(number) is int and 0 < number <= 2**16 for number in (effort, refine)):
        raise ValueError(f"`effort` and `refine` must be integers from 1 to 65536, got {effort!r} and {refine!r}")
    most_bytes(str(factory), num_labels, embedding_dim)
    return {"factory": factory, "effort": effort, "refine": refine}


def most_bytes(factory: str, num_labels: int, embedding_dim: int) -> int:
    """Return an upper bound of the size of the tables of an index of ``num_labels`` vectors, in bytes.

    Bounds are known for codes (``Flat``, ``SQ8``, ``PQ16``), ``IVF1024,`` with codes, and ``HNSW32``, each optionally
    after ``PCA32,`` or ``PCAR32,``; and for ``Int8`` and its lists.

    Raises:
        ValueError: if no bound is known.
    """
    if INT8.fullmatch(factory) and lists_of(factory) <= num_labels:
        return most_code_bytes(factory, num_labels, embedding_dim)
    found = FACTORY.fullmatch(factory)
    reduced, lists, _, links = (int(number or 0) for number in found.groups()) if found else (0, 0, 0, 0)
    if not found or reduced > embedding_dim or lists > num_labels or links > MOST_LINKS or links == 1:
        raise ValueError(
            f"refusing to build the index {factory!r} of {num_labels} labels that a file requests, because its memory "
            "use has no known bound"
        )
    # A node has 2 M links, and M more on each higher level. One node in M is on the next level.
    return 2**16 + 4 * num_labels * (1 + 4 * links) + 4 * lists * (embedding_dim + 1)


def tables_of(index: Any, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tables of an index of ``vectors``, for :func:`restore`; empty for an index without graph or lists.

    The table ``metric`` (2,) holds the metric and the dimension, and ``vectors`` (32,) the SHA-256 of the vectors. A
    graph has ``levels`` (N,), the ``entry_point``, and the ``neighbors`` of one node after the other, padded with -1.
    Inverted lists have ``centroids`` (nlist, D), and ``lists`` (N,) with the list of each vector.
    """
    inner = inner_of(index)
    metric = np.array([inner.metric_type, inner.d], dtype=np.int32)
    if isinstance(inner, faiss.IndexHNSW):
        graph = inner.hnsw
        tables = {name: faiss.vector_to_array(getattr(graph, name)) for name in ("levels", "neighbors")}
        entry_point = np.array([graph.entry_point], dtype=np.int32)
        return {**tables, "entry_point": entry_point, "metric": metric, "vectors": _digest(vectors)}
    if isinstance(inner, LISTS):
        lists = np.empty(inner.ntotal, dtype=np.int32)
        for number in range(inner.nlist):
            if size := inner.invlists.list_size(number):
                lists[faiss.rev_swig_ptr(inner.invlists.get_ids(number), size)] = number
        centroids = inner.quantizer.reconstruct_n(0, inner.nlist)
        return {"centroids": centroids, "lists": lists, "metric": metric, "vectors": _digest(vectors)}
    return {}


def restore(index: Any, vectors: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
    """Fill a new index with ``vectors`` (N, D), using the tables from :func:`tables_of`.

    Raises:
        ValueError: if the tables are invalid, or belong to other vectors or to another kind of index.
    """
    inner = inner_of(index)
    if list(_table(state, "metric", np.int32, (2,))) != [inner.metric_type, inner.d]:
        raise ValueError("the tables belong to an index of another metric or dimension")
    if isinstance(inner, faiss.IndexHNSW):
        graph = inner.hnsw
        levels, offsets, neighbors, entry_point = _checked_graph(graph, len(vectors), state)
        _check_vectors(state, vectors)
        index.train(vectors)
        inner.storage.add(transformed(index, vectors))
        faiss.copy_array_to_vector(levels, graph.levels)
        faiss.copy_array_to_vector(offsets, graph.offsets)
        faiss.copy_array_to_vector(neighbors, graph.neighbors)
        graph.entry_point, graph.max_level = entry_point, int(levels.max()) - 1
    elif isinstance(inner, LISTS):
        centroids = _table(state, "centroids", np.float32, (inner.nlist, inner.d))
        lists = _table(state, "lists", np.int32, (len(vectors),)).astype(np.int64)
        if not np.isfinite(centroids).all() or lists.min() < 0 or lists.max() >= inner.nlist:
            raise ValueError("`lists` must hold list numbers from 0 to nlist - 1, and `centroids` must be finite")
        _check_vectors(state, vectors)
        inner.quantizer.add(centroids)
        index.train(vectors)  # trains only the codes, because the lists are known
        rows = transformed(index, vectors)
        inner.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists), None)
    else:
        raise ValueError("this index has no graph or lists to restore")
    inner.ntotal = index.ntotal = len(vectors)


def _check_vectors(state: Mapping[str, np.ndarray], vectors: np.ndarray) -> None:
    if not np.array_equal(_table(state, "vectors", np.uint8, (32,)), _digest(vectors)):
        raise ValueError("the tables belong to other embeddings")


def _checked_graph(
    graph: Any, size: int, state: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    place = faiss.vector_to_array(graph.cum_nneighbor_per_level)  # offset of each level in the links of a node
    levels = _table(state, "levels", np.int32, (size,))
    if levels.min() < 1 or levels.max() >= len(place):
        raise ValueError(f"`levels` must be from 1 to {len(place) - 1}")
    offsets = np.append(0, place[levels].astype(np.int64).cumsum())
    neighbors = _table(state, "neighbors", np.int32, (int(offsets[-1]),))
    entry_point = int(_table(state, "entry_point", np.int32, (1,))[0])
    if neighbors.min() < -1 or neighbors.max() >= size or not 0 <= entry_point < size:
        raise ValueError(f"`neighbors` must be node numbers below {size} or -1, and `entry_point` must be a node")
    if levels[entry_point] != levels.max():
        raise ValueError("`entry_point` must be on the highest level")
    for level in range(1, int(levels.max())):
        slots = offsets[:-1][levels > level, None] + np.arange(place[level], place[level + 1])
        linked = neighbors[slots]
        if (levels[linked[linked >= 0]] <= level).any():
            raise ValueError("`neighbors` must be on the level of their link")
    return levels, offsets.astype(np.uint64), neighbors, entry_point


def _table(state: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    table = state.get(name)
    if table is None or table.dtype != dtype or table.shape != shape:
        raise ValueError(f"`{name}` must be a table of {np.dtype(dtype)} with shape {shape}")
    return np.ascontiguousarray(table)


def _digest(vectors: np.ndarray) -> np.ndarray:
    return np.frombuffer(fingerprint(vectors), dtype=np.uint8)
