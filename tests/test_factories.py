"""Factory strings of FAISS: each finds what exact search finds, whatever comes and goes, or says what to write."""

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
def test_a_factory_finds_what_exact_search_finds(factory):
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
    again = FaissIndex(index.embeddings, factory, **settings, state=index.state() or None)
    check(again, bound)


@pytest.mark.parametrize("factory", REFUSED)
def test_what_cannot_be_used_is_refused_with_what_to_write(factory):
    with pytest.raises(ValueError, match="(?i)" + REFUSED[factory].replace("(", r"\(").replace("+", r"\+")):
        FaissIndex(LABELS, factory)


@pytest.mark.parametrize("factory", ["nonsense", "", "PCA40,Flat", "LSH", "HNSW1"])
def test_what_can_never_be_built_is_refused_without_labels_too(factory):
    for rows in (LABELS, LABELS[:0]):
        with pytest.raises(ValueError, match="cannot be used"):
            FaissIndex(rows, factory)


@pytest.mark.parametrize("factory", [32, b"SQ8", ["SQ8"], 0, False])
def test_a_factory_that_is_no_string_is_refused(factory):
    with pytest.raises(ValueError, match="`factory` must be a factory string of FAISS"):
        FaissIndex(LABELS, factory)


@pytest.mark.parametrize("setting", ["refine", "effort"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_settings_below_one_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"{setting} must be a whole number of at least 1, got {value}"):
        FaissIndex(LABELS, "SQ8", **{setting: value})


@pytest.mark.parametrize("factory", [None, "SQ8", "HNSW8", "IVF8,SQ8", "PCA16,SQ8", "PQ8x4"])
def test_an_empty_index_finds_nothing_until_labels_come(factory):
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


def test_a_mean_of_labels_does_not_change_their_order_behind_pca():
    # The mean that PCA takes off would add another number to the product of each label.
    labels = LABELS + 3
    found = FaissIndex(labels, "PCA32,Flat", refine=1).search(QUERIES, 5)
    np.testing.assert_array_equal(found.label_ids, LabelIndex(labels).search(QUERIES, 5).label_ids)
