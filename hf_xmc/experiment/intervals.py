"""Intervals of probabilities and thresholds that are based on few validation queries."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from hf_xmc.data.dataset import XMCData
from hf_xmc.metrics.calibration import Calibration, scores_and_hits
from hf_xmc.model.answers import DEFAULT_TOP_K, MAX_LABELS
from hf_xmc.model.model import XMCModel
from hf_xmc.model.new_labels import new_label_ids
from hf_xmc.topk import TopK

logger = logging.getLogger(__name__)

FEW = 100  # with fewer validation queries, intervals are given
RESAMPLES = 200
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # probabilities that get an interval,
NEAR, FEWEST_NEAR = 0.1, 5  # if there are as many predictions near them, because the map is a guess elsewhere


class Answers(NamedTuple):
    """The best labels of queries by score, and the correct ones ``(N, L)``.

    Attributes:
        said: The best labels by probability, new ones among them, as ``predict`` cuts them at a threshold.
        has_new: Whether there are new labels, which have places of their own in ``predict`` without a threshold.
    """

    found: TopK
    relevance: sp.csr_array
    said: TopK
    has_new: bool = False


def answers_of(model: XMCModel, data: XMCData, split: str) -> Answers:
    """Return the answers of a calibrated model for a split. A query that the memory holds has no vote of its own."""
    assert model.calibration is not None
    texts, k = data.split(split)["text"][:], min(MAX_LABELS, data.num_labels)
    search = partial(model.search, texts, k, leave_one_out=split != "test", exclude=data.filter_pairs.get(split))
    found, has_new = search(), len(new_label_ids(model.label_texts, model.memory)) > 0
    same_order = TopK(found.label_ids, model.calibration(found.scores))
    said = search(probabilities=True, new=0) if has_new else same_order
    return Answers(found, data.relevance(split), said, has_new)


def num_labelled(relevance: sp.csr_array) -> int:
    """Return the number of queries that have a label."""
    return int(np.count_nonzero(np.diff(relevance.indptr)))


def add_intervals(metrics: dict[str, Any], model: XMCModel, validation: Answers, measured: Answers) -> None:
    """Add intervals to the metrics of a calibration that is based on few validation queries, and warn.

    ``ECE@5 interval`` and the intervals in ``probabilities`` contain 95 % of the values of 200 calibrations. Each is
    fitted to a sample with replacement of the validation queries, and its error is measured on such a sample of the
    measured queries. The interval of a threshold contains its precision on validation with 95 % confidence (Wilson,
    1927), and counts each query as one observation, because the labels of a query tend to be right or wrong together.
    So it is wide rather than narrow.

    Args:
        metrics: The metrics, to which this function adds.
        model: A calibrated model.
        validation: The answers that it was calibrated on.
        measured: The answers that the metrics are from.
    """
    assert model.calibration is not None
    metrics |= _of_probabilities(model.calibration, validation, measured)
    said, hits = scores_and_hits(validation.said, validation.relevance)
    for row in metrics["thresholds"]:
        kept = said >= row["threshold"]
        num_queries = int(np.count_nonzero((validation.said.scores >= row["threshold"]).any(1)))
        row["interval"] = wilson_interval(float(hits[kept].mean()) if kept.any() else 0.0, num_queries)
    logger.warning(
        "The probabilities and thresholds are based on %d validation queries with labels, fewer than %d. ECE@5 lies "
        "between %.2f and %.2f.%s%s Add validation queries, or raise validation_size.",
        num_labelled(validation.relevance),
        FEW,
        *metrics["ECE@5 interval"],
        _sentence("A probability of", "means", metrics["probabilities"], "probability"),
        _sentence("A threshold for a precision of", "reaches", metrics["thresholds"], "wanted"),
    )


def about_few_queries(metrics: Mapping[str, Any]) -> str:
    """Return sentences on the intervals in the metrics of a calibration; an empty string without intervals.

    >>> rows = [{"probability": 0.5, "interval": (0.31, 0.7)}]
    >>> about_few_queries({"validation_queries": 12, "ECE@5 interval": (0.02, 0.1), "probabilities": rows})
    'Only 12 texts determine the probabilities: the error is 2.0 to 10.0 points, and 50% may mean 31% to 70%.'
    """
    if "ECE@5 interval" not in metrics:
        return ""
    low, high = metrics["ECE@5 interval"]
    levels = [
        f"{100 * row['probability']:.0f}% may mean {range_of(row['interval'])}" for row in metrics["probabilities"]
    ]
    about = f"Only {metrics['validation_queries']} texts determine the probabilities: "
    about += f"the error is {100 * low:.1f} to {100 * high:.1f} points"
    return f"{about}, and {', '.join(levels)}." if levels else f"{about}."


def range_of(interval: Sequence[float]) -> str:
    """Return an interval in percent.

    >>> range_of((0.31, 0.7))
    '31% to 70%'
    """
    low, high = interval
    return f"{100 * low:.0f}% to {100 * high:.0f}%"


def _sentence(start: str, verb: str, rows: list[dict[str, Any]], name: str) -> str:
    ranges = [f"{row[name]} {verb} {row['interval'][0]:.2f} to {row['interval'][1]:.2f}" for row in rows]
    return f" {start} {', '.join(ranges)}." if ranges else ""


def _of_probabilities(calibration: Calibration, validation: Answers, measured: Answers) -> dict[str, Any]:
    """Return the intervals of ECE@5 and of the probabilities of the first labels."""
    first, asked = _first(validation), _first(measured)
    said, _ = scores_and_hits(TopK(first.found.label_ids, calibration(first.found.scores)), first.relevance)
    levels = [level for level in LEVELS if np.count_nonzero(np.abs(said - level) <= NEAR) >= FEWEST_NEAR]
    scores = np.interp(levels, calibration.probabilities, calibration.scores)  # of these probabilities
    rng = np.random.default_rng(0)
    errors, values = [], []
    for _ in range(RESAMPLES):
        drawn = _drawn(first, rng)
        if not (drawn.found.label_ids >= 0).any():
            continue
        fitted, others = Calibration.fit(drawn.found, drawn.relevance), _drawn(asked, rng)
        errors.append(fitted.error(others.found, others.relevance, DEFAULT_TOP_K))
        values.append(fitted(scores))
    ranges = np.quantile(values, [0.025, 0.975], axis=0).T.tolist()
    return {
        "ECE@5 interval": tuple(np.quantile(errors, [0.025, 0.975]).tolist()),
        "probabilities": [
            {"probability": level, "interval": tuple(ends)} for level, ends in zip(levels, ranges, strict=True)
        ],
    }


def _first(answers: Answers) -> Answers:
    return answers._replace(found=TopK(*(part[:, :DEFAULT_TOP_K] for part in answers.found)))


def _drawn(answers: Answers, rng: np.random.Generator) -> Answers:
    """Return as many queries, drawn with replacement."""
    rows = rng.integers(0, answers.relevance.shape[0], answers.relevance.shape[0])
    return answers._replace(found=TopK(*(part[rows] for part in answers.found)), relevance=answers.relevance[rows])


def wilson_interval(fraction: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction of ``number`` observations: 0 to 1 without observations.

    Example:
        >>> low, high = wilson_interval(0.5, 10)
        >>> round(low, 3), round(high, 3)
        (0.237, 0.763)
    """
    if not number:
        return 0.0, 1.0
    middle = fraction + z**2 / (2 * number)
    reach = z * (fraction * (1 - fraction) / number + z**2 / (4 * number**2)) ** 0.5
    scale = 1 + z**2 / number
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
