"""Votes are added up and mixed as the formula says, whatever the size of a block."""

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc.search.mixing import Votes, best_mixed, probabilities, votes_of
from hf_xmc.topk import TopK

NO_PAIRS = np.empty((0, 2), np.int64)


def test_votes_are_the_labels_of_the_neighbors_in_their_order():
    relevance = sp.csr_array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=np.float32)
    votes = votes_of(np.array([[2, 0], [1, -1], [0, 2]]), np.array([[0.7, 0.3], [1.0, 0.0], [0.6, 0.4]]), relevance)
    assert votes.rows.tolist() == [0, 0, 0, 2, 2, 2]
    assert votes.label_ids.tolist() == [1, 0, 2, 0, 2, 1]
    assert votes.weights.tolist() == [0.7, 0.3, 0.3, 0.6, 0.6, 0.4]


def test_the_softmax_is_over_the_best_labels_and_padding_gets_nothing():
    found = TopK(np.array([[4, 2, 7, -1]]), np.array([[2.0, 2.0, 0.0, -np.inf]], np.float32))
    weights = probabilities(found, temperature=2.0, num_best=2)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0.5 / np.e, 0]])


def test_best_mixed_adds_votes_and_breaks_ties_by_label():
    votes = Votes(np.array([0, 0, 0, 1]), np.array([3, 1, 3, 0]), np.array([0.25, 0.25, 0.25, 1.0]))
    own = np.array([[0.5, 0.25], [0.5, 0.0]])  # label 2 gets 1/4; 3 gets 1/4 from two votes, and 1 half as much
    found = best_mixed(np.array([[2, 0], [5, -1]]), own, votes, np.array([[1, 0]]), 0.5, np.zeros(6), np.zeros(6), 4)
    assert found.label_ids.tolist() == [[2, 3, 0, 1], [5, -1, -1, -1]]
    np.testing.assert_allclose(np.exp(found.scores), [[0.25, 0.25, 0.125, 0.125], [0.25, 0, 0, 0]])


def test_the_first_label_has_a_penalty_of_its_own():
    votes = Votes(np.array([0, 0, 1]), np.array([3, 4, 1]), np.array([1.0, 0.3, 0.6]))
    own, label_ids = np.array([[1.0, 0.9], [0.2, 0.0]]), np.array([[2, 0], [5, -1]])
    penalty, first = np.array([0.7, 0.1, 0.6, 0, 0, 0.3]), np.array([-0.4, -0.2, -0.1, -0.1, 0, 0])
    found = best_mixed(label_ids, own, votes, NO_PAIRS, 0.5, penalty, first, 4)
    assert found.label_ids.tolist() == [[0, 3, 2, 4], [1, 5, -1, -1]]  # by penalties alone, 3 would be the first
    scores = [np.log(0.45) + 0.4, np.log(0.5), np.log(0.5) - 0.6, np.log(0.15)]
    np.testing.assert_allclose(found.scores[0], scores, rtol=1e-6)
    np.testing.assert_allclose(found.scores[1, :2], [np.log(0.3) + 0.2, np.log(0.1) - 0.3], rtol=1e-6)


def test_labels_that_tie_for_the_first_place_both_have_its_penalty():
    votes = Votes(np.array([0]), np.array([1]), np.array([0.5]))
    found = best_mixed(np.array([[2]]), np.array([[0.5]]), votes, NO_PAIRS, 0.5, np.ones(3), np.full(3, -0.1), 2)
    assert found.label_ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(found.scores, np.log(0.25) + 0.1, rtol=1e-6)


@pytest.mark.parametrize("cells", [1, 60])  # blocks of one query and of three
def test_the_size_of_a_block_changes_no_bit(monkeypatch, cells):
    rng = np.random.default_rng(0)
    label_ids = np.array([rng.permutation(20)[:6] for _ in range(7)])
    rows = np.sort(rng.integers(0, 7, 90))
    votes = Votes(rows, rng.integers(0, 20, 90), rng.random(90))
    given = label_ids, rng.random((7, 6)), votes, np.array([[3, 4], [6, 19]]), 0.3, rng.random(20), -rng.random(20), 5
    together = best_mixed(*given)
    monkeypatch.setattr("hf_xmc.search.mixing.CELLS", cells)
    for one, other in zip(best_mixed(*given), together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_label_without_weight_and_vote_is_left_out():
    votes = Votes(np.array([0]), np.array([1]), np.array([0.0]))
    found = best_mixed(np.array([[2]]), np.array([[0.5]]), votes, NO_PAIRS, 1.0, np.zeros(3), np.zeros(3), 2)
    assert found.label_ids.tolist() == [[-1, -1]]
