"""The metrics against hand-computed values, scikit-learn and independent loops."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from hf_xmc.metrics.frequency import inverse_propensity
from hf_xmc.metrics.ranking import (
    drop_filter_pairs,
    evaluate_ranking,
    ndcg_at_k,
    precision_at_k,
    psndcg_at_k,
    psp_at_k,
    psr_at_k,
    recall_at_k,
)

TRUTH = sp.csr_array(np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]))
PREDICTED = np.array([[2, 1, 0], [4, 3, 2], [3, 1, -1]])  # right wrong right; no positive; wrong right nothing


def test_metrics_equal_hand_computed_values():
    got = evaluate_ranking(PREDICTED, TRUTH, p_at=(1, 3), ndcg_at=(3,), recall_at=(2, 3))
    assert got["P@1"] == (1 + 0) / 2
    assert got["P@3"] == (2 / 3 + 1 / 3) / 2
    assert got["R@2"] == pytest.approx((1 / 3 + 1) / 2)
    assert got["R@3"] == pytest.approx((2 / 3 + 1) / 2)
    first = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    second = 1 / math.log2(3)
    assert got["nDCG@3"] == pytest.approx((first + second) / 2)
    assert (got["num_queries"], got["num_empty"]) == (3, 1)


def test_psp_is_a_ratio_of_means():
    worth = np.array([1.0, 2.0, 4.0, 1.0, 8.0])
    # k = 2. Query 0 finds label 2 (worth 4) of the best 8 + 4; query 2 finds label 1 (worth 2) of the best 2.
    got = psp_at_k(PREDICTED, TRUTH, worth, k=2)
    assert got == pytest.approx((4 + 2) / (12 + 2))
    assert got != pytest.approx((4 / 12 + 2 / 2) / 2)


def test_psndcg_and_psr_are_ratios_of_means():
    worth = np.array([1.0, 2.0, 4.0, 1.0, 8.0])
    second = 1 / math.log2(3)
    # Query 0, of three positives, finds label 2 first; the best are 8, then 4. Query 2 finds its only one second.
    found, best = [4, 2 * second], [8 + 4 * second, 2]
    norms = [1 + second, 1]
    expected = (found[0] / norms[0] + found[1] / norms[1]) / (best[0] / norms[0] + best[1] / norms[1])
    assert psndcg_at_k(PREDICTED, TRUTH, worth, k=2) == pytest.approx(expected)
    assert psr_at_k(PREDICTED, TRUTH, worth, k=2) == pytest.approx((4 / 3 + 2 / 1) / (12 / 3 + 2 / 1))
    got = evaluate_ranking(PREDICTED, TRUTH, inverse_propensity=worth, p_at=[1], ndcg_at=[2], recall_at=[2])
    assert got["PSnDCG@2"] == psndcg_at_k(PREDICTED, TRUTH, worth, k=2)
    assert got["PSR@2"] == psr_at_k(PREDICTED, TRUTH, worth, k=2)
    perfect = np.array([[4, 2, 0], [0, 1, 2], [1, 0, 2]])
    for k in (1, 2, 3):
        assert psndcg_at_k(perfect, TRUTH, worth, k) == psr_at_k(perfect, TRUTH, worth, k) == 1
    alike = np.ones(5)  # where all labels are worth the same and k covers all positives, PSnDCG is nDCG, and PSR is R
    assert psndcg_at_k(PREDICTED, TRUTH, alike, k=3) == pytest.approx(ndcg_at_k(PREDICTED, TRUTH, k=3))
    assert psr_at_k(PREDICTED, TRUTH, alike, k=3) == pytest.approx(recall_at_k(PREDICTED, TRUTH, k=3))


def loops(predicted, truth, worth, k):
    """P, R, nDCG, PSP, PSnDCG, PSR of a dense truth, one place at a time."""
    p = r = n = asked = 0.0
    gain, best = [0.0] * 3, [0.0] * 3
    for places, labels in zip(predicted, truth, strict=True):
        positives = [j for j, v in enumerate(labels) if v]
        if not positives:
            continue
        asked += 1
        hits = [int(j in positives) for j in places[:k]]
        p += sum(hits) / k
        r += sum(hits) / len(positives)
        ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(positives))))
        n += sum(h / math.log2(i + 2) for i, h in enumerate(hits)) / ideal
        worths = [worth[j] * h for j, h in zip(places[:k], hits, strict=True)]
        bests = sorted((worth[j] for j in positives), reverse=True)[:k]
        for total, row in ((gain, worths), (best, bests)):
            total[0] += sum(row)
            total[1] += sum(w / math.log2(i + 2) for i, w in enumerate(row)) / ideal
            total[2] += sum(row) / len(positives)
    return p / asked, r / asked, n / asked, *(g / b for g, b in zip(gain, best, strict=True))


cases = st.tuples(st.integers(1, 17), st.integers(2, 23), st.integers(0, 2**32 - 1))


def random_case(case):
    num_queries, num_labels, seed = case
    rng = np.random.default_rng(seed)
    truth = (rng.random((num_queries, num_labels)) < 0.3).astype(float)
    truth[0, 0] = 1
    width = int(rng.integers(1, num_labels + 1))
    predicted = np.stack([rng.permutation(num_labels)[:width] for _ in range(num_queries)])
    return truth, predicted, 1 + rng.random(num_labels), int(rng.integers(1, width + 1))


@given(cases)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_metrics_equal_an_independent_implementation(case):
    truth, predicted, worth, k = random_case(case)
    relevance = sp.csr_array(truth)
    got = (
        precision_at_k(predicted, relevance, k),
        recall_at_k(predicted, relevance, k),
        ndcg_at_k(predicted, relevance, k),
        psp_at_k(predicted, relevance, worth, k),
        psndcg_at_k(predicted, relevance, worth, k),
        psr_at_k(predicted, relevance, worth, k),
    )
    assert got == pytest.approx(loops(predicted.tolist(), truth.tolist(), worth, k))


def test_ndcg_equals_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = (rng.random((31, 47)) < 0.2).astype(float)
    truth[:, 0] = 1
    scores = rng.random((31, 47))
    predicted = np.argsort(-scores, axis=1)
    assert ndcg_at_k(predicted, sp.csr_array(truth), 7) == pytest.approx(ndcg_score(truth, scores, k=7))


@given(cases)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_order_of_the_queries_changes_no_bit(case):
    truth, predicted, worth, k = random_case(case)
    shuffle = np.random.default_rng(case[2]).permutation(len(truth))
    arguments = {"p_at": (k,), "ndcg_at": (k,), "recall_at": (k,), "inverse_propensity": worth}
    one = evaluate_ranking(predicted, sp.csr_array(truth), **arguments)
    other = evaluate_ranking(predicted[shuffle], sp.csr_array(truth[shuffle]), **arguments)
    assert one == other


def test_filtered_labels_are_replaced_by_the_following_ones():
    pairs = np.array([[0, 1], [0, 1], [2, 3]])  # one of them named twice
    moved, scores = drop_filter_pairs(PREDICTED, pairs, np.array([[3.0, 2, 1]] * 3))
    assert moved.tolist() == [[2, 0, -1], [4, 3, 2], [1, -1, -1]]
    assert scores.tolist() == [[3, 1, -np.inf], [3, 2, 1], [2, 1, -np.inf]]
    assert evaluate_ranking(PREDICTED, TRUTH, filter_pairs=pairs, p_at=(1,), ndcg_at=(), recall_at=())["P@1"] == 1
    assert drop_filter_pairs(PREDICTED, np.empty((0, 2)))[0].tolist() == PREDICTED.tolist()


def test_metrics_read_graded_and_explicit_zero_relevance():
    truth = sp.csr_array((np.array([0.3, 0.0]), np.array([1, 0]), np.array([0, 2])), shape=(1, 2))
    assert precision_at_k([[0, 1]], truth, 1) == 0
    assert recall_at_k([[1, 0]], truth, 1) == 1


@pytest.mark.parametrize(
    ("predicted", "arguments", "message"),
    [
        ([[0], [1]], {}, "must have the same rows, got 2 and 3"),
        ([[0], [1], [5]], {}, "row 2 predicts label 5, but `relevance` has only 5 labels"),
        ([[0, 0], [1, 2], [3, 4]], {}, "row 0 predicts label 0 twice"),
        ([[0], [1], [2]], {"p_at": (3,)}, "`k` must be at most the 1 columns of `label_ids`, got 3"),
        ([[0.5], [1], [2]], {}, "label_ids must be a two-dimensional array of integers"),
        (
            [[0], [1], [2]],
            {"filter_pairs": np.array([[7, 0]])},
            r"`filter_pairs` has \(row 7, label 0\), outside of \(3, 5\)",
        ),
        (
            [[0], [1], [2]],
            {"inverse_propensity": [1.0]},
            r"of the 5 labels of `relevance`, got shape \(1,\)",
        ),
    ],
)
def test_invalid_input_is_named_in_the_error(predicted, arguments, message):
    arguments = {"p_at": (1,), "ndcg_at": (), "recall_at": (), **arguments}
    with pytest.raises(ValueError, match=message):
        evaluate_ranking(predicted, TRUTH, **arguments)


def test_empty_average_is_an_error_and_not_nan():
    with pytest.raises(ValueError, match="must have a positive in at least one row, got none in 2 rows"):
        precision_at_k([[0], [1]], sp.csr_array((2, 3)), 1)


def test_more_positives_than_queries_are_an_error():
    with pytest.raises(ValueError, match="`counts` must be from 0 to num_train = 5, got 9 for label 1"):
        inverse_propensity([1, 9], num_train=5)


@pytest.mark.parametrize("metric", [psp_at_k, psndcg_at_k, psr_at_k])
@pytest.mark.parametrize("k", [0, -1, 1.5, "2", True])
def test_invalid_k_is_refused(metric, k):
    with pytest.raises(ValueError, match=f"`k` must be a whole number of at least 1, got {k!r}"):
        metric([[0, 1]], sp.csr_array([[1, 0]]), [1, 3], k)
