"""Probabilities that come true, and thresholds that hold what they promise."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import LABELS
from forge import forge

from hf_xmc import TopK, XMCModel
from hf_xmc.calibration import Calibration, expected_calibration_error, scores_and_hits, threshold_for_precision


def predictions(seed, num_queries=3000, k=5):
    """Scores whose probability is known: the logistic function of twice the score."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(size=(num_queries, k)), axis=1)
    label_ids = np.tile(np.arange(k), (num_queries, 1))
    right = rng.random((num_queries, k)) < 1 / (1 + np.exp(-2 * scores))
    return TopK(label_ids, scores.astype(np.float32)), sp.csr_array(right.astype(float))


def test_probabilities_come_true_on_other_queries():
    calibration = Calibration.fit(*predictions(0))
    scores, hits = scores_and_hits(*predictions(1))
    assert expected_calibration_error(calibration(scores), hits) < 0.02
    assert expected_calibration_error(1 / (1 + np.exp(-scores)), hits) > 0.05  # not calibrated
    np.testing.assert_allclose(calibration(np.array([-1.0, 0, 1])), 1 / (1 + np.exp([2.0, 0, -2])), atol=0.06)


def test_a_threshold_holds_its_precision_on_other_queries():
    threshold = threshold_for_precision(*scores_and_hits(*predictions(0)), 0.8)
    scores, hits = scores_and_hits(*predictions(1))
    assert hits[scores >= threshold].mean() == pytest.approx(0.8, abs=0.02)


def test_padding_is_no_prediction():
    found = TopK(np.array([[1, -1], [0, 1]]), np.array([[2.0, -np.inf], [3.0, 1.0]], np.float32))
    scores, hits = scores_and_hits(found, sp.csr_array([[0, 1], [0, 1]]))
    assert scores.tolist() == [2, 3, 1]
    assert hits.tolist() == [1, 0, 1]
    assert Calibration((0.0, 1.0), (0.2, 0.9))(np.array([-np.inf, -5, 0.5, 9])).tolist() == [0, 0.2, 0.55, 0.9]


def test_the_error_is_the_mean_gap_of_bins_by_their_size():
    # Two bins: mean 0.1 against 0.5 right, and 0.9 against all right.
    error = expected_calibration_error(np.array([0.1, 0.1, 0.9, 0.9]), np.array([1.0, 0, 1, 1]), bins=2)
    assert error == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)


def test_equal_scores_stand_on_one_side_of_a_threshold():
    assert threshold_for_precision(np.array([0.9, 0.5, 0.5, 0.5]), np.array([1, 1, 0, 0]), 0.6) == 0.9


def test_a_calibration_is_saved_to_the_last_bit(encoder, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.calibration = Calibration.fit(*predictions(0))
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").calibration == model.calibration
    assert XMCModel.from_pretrained(tmp_path / "model", labels=["boat"]).calibration is None  # one of other labels
    model.calibration = None
    model.save_pretrained(tmp_path / "model")
    assert XMCModel.from_pretrained(tmp_path / "model").calibration is None


@pytest.mark.parametrize(
    ("scores", "probabilities", "wrong"),
    [
        ([], [], "0 scores and 0 probabilities"),
        ([1], [0.1, 0.2], "1 scores and 2 probabilities"),
        ([[1, 2]], [[0.1, 0.2]], "as many, and one"),
        ([1, 1], [0.1, 0.2], "scores of a calibration are finite and rise"),
        ([1, float("inf")], [0.1, 0.2], "scores of a calibration are finite and rise"),
        ([float("nan")], [0.1], "scores of a calibration are finite and rise"),
        ([1, 2], [0.2, 0.1], "between 0 and 1 and never fall"),
        ([1, 2], [0.2, 1.5], "between 0 and 1 and never fall"),
        ([1, 2], [-0.2, 1], "between 0 and 1 and never fall"),
        ([1], [float("nan")], "between 0 and 1 and never fall"),
        (["a"], [0.1], "could not convert string"),
        ({"a": 1}, [0.1], "float"),
    ],
)
def test_points_that_are_no_rising_map_are_refused_saved_or_not(scores, probabilities, wrong, encoder, tmp_path):
    model = XMCModel(encoder, LABELS)
    model.calibration = Calibration((0.0,), (0.5,))
    model.save_pretrained(tmp_path / "model")
    forged = json.dumps({"scores": scores, "probabilities": probabilities}).encode()
    forge(tmp_path / "model", {"calibration.json": forged})
    with pytest.raises(ValueError, match=f"calibration.json does not hold a calibration as it was saved .*{wrong}"):
        XMCModel.from_pretrained(tmp_path / "model")


def test_bad_input_says_what_was_got():
    with pytest.raises(
        ValueError, match=r"no threshold reaches a precision of 0.9; the best on these queries is 0.500"
    ):
        threshold_for_precision(np.array([0.5, 0.5]), np.array([1, 0]), 0.9)
    with pytest.raises(ValueError, match="no prediction to calibrate on"):
        Calibration.fit(TopK(np.full((1, 1), -1), np.full((1, 1), -np.inf)), sp.csr_array((1, 3)))
