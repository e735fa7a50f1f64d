"""Few validation queries give wide intervals, which contain the true values; many give none."""

import types

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc.experiment.intervals import Answers, add_intervals, wilson_interval
from hf_xmc.metrics.calibration import Calibration
from hf_xmc.topk import TopK


def answers(number, seed):
    """Answers of five labels, each correct with a probability equal to its score."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.random((number, 5)), axis=1)
    hits = sp.csr_array((rng.random((number, 5)) < scores).astype(np.float32))
    return calibrated(TopK(np.tile(np.arange(5), (number, 1)), scores.astype(np.float32)), hits)


def calibrated(found, hits):
    return Answers(found, hits, TopK(found.label_ids, Calibration.fit(found, hits)(found.scores)))


def intervals(number, seed):
    validation = answers(number, seed)
    model = types.SimpleNamespace(calibration=Calibration.fit(*validation[:2]))
    metrics = {"thresholds": [{"wanted": 0.5, "threshold": 0.4}]}
    add_intervals(metrics, model, validation, answers(300, seed + 100))
    return metrics


def test_intervals_contain_the_true_values_and_shrink_with_more_queries(caplog):
    few, more = ([intervals(number, seed) for seed in range(10)] for number in (12, 90))
    for found in (few, more):
        inside = [
            low <= row["probability"] <= high
            for metrics in found
            for row in metrics["probabilities"]
            for low, high in [row["interval"]]
        ]
        assert len(inside) >= 20
        assert np.mean(inside) > 0.75

    def width(found, name):
        ends = [row["interval"] for metrics in found for row in metrics[name]]
        return np.mean([high - low for low, high in ends])

    assert width(few, "probabilities") > 1.5 * width(more, "probabilities")
    assert width(few, "thresholds") > 1.5 * width(more, "thresholds")
    errors = [np.mean([metrics["ECE@5 interval"] for metrics in found], axis=0) for found in (few, more)]
    assert (errors[0] > errors[1]).all()
    assert "A threshold for a precision of 0.5 reaches" in caplog.text


def test_a_probability_that_no_label_has_gets_no_interval():
    scores = np.tile(np.float32([4, 3, -3, -4, -5]), (30, 1))
    validation = calibrated(TopK(np.tile(np.arange(5), (30, 1)), scores), sp.csr_array(scores > 0, dtype=np.float32))
    metrics = {"thresholds": []}
    model = types.SimpleNamespace(calibration=Calibration.fit(*validation[:2]))
    add_intervals(metrics, model, validation, validation)
    assert [row["probability"] for row in metrics["probabilities"]] == [0.1, 0.9]  # of the scores -3 and 3


def test_intervals_are_reproducible():
    assert intervals(12, 0) == intervals(12, 0)


@pytest.mark.parametrize(
    ("share", "number", "interval"),
    [(0.0, 0, (0, 1)), (1.0, 1, (0.2065, 1)), (0.5, 10, (0.2366, 0.7634)), (0.9, 100, (0.8256, 0.9448))],
)
def test_the_wilson_interval_is_that_of_the_tables(share, number, interval):
    assert wilson_interval(share, number) == pytest.approx(interval, abs=1e-4)
