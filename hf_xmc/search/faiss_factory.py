"""Factory strings of FAISS: what is built of them for inner products, and how it is searched."""

from __future__ import annotations

import math
import re
from typing import Any

import faiss
import numpy as np

MOST_LINKS = 256  # of a node of a graph
MOST = 2**24  # of any number in a factory string
GRAPHS = (faiss.IndexHNSW, faiss.IndexNSG)
INSTEAD = "write for example 'SQ8', 'HNSW32' or 'IVF64,SQ8'"
REFUSED = {
    r"L2norm|ITQ": "it gives all labels one norm, on which inner products depend; leave it out, or write 'PCAR32'",
    r"LSH|Lattice": "it does not compare inner products; write 'SQ8', 'PQ8' or 'RaBitQ'",
    r"IMI|Residual|RCQ": "its lists are found by distances, and labels by inner products; write 'IVF1024_HNSW32'",
    r"PQ\d+\+\d+": "its refinement compares distances; write the first number alone",
    r"(HNSW|NSG)\w*[_,]\w*PQ": "its codes are compared by distances, and labels by inner products; write 'HNSW32_SQ8'",
    r"IDMap": "labels are numbered by their rows already; leave it out",
    r"Refine|RFlat": "the stored embeddings rank what is proposed already; leave it out",
    r"direct": "its codes are whole numbers; write 'SQ8'",
    r"PQ\d+x4fsr": "FAISS does not find inner products with it; write 'fs'",
}
_TOO_FEW = re.compile(r"training points|graph smaller than")


class TooFewLabels(ValueError):
    """A factory string asks for more labels than there are."""


def made_of(factory: str, vectors: np.ndarray) -> Any:
    """Return the index that FAISS makes of ``vectors`` (N, D) for inner products.

    Raises:
        ValueError: if it makes none, or one that does not find inner products. Says what to write instead.
        TooFewLabels: if there are too few vectors to train it.
    """
    index = untrained(factory, *vectors.shape)
    try:
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        if _TOO_FEW.search(str(error)):
            raise TooFewLabels(_refusal(factory, _reason(error), "write smaller numbers, or 'SQ8'")) from None
        if not str(error).startswith("Error in "):  # of memory, and the like
            raise
        raise ValueError(_refusal(factory, _reason(error), INSTEAD)) from None
    return index


def untrained(factory: str, num_vectors: int, dim: int) -> Any:
    """Return the index that FAISS makes for inner products of so many vectors, before it is trained.

    Raises:
        ValueError: if :func:`made_of` raises it.
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
        raise ValueError(_refusal(factory, "FAISS compares distances in it, and labels by inner products", INSTEAD))
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # for a filter that is not used; it takes most of the time
    if isinstance(inner, faiss.IndexIVF):
        coarse = faiss.downcast_index(inner.quantizer)
        if isinstance(coarse, faiss.IndexIVF):  # which looks into one list unless it is told otherwise
            coarse.nprobe = coarse.nlist
    return index


def _other(factory: str, dim: int) -> str:
    """Return what to write instead: fewer numbers of a code, if that is all that is wrong."""
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
    """Return the index behind the transformations of another, as FAISS's own class."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def transformed(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Return ``vectors`` as the index behind the transformations of another sees them."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(number)).apply(vectors)
    return np.ascontiguousarray(vectors)


def search(
    index: Any, queries: np.ndarray, k: int, effort: float, shown: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return inner products and numbers of what is found, ``(B, k)`` both or wider; -1 pads.

    Queries are transformed without the constant part of a transformation, such as the mean that PCA takes off: it would
    add a number to each inner product, another one for each vector.

    Args:
        index: as :func:`made_of` makes it.
        queries: ``(B, D)``.
        k: how many to find.
        effort: lists or nodes to look at.
        shown: ``(N,)``, which to find; an index that cannot choose is asked for more, and may return others too.
    """
    inner = inner_of(index)
    if inner is not faiss.downcast_index(index):
        origin = np.zeros((1, queries.shape[1]), np.float32)
        queries = transformed(index, queries) - transformed(index, origin)
    more = 1.0 if shown is None else len(shown) / max(1, shown.sum())  # what is not returned is looked at all the same
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
    """Return whether an index searches among some of its vectors."""
    kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)
    others = (faiss.IndexIVFAdditiveQuantizer, faiss.IndexIVFAdditiveQuantizerFastScan)
    return isinstance(inner, (*kinds, faiss.IndexRaBitQ)) and not isinstance(inner, others)


def _parameters(inner: Any, effort: float, found: float, selector: Any) -> Any:
    """Return those of a search; a graph must look at as many nodes as are to be found, or finds few of them."""
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(inner, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=math.ceil(max(effort, found)), **chosen)
    if isinstance(inner, faiss.IndexIVF):
        kind = faiss.IVFPQSearchParameters if isinstance(inner, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(nprobe=min(math.ceil(effort), inner.nlist), **chosen)
    return faiss.SearchParameters(**chosen)
