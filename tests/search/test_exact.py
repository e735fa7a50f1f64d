"""Exact search equals a stable sort of all scores in float32, for any chunk size."""

import numpy as np
import pytest
import torch

from hf_xmc import LabelIndex
from hf_xmc.search import exact


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(exact, "QUERY_BLOCK", 4)
    monkeypatch.setattr(exact, "LABEL_CHUNK", 10)


def reference(queries, labels, k, hidden=()):
    scores = queries @ labels.T
    for row, label in hidden:
        scores[row, label] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, 1)


def whole_numbers(*shape, seed=0):
    """Sums of small whole numbers are exact, so ties are ties."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 10, 23])
def test_search_is_a_stable_sort_of_all_scores(k):
    queries, labels = whole_numbers(11, 3), whole_numbers(23, 3, seed=1)
    found = LabelIndex(labels).search(queries, k)
    label_ids, scores = reference(queries, labels, k)
    np.testing.assert_array_equal(found.label_ids, label_ids)
    np.testing.assert_array_equal(found.scores, scores)
    assert (found.label_ids.dtype, found.scores.dtype) == (np.int64, np.float32)


def test_tie_at_the_last_place_goes_to_the_smaller_id():
    found = LabelIndex(np.ones((29, 2), dtype=np.float32)).search(np.ones((1, 2)), 12)
    assert found.label_ids[0].tolist() == list(range(12))


def test_excluded_pairs_are_never_returned():
    queries, labels = whole_numbers(11, 3), whole_numbers(23, 3, seed=1)
    pairs = np.array([[0, 5], [0, 22], [3, 0], [4, 9], [4, 10], [10, 11]])
    found = LabelIndex(labels).search(queries, 23, exclude=pairs)
    label_ids, scores = reference(queries, labels, 23, pairs)
    label_ids[np.isneginf(scores)] = -1
    np.testing.assert_array_equal(found.label_ids, label_ids)


def test_allow_and_deny_select_labels_and_padding_fills_the_rest():
    queries, labels = whole_numbers(5, 3), whole_numbers(23, 3, seed=1)
    found = LabelIndex(labels).search(queries, 4, allow=[2, 7, 21], deny={7})
    assert all(sorted(row[:2]) == [2, 21] for row in found.label_ids.tolist())
    assert (found.label_ids[:, 2:] == -1).all()
    assert np.isneginf(found.scores[:, 2:]).all()


def test_search_pads_a_large_k_and_accepts_no_queries():
    labels = LabelIndex(whole_numbers(3, 2))
    assert labels.search(whole_numbers(2, 2), 5).label_ids[:, 3:].tolist() == [[-1, -1], [-1, -1]]
    assert labels.search(np.empty((0, 2)), 5).label_ids.shape == (0, 5)


def test_half_precision_labels_are_ranked_in_float32():
    # 2048 and 2049 are one number in half precision: a score kept in it would tie them.
    labels = np.array([[2048.0, 0], [2048, 1]], dtype=np.float16)
    found = LabelIndex(labels).search(np.array([[1.0, 1.0]]), 2)
    assert found.label_ids.tolist() == [[1, 0]]
    assert found.scores.tolist() == [[2049.0, 2048.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelIndex(np.zeros(3, np.float32)), r"\(L, D\) matrix of float32 or float16, got shape \(3,\)"),
        (lambda: LabelIndex(np.zeros((3, 2))), "float64"),
        (lambda: LabelIndex(np.array([[0, 1], [np.nan, 1]], np.float32)), "embedding of label 1 is not finite"),
        (lambda: LabelIndex(np.zeros((3, 2), np.float32)).search(np.zeros((1, 3)), 1), r"must have shape \(N, 2\)"),
        (lambda: LabelIndex(np.zeros((3, 2), np.float32)).search(np.zeros((1, 2)), 0), "k must be at least 1, got 0"),
        (lambda: LabelIndex(np.zeros((3, 2), np.float32)).search(np.full((1, 2), np.inf), 1), "of query 0 is not fin"),
        (
            lambda: LabelIndex(np.zeros((3, 2), np.float32)).search(np.zeros((1, 2)), 1, allow=[3]),
            "label ids must be from 0 to 2, got 3",
        ),
        (
            lambda: LabelIndex(np.zeros((3, 2), np.float32)).search(np.zeros((1, 2)), 1, exclude=np.array([[1, 0]])),
            "`exclude` has query 1 and label 0, but there are 1 queries and 3 labels",
        ),
    ],
)
def test_invalid_input_is_named_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ids_close_up_after_labels_are_removed():
    labels, queries = whole_numbers(23, 3, seed=1), whole_numbers(5, 3)
    grown = LabelIndex(labels[:20])
    grown.add(labels[20:])
    grown.remove([22, 0, 7, 7])
    found, expected = grown.search(queries, 6), LabelIndex(np.delete(labels, [0, 7, 22], axis=0)).search(queries, 6)
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    with pytest.raises(ValueError, match="label ids must be from 0 to 19, got 20"):
        grown.remove([20])
    with pytest.raises(ValueError, match="must have 3 dimensions, like the existing labels, got 4"):
        grown.add(np.zeros((1, 4), np.float32))


def test_torch_and_numpy_give_the_same():
    queries, labels = whole_numbers(5, 3), whole_numbers(23, 3, seed=1)
    one, other = (
        LabelIndex(labels).search(queries, 5),
        LabelIndex(torch.tensor(labels)).search(torch.tensor(queries), 5),
    )
    np.testing.assert_array_equal(one.label_ids, other.label_ids)
