"""Equal embeddings are stored once, have the same score, and are ordered by label id."""

import numpy as np
import pytest
import torch

from hf_xmc import FaissIndex, LabelIndex
from hf_xmc.search import equal_rows, exact
from hf_xmc.search.equal_rows import codes_of, first_equal
from hf_xmc.search.grouped import GroupedIndex

RNG = np.random.default_rng(0)
DISTINCT = RNG.normal(size=(90, 7)).astype(np.float32)
ROW_OF = RNG.integers(90, size=700)
LABELS, QUERIES = DISTINCT[ROW_OF], RNG.normal(size=(9, 7)).astype(np.float32)
BUILD = {
    "exact": LabelIndex,
    "codes": lambda rows: FaissIndex(rows, "SQ8"),
    "graph": lambda rows: FaissIndex(rows, "HNSW16", refine=1),
    "lists": lambda rows: FaissIndex(rows, "IVF3,Flat"),
}


def best_of(rows, k, hidden=(), excluded=()):
    """Ids by scores of distinct rows in float64, ties by id."""
    kinds, kind_of = np.unique(rows, axis=0, return_inverse=True)
    scores = (QUERIES.astype(np.float64) @ kinds.T.astype(np.float64))[:, kind_of.ravel()]
    scores[:, list(hidden)] = -np.inf
    for row, label in excluded:
        scores[row, label] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def check(found, rows, **left_out):
    np.testing.assert_array_equal(found.label_ids, best_of(rows, found.label_ids.shape[1], **left_out))
    for ids, scores in zip(found.label_ids, found.scores, strict=True):
        _, kind_of = np.unique(rows[ids], axis=0, return_inverse=True)
        assert len(np.unique(scores)) == len(np.unique(kind_of)), "equal rows have equal scores"


@pytest.fixture(params=BUILD)
def build(request, monkeypatch):
    monkeypatch.setattr(exact, "LABEL_CHUNK", 61)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 4)
    return BUILD[request.param]


@pytest.mark.parametrize("k", [1, 2, 13])
def test_equal_embeddings_are_ordered_by_id_with_any_exclusion(build, k):
    made = build(LABELS)
    check(made.search(QUERIES, k), LABELS)
    first = best_of(LABELS, 700)
    gone = first[0, :3]  # the first of a group, and others of it stay
    check(made.search(QUERIES, k, deny=gone), LABELS, hidden=gone)
    allowed = np.arange(0, 700, 2)
    check(made.search(QUERIES, k, allow=allowed), LABELS, hidden=np.arange(1, 700, 2))
    pairs = np.stack([np.repeat(np.arange(9), 4), first[:, [0, 1, 5, 9]].ravel()], axis=1)
    pairs = np.concatenate([pairs, pairs[:2], [[0, label] for label in first[0, :40]]])
    check(made.search(QUERIES, k, exclude=pairs), LABELS, excluded=pairs)
    check(made.search(QUERIES, k, exclude=pairs, deny=gone), LABELS, excluded=pairs, hidden=gone)


@pytest.mark.parametrize("kind", ["exact", "codes"])
def test_tied_embeddings_are_ordered_by_their_remaining_labels(kind, monkeypatch):
    monkeypatch.setattr(exact, "LABEL_CHUNK", 7)
    rng = np.random.default_rng(0)
    for _ in range(30):
        kinds = rng.integers(-2, 3, size=(9, 2)).astype(np.float32)  # small whole numbers: scores are exact, and tie
        rows, queries = kinds[rng.integers(9, size=40)], rng.integers(-2, 3, size=(20, 2)).astype(np.float32)
        hidden = rng.permutation(40)[: rng.integers(30)]
        pairs = np.stack([rng.integers(20, size=90), rng.integers(40, size=90)], axis=1)
        scores = queries @ rows.T
        scores[:, hidden] = scores[pairs[:, 0], pairs[:, 1]] = -np.inf
        found = BUILD[kind](rows).search(queries, 4, exclude=pairs, deny=hidden)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :4]
        expected = np.where(np.isneginf(np.take_along_axis(scores, order, 1)), -1, order)
        np.testing.assert_array_equal(found.label_ids, expected)


def test_equal_embeddings_can_be_added_and_removed(build):
    made = build(LABELS[:300])
    made.add(LABELS[300:])
    check(made.search(QUERIES, 9), LABELS)
    made.remove(range(0, 600, 3))
    rows = np.delete(LABELS, np.arange(0, 600, 3), axis=0)
    check(made.search(QUERIES, 9), rows)
    new = np.concatenate([rows[100:110], 2 * DISTINCT[:5], 2 * DISTINCT[:5]])
    made.replace(range(7, 27), new)
    rows = rows.copy()
    rows[7:27] = new
    check(made.search(QUERIES, 9), rows)
    if isinstance(made, FaissIndex):
        again = FaissIndex(made.embeddings, made.factory, refine=made.refine)
        if state := made.state():
            again = FaissIndex.from_state(made.embeddings, made.factory, state, refine=made.refine)
        check(again.search(QUERIES, 9), rows)
        assert again.candidates.index.ntotal == len(np.unique(rows, axis=0))


def test_graph_has_one_node_per_distinct_embedding():
    made = FaissIndex(LABELS, "HNSW8")
    assert made.candidates.index.ntotal == len(np.unique(LABELS, axis=0)) < 100
    made.add(LABELS[:50])
    made.replace([3], LABELS[4:5])
    assert made.candidates.index.ntotal == len(np.unique(LABELS, axis=0))


def test_tied_labels_with_several_texts_are_ordered_by_label(build):
    label_of = np.repeat(np.arange(350), 2)
    found = GroupedIndex(build(LABELS), label_of).search(QUERIES, 12)
    texts = best_of(LABELS, 700)
    for ids, row in zip(found.label_ids, texts, strict=True):
        assert ids.tolist() == list(dict.fromkeys(label_of[row].tolist()))[:12]
    with pytest.raises(ValueError, match="in ascending order from 0 without a gap, got 699"):
        GroupedIndex(build(LABELS), label_of[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_first_equal_row_is_found_even_if_hashes_collide(dtype, monkeypatch):
    monkeypatch.setattr(equal_rows, "ROWS_AT_ONCE", 64)
    rows = torch.from_numpy(LABELS[:200]).to(dtype)
    rows[5], rows[150] = 0.0, -0.0
    _, first, kind_of = np.unique(rows.numpy() + 0, axis=0, return_index=True, return_inverse=True)
    expected = first[kind_of.ravel()]
    assert expected[150] == 5
    codes = codes_of(rows)
    assert len(np.unique(codes)) == len(first)
    for given in (codes, codes % 3, np.zeros_like(codes)):
        np.testing.assert_array_equal(first_equal(rows, given), expected)


def test_tune_needs_a_query_and_keeps_the_effort_if_it_fails(monkeypatch):
    made = FaissIndex(LABELS, "IVF3,Flat", effort=7)
    with pytest.raises(ValueError, match="at least one query"):
        made.tune(np.empty((0, 7), np.float32))
    monkeypatch.setattr(made.candidates, "nearest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.tune(QUERIES, k=1)
    assert made.effort == 7
