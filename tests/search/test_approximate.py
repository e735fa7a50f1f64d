"""The contract of all indexes: results are ranked in float32, and excluded labels are never returned."""

from itertools import count

import numpy as np
import pytest
import torch

from hf_xmc import FaissIndex, LabelIndex, MilvusIndex
from hf_xmc.topk import recall_of

BACKENDS = {
    "exact": LabelIndex,
    "exact, fp16": lambda embeddings: LabelIndex(torch.as_tensor(embeddings).half()),
    **{
        factory: lambda embeddings, factory=factory: FaissIndex(embeddings, factory, effort=256, refine=64)
        for factory in ("Flat", "SQfp16", "SQ8", "IVF4,Flat", "PCAR6,IVF4,PQ6x4")
    },
    "HNSW32": lambda embeddings: FaissIndex(embeddings, "HNSW32", effort=256, refine=1),
}


MILVUS = {
    "milvus": {},
    "milvus, HNSW": {"index_type": "HNSW", "index_params": {"M": 16}, "search_params": {"ef": 256}},
    "milvus, lists": {"index_type": "IVF_FLAT", "index_params": {"nlist": 4}, "search_params": {"nprobe": 4}},
}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return str(tmp_path_factory.mktemp("milvus") / "labels.db")


@pytest.fixture(params=[*BACKENDS, *MILVUS])
def build(request, database):
    if request.param in BACKENDS:
        yield BACKENDS[request.param]
        return
    made, numbers = [], count()

    def in_milvus(embeddings):
        made.append(MilvusIndex(embeddings, database, f"labels_{next(numbers)}", **MILVUS[request.param]))
        return made[-1]

    yield in_milvus
    for index in made:
        index.close()


def table(rows=211, seed=0):
    """Lengths differ, as those of frequent labels do; numbers that half precision holds."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 6)) * rng.uniform(0.5, 2, (rows, 1))).astype(np.float16).astype(np.float32)


QUERIES, LABELS = table(9, seed=1), table()


def check(found, labels, queries=QUERIES, recall=1.0, hidden=()):
    """Scores are right, in order, never of a hidden label; and the best are there."""
    scores = queries @ labels.T
    scores[:, list(hidden)] = -np.inf
    best = np.sort(scores, axis=1)[:, ::-1][:, : found.label_ids.shape[1]]
    real = found.label_ids >= 0
    for row, (ids, given) in enumerate(zip(found.label_ids, found.scores, strict=True)):
        assert len(set(ids[ids >= 0])) == (ids >= 0).sum()
        np.testing.assert_allclose(given[ids >= 0], scores[row, ids[ids >= 0]], rtol=1e-5, atol=1e-5)
    assert (np.diff(found.scores[:, : real.sum(1).min()], axis=1) <= 0).all()
    assert np.isneginf(found.scores[~real]).all()
    np.testing.assert_allclose(found.scores[real], best[:, : real.shape[1]][real], rtol=1e-5, atol=1e-5)


def test_search_returns_the_best_labels_with_their_scores(build):
    check(build(LABELS).search(QUERIES, 10), LABELS)


def test_search_omits_excluded_labels(build):
    index, hidden = build(LABELS), [0, 5, 17, 200]
    check(index.search(QUERIES, 10, deny=hidden), LABELS, hidden=hidden)
    allowed = set(range(0, 211, 2))
    check(index.search(QUERIES, 5, allow=allowed), LABELS, hidden=set(range(211)) - allowed)
    found = index.search(QUERIES, 5, allow=[7, 3])
    assert np.sort(found.label_ids[:, :2]).tolist() == [[3, 7]] * 9
    assert (found.label_ids[:, 2:] == -1).all()
    first = index.search(QUERIES, 3).label_ids
    pairs = np.stack([np.repeat(np.arange(9), 2), first[:, :2].ravel()], axis=1)
    assert index.search(QUERIES, 1, exclude=pairs).label_ids[:, 0].tolist() == first[:, 2].tolist()


def test_add_and_remove_change_what_is_found(build):
    index, new = build(LABELS), table(3, seed=2)
    index.remove([4, 210, 4])
    left = np.delete(LABELS, [4, 210], axis=0)
    check(index.search(QUERIES, 10), left)
    index.add(new)
    index.add(64 * new)  # longer than all that are there
    whole = np.concatenate([left, new, 64 * new])
    check(index.search(QUERIES, 10), whole)
    assert index.num_labels == 215
    assert index.search(64 * new[:1], 1).scores[0, 0] == pytest.approx((whole @ (64 * new[0])).max(), rel=1e-4)
    np.testing.assert_array_equal(np.asarray(index.embeddings, dtype=np.float32), whole)


@pytest.mark.parametrize("longer", [1, 64])
def test_replaced_labels_keep_their_ids(build, longer):
    index, new = build(LABELS), longer * table(2, seed=2)
    index.remove([0])
    index.replace([3, 200], new)
    whole = LABELS[1:].copy()
    whole[[3, 200]] = new
    check(index.search(QUERIES, 10), whole)
    assert index.search(4 * new[1:], 1).label_ids[0, 0] == (whole @ new[1]).argmax()
    with pytest.raises(ValueError, match="label ids must be from 0 to 209, got 210"):
        index.replace([210], new[:1])


def test_labels_of_equal_score_are_ordered_by_id(build):
    labels = np.concatenate([np.tile(8 * LABELS[:1], (4, 1)), LABELS])
    found = build(labels).search(LABELS[:1], 4)
    assert found.label_ids.tolist() == [[0, 1, 2, 3]]
    assert len(set(found.scores[0])) == 1


def test_search_pads_a_large_k_and_accepts_no_queries(build):
    found = build(LABELS).search(QUERIES, 300)
    assert (found.label_ids[:, 211:] == -1).all()
    assert sorted(found.label_ids[0, :211]) == list(range(211))
    assert build(LABELS).search(np.empty((0, 6)), 4).label_ids.shape == (0, 4)


def test_invalid_input_is_named_in_the_error(build):
    index = build(LABELS)
    with pytest.raises(ValueError, match="embedding of query 0 is not finite"):
        index.search(np.full((1, 6), np.nan), 1)
    with pytest.raises(ValueError, match=r"must have shape \(N, 6\)"):
        index.search(np.zeros((1, 5)), 1)
    with pytest.raises(ValueError, match="label ids must be from 0 to 210, got 211"):
        index.search(QUERIES, 1, deny=[211])
    with pytest.raises(ValueError, match="embedding of label 0 is not finite"):
        index.add(np.full((1, 6), np.inf, np.float32))
    with pytest.raises(ValueError, match="label ids must be from 0 to 210, got 300"):
        index.remove([300])


def test_tune_reaches_the_given_recall():
    labels, queries = table(3000), table(40, seed=3)
    index = FaissIndex(labels, "IVF64,Flat", effort=1)
    exact = LabelIndex(labels).search(queries, 10).label_ids
    reached = index.tune(queries, recall=0.9)
    found = index.search(queries, 10).label_ids
    overlap = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact, strict=True)])
    assert reached == pytest.approx(overlap)
    assert reached >= 0.9
    assert index.effort < 64


def test_search_scores_all_labels_if_candidates_are_too_few(monkeypatch):
    index, exact = FaissIndex(LABELS, "Flat"), LabelIndex(LABELS)
    stock = index.candidates.nearest

    def propose(*args):
        near, places = stock(*args)
        places[::2, 3:] = -1
        return near, places

    monkeypatch.setattr(index.candidates, "nearest", propose)
    pairs = np.stack([np.arange(9), exact.search(QUERIES, 1).label_ids[:, 0]], axis=1)
    for choice in ({}, {"exclude": pairs}, {"deny": [3, 4], "exclude": pairs[3:]}):
        found, best = (of.search(QUERIES, 5, **choice) for of in (index, exact))
        np.testing.assert_array_equal(found.label_ids, best.label_ids)


def spread_out():
    rng = np.random.default_rng(0)
    labels, queries = (rng.normal(size=(rows, 16)).astype(np.float32) for rows in (4000, 100))
    return labels, queries, rng


@pytest.mark.parametrize("factory", ["HNSW32", "IVF64,Flat"])
def test_hidden_labels_do_not_lower_the_recall(factory):
    labels, queries, rng = spread_out()
    index, exact = FaissIndex(labels, factory, effort=16), LabelIndex(labels)
    among_all = recall_of(index.search(queries, 5), exact.search(queries, 5))
    allowed = rng.choice(4000, 420, replace=False)
    found = index.search(queries, 5, allow=allowed)
    assert recall_of(found, exact.search(queries, 5, allow=allowed)) >= among_all > 0.9


def test_graph_visits_more_nodes_than_it_returns():
    labels, queries, _ = spread_out()
    index = FaissIndex(labels, "HNSW32", effort=16)
    found = index.search(queries, 49)
    assert recall_of(found, LabelIndex(labels).search(queries, 49)) > 0.99  # 0.92 with the effort alone
    index.candidates.nearest = None  # a graph is not asked for more than a twentieth of its nodes
    assert (index.search(queries, 50).label_ids >= 0).all()
    assert (index.search(queries, 26, deny=range(2000)).label_ids >= 2000).all()


def test_graph_is_rebuilt_once_most_labels_are_removed():
    labels, queries, rng = spread_out()
    index, kept = FaissIndex(labels, "HNSW16", effort=16), np.sort(rng.choice(4000, 400, replace=False))
    index.remove(np.setdiff1d(np.arange(4000), kept))
    alone = FaissIndex(labels[kept], "HNSW16", effort=16)
    np.testing.assert_array_equal(index.search(queries, 4).label_ids, alone.search(queries, 4).label_ids)
    for _ in range(2):
        index.replace(np.arange(300), labels[kept[:300]])
    np.testing.assert_array_equal(index.search(queries, 4).label_ids, alone.search(queries, 4).label_ids)


@pytest.mark.parametrize(("factory", "left"), [("IVF64,Flat", 40), ("PCA6,HNSW16", 3), ("SQ8", 0), ("HNSW16", 0)])
def test_search_works_with_fewer_labels_than_the_index_was_trained_on(factory, left):
    index = FaissIndex(LABELS, factory)
    index.remove(range(left, 211))
    found = index.search(QUERIES, 10)
    assert index.num_labels == left
    assert ((found.label_ids >= 0).sum(1) == min(left, 10)).all()


def test_scanned_codes_give_the_result_of_exact_search():
    # 200 labels that int8 codes cannot tell apart, since one outlier stretches their range.
    rng = np.random.default_rng(0)
    labels = np.concatenate([1 + 1e-3 * rng.normal(size=(200, 6)), 50 * np.eye(6), -50 * np.eye(6)]).astype(np.float32)
    queries = np.ones((1, 6), np.float32) + 0.1 * rng.normal(size=(8, 6)).astype(np.float32)
    coarse, exact = FaissIndex(labels, "SQ8", refine=1), LabelIndex(labels)
    np.testing.assert_array_equal(coarse.search(queries, 20).label_ids, exact.search(queries, 20).label_ids)


def test_milvus_filters_labels_that_are_not_allowed(database):
    with MilvusIndex(LABELS, database) as index:
        asked, client = [], index.candidates.client
        search = client.search
        client.search = lambda *args, **kwargs: asked.append(kwargs) or search(*args, **kwargs)
        index.remove([3])
        index.search(QUERIES, 2, deny=[5])
        index.search(QUERIES, 2, allow=range(60))
        assert [kwargs["filter"] for kwargs in asked] == [
            "place not in [6]",  # label 5 came as number 6
            f"place in {[0, 1, 2, *range(4, 61)]}",
        ]
        check(index.search(QUERIES, 10), np.delete(LABELS, 3, axis=0))
        assert client.query("labels", filter="place < 8", output_fields=["count(*)"])[0]["count(*)"] == 7
        index.candidates.max_candidates = 9  # of a query, as Milvus has a limit
        check(index.search(QUERIES, 9), np.delete(LABELS, 3, axis=0))
        assert (asked[-1]["limit"], len(asked)) == (9, 4)
        check(index.search(QUERIES, 10), np.delete(LABELS, 3, axis=0))
        assert len(asked) == 4


def test_milvus_collection_is_dropped_or_kept_and_reused(database):
    with MilvusIndex(LABELS, database) as index, pytest.raises(ValueError, match=r"already has a collection 'labels'"):
        MilvusIndex(index.embeddings, database)
    index = MilvusIndex(LABELS, database, keep=True)
    index.candidates.client.release_collection("labels")  # as milvus-lite does when its process ends
    index.close()
    again = MilvusIndex(LABELS, database, keep=True)
    check(again.search(QUERIES, 10), LABELS)
    again.add(table(3, seed=2) / 8)
    again.close()
    for other in (LABELS, np.concatenate([LABELS, LABELS[:3]])):
        with pytest.raises(ValueError, match=rf"does not hold these {len(other)} embeddings"):
            MilvusIndex(other, database, keep=True)
    last = MilvusIndex(np.concatenate([LABELS, table(3, seed=2) / 8]), database, keep=True)
    last.keep = False
    last.close()
    with MilvusIndex(LABELS, database) as index:
        assert index.candidates.client.list_collections() == ["labels"]


def test_graph_has_high_recall_when_norms_differ():
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1, 0.1, 32) ** 2
    labels = (rng.normal(size=(3000, 32)) * spectrum * rng.lognormal(0, 0.4, (3000, 1))).astype(np.float32)
    queries = (rng.normal(size=(100, 32)) * spectrum).astype(np.float32)
    found = FaissIndex(labels, "HNSW16", effort=32).search(queries, 10)
    assert recall_of(found, LabelIndex(labels).search(queries, 10)) > 0.9  # of distances it would find 0.45
