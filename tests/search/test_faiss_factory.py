"""A FAISS factory string finds what exact search finds, or is refused with a hint."""

from itertools import product

import faiss
import numpy as np
import pytest

from hf_xmc import FaissIndex, LabelIndex
from hf_xmc.topk import recall_of

RNG = np.random.default_rng(0)
LABELS = (RNG.normal(size=(600, 32)) * RNG.lognormal(0, 0.4, (600, 1))).astype(np.float32)
MORE = (RNG.normal(size=(40, 32)) * RNG.lognormal(0, 0.4, (40, 1))).astype(np.float32)
QUERIES = RNG.normal(size=(30, 32)).astype(np.float32)
FACTORIES = {  # and the recall that the codes allow
    **dict.fromkeys(["Flat", "SQ4", "SQ6", "SQ8", "SQfp16", "SQbf16"], 1.0),
    **dict.fromkeys(["Int8", "IVF8,Int8"], 1.0),
    **dict.fromkeys(["HNSW8", "HNSW32", "HNSW", "HNSW32,Flat", "HNSW32_SQ8", "HNSW32,SQ8", "HNSW8_SQfp16"], 0.97),
    **dict.fromkeys(["NSG16", "NSG16_SQ8"], 0.97),
    **dict.fromkeys(["IVF8,Flat", "IVF8,SQ8", "IVF8,SQ4", "IVF8,SQfp16", "IVF8,FlatDedup", "IVF8(Flat),Flat"], 0.97),
    **dict.fromkeys(["IVF8_HNSW8,Flat", "IVF8_HNSW8,SQ8", "IVF64(HNSW8),Flat", "IVF64(IVF8,Flat),Flat"], 0.97),
    **dict.fromkeys(["RR,Flat", "RR40,SQ8", "PCA32,Flat", "PCAR32,IVF8,SQ8", "PCA32,HNSW32", "Pad48,PQ48x4"], 0.97),
    **dict.fromkeys(["PCA16,Flat", "PCAR16,SQ8", "PCA16,IVF8,SQ8", "PCAW16,Flat"], 0.9),
    **dict.fromkeys(["PCA24,PCA16,Flat", "PCA16,HNSW32", "RR16,SQ8", "OPQ2_16,IVF8,SQ8", "OPQ2_16,PQ16x4"], 0.8),
    **dict.fromkeys(["PQ8x4", "PQ16x4", "PQ16x4np", "PQ16x4fs", "IVF8,PQ16x4", "IVF8,PQ16x4np", "IVF8,PQ16x4fs"], 0.8),
    **dict.fromkeys(["RQ4x6", "LSQ4x4", "PRQ2x2x4", "PLSQ2x2x4", "RQ4x4fs", "LSQ4x4fs", "IVF8,RQ4x6"], 0.8),
    **dict.fromkeys(["RaBitQ", "RaBitQ4", "RaBitQfs", "IVF8,RaBitQ", "IVF8,RaBitQfs", "IVF8,RQ4x4fs"], 0.8),
}
REFUSED = {
    "PQ48x4": "write 'PQ32x4'",
    "IVF8,PQ5x4": "write 'IVF8,PQ4x4'",
    "PQ8x12": "needs 4096 different labels, and there are 600",
    "IVF1024,Flat": "needs 1024 different labels, and there are 600",
    "IVF1024,Int8": "needs 1024 different labels, and there are 600",
    "IVF1024_HNSW32,Flat": "needs 1024 different labels",
    "IMI2x8,Flat": "write 'IVF1024_HNSW32'",
    "IVF8(RCQ2x3),Flat": "write 'IVF1024_HNSW32'",
    "IVF8,PQ8+8": "write the first number alone",
    "IVF8,PQ16x4fsr": "write 'fs'",
    "HNSW32_PQ8": "write 'HNSW32_SQ8'",
    "NSG16,PQ8x4": "write 'HNSW32_SQ8'",
    "LSH": "write 'SQ8', 'PQ8' or 'RaBitQ'",
    "ITQ16,LSH": "leave it out",
    "L2norm,Flat": "leave it out",
    "IDMap,Flat": "leave it out",
    "IDMap2,SQ8": "leave it out",
    "IVF8,PQ8x4,RFlat": "leave it out",
    "SQ8,Refine(Flat)": "leave it out",
    "SQ8_direct": "write 'SQ8'",
    "ZnLattice4x10_6": "write 'SQ8'",
    "PCA40,Flat": "write 'PCA16'",
    "HNSW0": "number is not from 1",
    "IVF0,Flat": "number is not from 1",
    "PQ8x0": "number is not from 1",
    "HNSW1": "2 to 256 links",
    "NSG1": "2 to 256 links",
    "HNSW100000": "2 to 256 links",
    "IVF999999999,Flat": "number is not from 1",
    "BFlat": "write for example",
    "BIVF8": "write for example",
    "Hash": "write for example",
    "nonsense": "write for example",
    "IVF8(IVF4,Flat),SQ8": "write for example",
    "IVF8, SQ8": "write for example",
    "ivf8,flat": "write for example",
    "IVF,Flat": "write for example",
    "HNSW32 ": "write for example",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the work is too little to share
    yield
    faiss.omp_set_num_threads(threads)


def check(index, bound):
    exact = LabelIndex(index.embeddings)
    half = np.arange(1, index.num_labels, 2)
    for choice in ({}, {"deny": half}):
        found, best = index.search(QUERIES, 5, **choice), exact.search(QUERIES, 5, **choice)
        assert recall_of(found, best) >= bound, choice
        right = (QUERIES[:, None] * index.embeddings.numpy()[found.label_ids]).sum(2)
        np.testing.assert_allclose(found.scores, right, rtol=1e-4, atol=1e-4)
    assert not np.isin(found.label_ids, half).any()


@pytest.mark.parametrize("factory", FACTORIES)
def test_factory_finds_what_exact_search_finds(factory):
    graph = "HNSW" in factory or "NSG" in factory  # all labels are scored if more are proposed
    settings, bound = {"refine": 5 if graph else 40}, FACTORIES[factory]
    index = FaissIndex(LABELS, factory, **settings)
    assert index.built == factory
    check(index, bound)
    index.add(MORE[:30])
    index.remove(range(100, 200))
    index.replace([3, 300], MORE[30:32])
    table = np.delete(np.concatenate([LABELS, MORE[:30]]), np.arange(100, 200), axis=0)
    table[[3, 300]] = MORE[30:32]
    np.testing.assert_array_equal(index.embeddings.numpy(), table)
    check(index, bound)
    again = FaissIndex(index.embeddings, factory, **settings)
    if state := index.state():
        again = FaissIndex.from_state(index.embeddings, factory, state, **settings)
    check(again, bound)


@pytest.mark.parametrize("factory", REFUSED)
def test_unsupported_factory_is_refused_with_a_replacement(factory):
    with pytest.raises(ValueError, match="(?i)" + REFUSED[factory].replace("(", r"\(").replace("+", r"\+")):
        FaissIndex(LABELS, factory)


@pytest.mark.parametrize("factory", ["nonsense", "", "PCA40,Flat", "LSH", "HNSW1"])
def test_invalid_factory_is_refused_even_without_labels(factory):
    for rows in (LABELS, LABELS[:0]):
        with pytest.raises(ValueError, match="cannot be used"):
            FaissIndex(rows, factory)


@pytest.mark.parametrize("factory", [32, b"SQ8", ["SQ8"], 0, False])
def test_factory_that_is_not_a_string_is_refused(factory):
    with pytest.raises(ValueError, match="`factory` must be a factory string of FAISS"):
        FaissIndex(LABELS, factory)


NO_COUNTS = [0, -1, 1.5, True]


@pytest.mark.parametrize(
    ("setting", "value"), [*product(["refine", "effort"], NO_COUNTS), ("refine", None)]
)  # the effort depends on the factory if it is None
def test_settings_below_one_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"`{setting}` must be a whole number of at least 1, got {value}"):
        FaissIndex(LABELS, "SQ8", **{setting: value})


@pytest.mark.parametrize("factory", [None, "SQ8", "HNSW8", "IVF8,SQ8", "IVF8,Int8", "PCA16,SQ8", "PQ8x4"])
def test_empty_index_finds_nothing_until_labels_are_added(factory):
    index = FaissIndex(np.empty((0, 32), np.float32), factory)
    found = index.search(QUERIES, 3)
    assert (found.label_ids == -1).all()
    assert np.isneginf(found.scores).all()
    assert index.state() == {}
    index.add(LABELS[:200])
    assert index.built == index.factory
    check(index, 0.8)
    index.remove(range(200))
    assert (index.search(QUERIES, 3).label_ids == -1).all()


def test_pca_ranks_labels_correctly_when_their_mean_is_large():
    # The mean that PCA takes off would add another number to the product of each label.
    labels = LABELS + 3
    found = FaissIndex(labels, "PCA32,Flat", refine=1).search(QUERIES, 5)
    np.testing.assert_array_equal(found.label_ids, LabelIndex(labels).search(QUERIES, 5).label_ids)
