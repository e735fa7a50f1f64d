"""Build and search FAISS indexes for inner products, given their factory strings."""

from __future__ import annotations

import math
import re
from typing import Any

import faiss
import numpy as np

MOST_LINKS = 256  # maximum number of links per node of a graph
MOST = 2**24  # maximum of any number in a factory string
GRAPHS = (faiss.IndexHNSW, faiss.IndexNSG)
INSTEAD = "write for example 'SQ8', 'HNSW32' or 'IVF64,SQ8'"
REFUSED = {
    r"L2norm|ITQ": "it changes the norms, on which inner products depend; leave it out, or write 'PCAR32'",
    r"LSH|Lattice": "it does not compare inner products; write 'SQ8', 'PQ8' or 'RaBitQ'",
    r"IMI|Residual|RCQ": "it finds lists by distances, but labels are found by inner products; write 'IVF1024_HNSW32'",
    r"PQ\d+\+\d+": "its refinement compares distances; write the first number alone",
    r"(HNSW|NSG)\w*[_,]\w*PQ": "it compares codes by distances, not by inner products; write 'HNSW32_SQ8'",
    r"IDMap": "labels are already numbered by their rows; leave it out",
    r"Refine|RFlat": "the stored embeddings already rank the candidates; leave it out",
    r"direct": "its codes are integers; write 'SQ8'",
    r"PQ\d+x4fsr": "FAISS does not support inner products with it; write 'fs'",
}
_TOO_FEW = re.compile(r"training points|graph smaller than")


SCANNED = 2_000_000  # labels whose codes are all scanned by default: the results stay exact


def default_factory(num_labels: int) -> str:
    """Return the default factory string for a number of labels: int8 codes, above two million in lists.

    Results from lists are approximate, and :meth:`hf_xmc.FaissIndex.tune` chooses how many are visited.

    >>> default_factory(1_300_000), default_factory(5_000_000)
    ('Int8', 'IVF2048,Int8')
    """
    return "Int8" if num_labels <= SCANNED else f"IVF{2 ** round(math.log2(num_labels**0.5))},Int8"


class TooFewLabels(ValueError):
    """A factory string needs more labels than the index has."""


def made_of(factory: str, vectors: np.ndarray) -> Any:
    """Return the FAISS index of ``vectors`` (N, D) for inner products.

    Raises:
        ValueError: if FAISS cannot build the index, or if it does not search by inner products. The message suggests
            another factory string.
        TooFewLabels: if there are too few vectors to train it.
    """
    index = untrained(factory, *vectors.shape)
    try:
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        if _TOO_FEW.search(str(error)):
            raise TooFewLabels(_refusal(factory, _reason(error), "write smaller numbers, or 'SQ8'")) from None
        if not str(error).startswith("Error in "):  # out of memory, for example
            raise
        raise ValueError(_refusal(factory, _reason(error), INSTEAD)) from None
    return index


def untrained(factory: str, num_vectors: int, dim: int) -> Any:
    """Return the FAISS index for inner products of ``num_vectors`` vectors, before it is trained.

    Raises:
        ValueError: if :func:`made_of` would raise it for the factory string.
        TooFewLabels: if the factory string needs more vectors.
    """
    for pattern, reason in REFUSED.items():
        if re.search(pattern, factory):
            raise ValueError(_refusal(factory, *reason.split("; ")))
    numbers = [int(number) for number in re.findall(r"\d+", factory)]
    links = [int(number) for number in re.findall(r"(?:HNSW|NSG)(\d+)", factory)]
    if min(numbers, default=1) < 1 or max(numbers, default=1) > MOST:
        raise ValueError(_refusal(factory, f"a number is not from 1 to {MOST}", INSTEAD))
    if not all(2 <= number <= MOST_LINKS for number in links):
        raise ValueError(_refusal(factory, f"a node of a graph has 2 to {MOST_LINKS} links", "write 'HNSW32'"))
    reduced = [int(number) for number in re.findall(r"PCA[RW]?(\d+)", factory)]
    if max(reduced, default=0) > dim:
        raise ValueError(_refusal(factory, f"embeddings have {dim} dimensions", f"write 'PCA{max(1, dim // 2)}'"))
    lists = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    codes = [2 ** min(int(bits), 64) for bits in re.findall(r"(?:PQ|RQ|LSQ)[\dx]*?\d+x(\d+)", factory)]
    codes += [256 for _ in re.findall(r"PQ\d+(?![\dx])", factory)]
    if (needed := max([*reduced, *lists, *codes], default=0)) > num_vectors:
        reason = f"it needs {needed} different labels, and there are {num_vectors}"
        raise TooFewLabels(_refusal(factory, reason, "write smaller numbers, or 'SQ8'"))
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        if "Error" not in str(error) and "could not parse" not in str(error):
            raise
        raise ValueError(_refusal(factory, _reason(error), _other(factory, dim))) from None
    inner = inner_of(index)
    if inner.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(_refusal(factory, "it compares distances, and labels are found by inner products", INSTEAD))
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # it takes most of the time, and only serves a filter that is not used
    if isinstance(inner, faiss.IndexIVF):
        coarse = faiss.downcast_index(inner.quantizer)
        if isinstance(coarse, faiss.IndexIVF):  # it visits one list by default
            coarse.nprobe = coarse.nlist
    return index


def _other(factory: str, dim: int) -> str:
    """Return the advice of an error: a smaller code size if that makes the factory string valid."""
    found = re.search(r"(?<=PQ)\d+", factory)
    for number in range(min(int(found[0]), dim + 1) - 1, 0, -1) if found else ():
        other = re.sub(r"(?<=PQ)\d+", str(number), factory)
        try:
            faiss.index_factory(dim, other, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError:
            continue
        return f"write {other!r}, since the dimensions are split into equal parts"
    return INSTEAD


def _refusal(factory: str, reason: str, instead: str) -> str:
    return f"`factory` {factory!r} cannot be used: {reason}. {instead[0].upper()}{instead[1:]}."


def _reason(error: RuntimeError) -> str:
    return str(error).rsplit("failed: ", 1)[-1].rsplit(".cpp:", 1)[-1].split(": ", 1)[-1].strip()


def inner_of(index: Any) -> Any:
    """Return the index after any transformations, as an instance of its FAISS class."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def transformed(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Return ``vectors`` after the transformations of an index."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(number)).apply(vectors)
    return np.ascontiguousarray(vectors)


def search(
    index: Any, queries: np.ndarray, k: int, effort: float, shown: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return inner products and numbers of the nearest vectors, both ``(B, k)`` or wider, padded with -1.

    Queries are transformed without the constant part of a transformation, such as the mean that PCA subtracts, because
    it would change each inner product by a different number.

    Args:
        index: Index from :func:`made_of`.
        queries: ``(B, D)``.
        k: Number of vectors to find.
        effort: Number of lists or nodes to visit.
        shown: ``(N,)`` mask of the vectors to find. An index without a filter is asked for more, and may return hidden
            vectors.
    """
    inner = inner_of(index)
    if inner is not faiss.downcast_index(index):
        origin = np.zeros((1, queries.shape[1]), np.float32)
        queries = transformed(index, queries) - transformed(index, origin)
    more = 1.0 if shown is None else len(shown) / max(1, shown.sum())  # hidden vectors are visited, too
    effort, found = more * effort, more * k
    if _chooses(inner):
        selector = None if shown is None else faiss.IDSelectorBitmap(np.packbits(shown, bitorder="little"))
        return tuple(inner.search(queries, k, params=_parameters(inner, effort, found, selector)))
    if hasattr(inner, "nprobe"):
        inner.nprobe = min(math.ceil(effort), inner.nlist)
    if isinstance(inner, faiss.IndexNSG):
        inner.nsg.search_L = math.ceil(max(effort, found))
    return tuple(inner.search(queries, min(math.ceil(found), inner.ntotal)))


def _chooses(inner: Any) -> bool:
    """Return whether an index supports searching a subset of its vectors."""
    kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)
    others = (faiss.IndexIVFAdditiveQuantizer, faiss.IndexIVFAdditiveQuantizerFastScan)
    return isinstance(inner, (*kinds, faiss.IndexRaBitQ)) and not isinstance(inner, others)


def _parameters(inner: Any, effort: float, found: float, selector: Any) -> Any:
    """Return the search parameters; a graph must visit at least as many nodes as are requested."""
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(inner, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=math.ceil(max(effort, found)), **chosen)
    if isinstance(inner, faiss.IndexIVF):
        kind = faiss.IVFPQSearchParameters if isinstance(inner, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(nprobe=min(math.ceil(effort), inner.nlist), **chosen)
    return faiss.SearchParameters(**chosen)
