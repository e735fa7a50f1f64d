"""Inverted lists of int8 codes, in memory or in a mapped file."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

BY_NORM = 8192  # vectors of similar norms per list
_MULTIPLE = 16  # dimensions that FAISS multiplies at a time
_KIND = faiss.ScalarQuantizer.QT_8bit_direct_signed


def multiple(dim: int) -> int:
    """Return the number of dimensions of the codes of ``dim`` dimensions."""
    return -(-dim // _MULTIPLE) * _MULTIPLE


def padded(vectors: np.ndarray) -> np.ndarray:
    """Return vectors with zeros up to the dimensions of their codes."""
    missing = multiple(vectors.shape[1]) - vectors.shape[1]
    return np.ascontiguousarray(np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors, dtype=np.float32)


def norms_of(vectors: np.ndarray) -> np.ndarray:
    """Return norms ``(N,)``, rounded up."""
    norms: np.ndarray = np.linalg.norm(vectors, axis=1).astype(np.float64) * (1 + 1e-5)
    return norms


def norm_limits(vectors: np.ndarray) -> np.ndarray:
    """Return the largest norm of each list of vectors with similar norms, in descending order."""
    return np.append(np.sort(norms_of(vectors))[::-1][::BY_NORM], [] if len(vectors) else 0.0)


def lists_by_norm(limits: np.ndarray, norms: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the last list whose largest norm suffices for each norm.

    If several lists have this norm as their largest, vectors take turns, so that unit norms fill all lists evenly.

    Args:
        limits: The largest norm of each list, from :func:`norm_limits`.
        norms: ``(N,)``, the norms of vectors.
        first: Number of the first vector.

    >>> lists_by_norm(np.array([2.0, 1.0, 1.0]), np.array([2.0, 1.5, 1.0, 1.0, 0.5]))
    array([0, 0, 1, 2, 2])
    """
    lists, stop = (np.searchsorted(-limits, -norms, side=side) for side in ("left", "right"))
    equal = stop - lists  # number of lists whose largest norm is this one
    turns = (first + np.arange(len(norms))) % np.maximum(equal, 1)
    return np.where(equal > 1, lists + turns, stop - 1)


def empty(centroids: np.ndarray) -> Any:
    """Return an index of FAISS with an empty list for each centroid."""
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    quantizer.add(centroids)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, centroids.shape[1], len(centroids), _KIND, faiss.METRIC_INNER_PRODUCT, False
    )
    index.own_fields = True
    quantizer.this.disown()
    index.is_trained = True
    return index


def centroids_of(index: Any) -> np.ndarray:
    """Return the centroids of the lists of an index."""
    centroids: np.ndarray = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
    return centroids


def visited(
    index: Any, queries: np.ndarray, k: int, lists: np.ndarray, chosen: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return inner products and ids of the best ``k`` codes in the given lists, padded with -1.

    Args:
        index: The index.
        queries: ``(B, D)`` float32.
        k: Number of codes.
        lists: ``(B, m)``, the lists to visit; -1 for none.
        chosen: Further search parameters.
    """
    lists = np.ascontiguousarray(lists, dtype=np.int64)
    unused = np.zeros(lists.shape, np.float32)  # distances to centroids
    near, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    tables = [faiss.swig_ptr(table) for table in (lists, unused, near, ids)]
    parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1], **chosen)
    # The Python version of `search_preassigned` takes no parameters.
    index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *tables, False, parameters)
    return near, ids


def stored_lists(index: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of all lists, each with its codes, and then its ids; and the size of each list."""
    inverted, width = index.invlists, index.d
    sizes = np.array([inverted.list_size(number) for number in range(index.nlist)], dtype=np.int64)
    codes = np.empty(int(sizes.sum()) * (width + 8), dtype=np.uint8)
    start = 0
    for number, size in enumerate(sizes.tolist()):
        if size:
            codes[start : start + size * width] = faiss.rev_swig_ptr(inverted.get_codes(number), size * width)
            start += size * width
            codes[start : start + size * 8] = faiss.rev_swig_ptr(inverted.get_ids(number), size).view(np.uint8)
            start += size * 8
    return codes, sizes


def on_disk(codes: np.memmap, width: int, sizes: np.ndarray, starts: np.ndarray) -> Any:
    """Return the lists of :func:`stored_lists`, whose bytes stay in a mapped file."""
    inverted = faiss.OnDiskInvertedLists()
    inverted.nlist, inverted.code_size, inverted.filename = len(sizes), width, str(codes.filename)
    inverted.read_only, inverted.prefetch_nthread = True, 0
    inverted.totsize = codes.offset + codes.nbytes
    inverted.lists.clear()
    for size, start in zip(sizes.tolist(), starts.tolist(), strict=False):
        one = faiss.OnDiskOneList()
        one.size, one.capacity, one.offset = size, size, codes.offset + start
        inverted.lists.push_back(one)
    inverted.do_mmap()
    inverted.this.disown()
    return inverted


def in_memory(index: Any) -> Any:
    """Return an index whose lists can grow."""
    if isinstance(faiss.downcast_InvertedLists(index.invlists), faiss.ArrayInvertedLists):
        return index
    other = empty(centroids_of(index))
    for number in range(index.nlist):
        if size := index.invlists.list_size(number):
            lists = index.invlists
            other.invlists.add_entries(number, size, lists.get_ids(number), lists.get_codes(number))
    other.ntotal = index.ntotal
    return other
