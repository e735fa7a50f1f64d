"""Calibrated probabilities, and thresholds for a given precision, the best F1, or a number of labels per text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.isotonic import IsotonicRegression

from hf_xmc.topk import TopK


@dataclass(frozen=True)
class Calibration:
    """An increasing map from scores to probabilities: isotonic regression (Zadrozny and Elkan, KDD 2002).

    If isotonic regression gives many scores the same probability, the map has one point for them, at their mean score,
    and is linear between points (centered isotonic regression, Oron and Flournoy, 2017). So different scores keep
    different probabilities.

    The same score may mean less at a lower rank: a dot product compares labels of one text, not texts. So the labels
    after the ``first`` ones of a text may have a separate map, ``deeper``, which is never above the first map.

    Attributes:
        scores, probabilities: Points of the map, in increasing order.
        first: Number of labels per text that use these points; ``None`` for all.
        deeper: Map for the labels after the ``first`` ones.

    Raises:
        ValueError: if the points are not an increasing map, or only one of ``first`` and ``deeper`` is given.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    first: int | None = None
    deeper: Calibration | None = None

    def __post_init__(self) -> None:
        scores, probabilities = (np.asarray(points, dtype=np.float64) for points in (self.scores, self.probabilities))
        if scores.ndim != 1 or scores.shape != probabilities.shape or not len(scores):
            raise ValueError(
                f"`scores` and `probabilities` must have the same length, at least 1, got {len(scores)} and "
                f"{len(probabilities)}."
            )
        if not np.isfinite(scores).all() or not (np.diff(scores) > 0).all():
            raise ValueError("`scores` of a calibration must be finite and increasing. Fit it again.")
        if not ((probabilities >= 0) & (probabilities <= 1)).all() or not (np.diff(probabilities) >= 0).all():
            raise ValueError(
                "`probabilities` of a calibration must lie between 0 and 1 and must not decrease. Fit it again."
            )
        alone = self.first is None and self.deeper is None
        if not alone and (self.deeper is None or not isinstance(self.first, int) or self.first < 1):
            raise ValueError(f"`first` must be an integer of at least 1 and requires `deeper`, got {self.first!r}.")

    @classmethod
    def fit(cls, found: TopK, relevance: sp.csr_array, first: int | None = None) -> Calibration:
        """Fit the map to predictions for validation queries that were not used in training.

        Args:
            found: Best labels of ``N`` queries, with as many labels per query as you will use in predictions.
            relevance: Sparse ``(N, L)`` matrix of positives.
            first: Number of labels per query that share a map; later labels get a separate map. ``None`` for all.

        Raises:
            ValueError: if ``found`` has no prediction.
        """
        if first is not None:
            head, tail = (TopK(*(part[:, here] for part in found)) for here in (np.s_[:first], np.s_[first:]))
            above = cls.fit(head, relevance)
            deeper = cls.fit(tail, relevance) if (tail.label_ids >= 0).any() else None
            return above if deeper is None else cls(above.scores, above.probabilities, first, deeper)
        scores, hits = scores_and_hits(found, relevance)
        if not len(scores):
            raise ValueError(
                "calibration needs at least one prediction, got none. Pass validation queries with labels."
            )
        fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(scores, hits)
        probabilities, level_of, size = np.unique(fitted, return_inverse=True, return_counts=True)
        means = np.bincount(level_of, weights=scores) / size
        return cls(tuple(means.tolist()), tuple(probabilities.tolist()))

    @classmethod
    def of(cls, points: Mapping[str, Any]) -> Calibration:
        """Return a calibration from its attributes as a dictionary, such as ``dataclasses.asdict`` makes.

        Raises:
            KeyError: if there are no points.
            ValueError: if they are not an increasing map.

        >>> Calibration.of({"scores": [0, 1], "probabilities": [0.1, 0.9]})(np.array([0.5])).tolist()
        [0.5]
        """
        deeper = points.get("deeper")
        values = tuple(points["scores"]), tuple(points["probabilities"])
        return cls(*values, points.get("first"), deeper and cls.of(deeper))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return probabilities of the shape of ``scores``; 0 for padding, which has a score of minus infinity.

        The column of ``(N, k)`` scores is the rank of the label. Scores of any other shape use the map of first labels.
        """
        result = np.where(np.isneginf(scores), 0.0, np.interp(scores, self.scores, self.probabilities))
        if self.deeper is not None and np.ndim(scores) == 2:
            result[:, self.first :] = np.minimum(result[:, self.first :], self.deeper(scores[:, self.first :]))
        return result

    def error(self, found: TopK, relevance: sp.csr_array, k: int) -> float:
        """Return ECE@k, see :func:`expected_calibration_error`, of the first ``k`` predictions."""
        probabilities = self(found.scores[:, :k])
        return expected_calibration_error(*scores_and_hits(TopK(found.label_ids[:, :k], probabilities), relevance))


def choose_threshold(
    found: TopK, relevance: sp.csr_array, *, precision: float | None = None, labels_per_text: float | None = None
) -> float:
    """Return the threshold with the best micro F1, or with a given precision or number of labels per text.

    Args:
        found: Best labels of ``N`` queries.
        relevance: Sparse ``(N, L)`` matrix of positives.
        precision: Precision to reach, see :func:`threshold_for_precision`.
        labels_per_text: Mean number of labels, see :func:`threshold_for_count`; not together with ``precision``.
    """
    check_wanted(precision, labels_per_text)
    scores, hits = scores_and_hits(found, relevance)
    if precision is not None:
        return threshold_for_precision(scores, hits, precision)
    if labels_per_text is not None:
        return threshold_for_count(scores, relevance.shape[0], labels_per_text)
    return threshold_for_f1(scores, hits, int((relevance.data > 0).sum()))


def check_wanted(precision: float | None, labels_per_text: float | None) -> None:
    """Check the goal of a threshold.

    Raises:
        ValueError: if a number is out of range, or if both are given.
    """
    if precision is not None and labels_per_text is not None:
        raise ValueError("`precision` and `labels_per_text` must not be given together. Choose one of them.")
    if precision is not None and not 0 < precision <= 1:
        raise ValueError(f"`precision` must be above 0 and at most 1, got {precision}.")
    if labels_per_text is not None and not labels_per_text > 0:
        raise ValueError(f"`labels_per_text` must be positive, got {labels_per_text}.")


def threshold_for_precision(scores: np.ndarray, hits: np.ndarray, precision: float) -> float:
    """Return the lowest threshold for which the predictions at or above it have at least the given precision.

    Args:
        scores, hits: Results of :func:`scores_and_hits`. For probabilities, the threshold is a probability.
        precision: Fraction of these predictions that must be correct.

    Raises:
        ValueError: if no threshold reaches the precision.

    >>> threshold_for_precision(np.array([0.9, 0.8, 0.3, 0.2]), np.array([1, 1, 0, 0]), 0.6)
    0.3
    """
    thresholds, predicted, right = _cuts(scores, hits)
    share = right / predicted
    enough = np.flatnonzero(share >= precision)
    if not len(enough):
        raise ValueError(
            f"no threshold reaches a precision of {precision}. The best on these queries is {share.max():.3f}."
        )
    return float(thresholds[enough[-1]])


def threshold_for_f1(scores: np.ndarray, hits: np.ndarray, num_positives: int) -> float:
    r"""Return the threshold of the best micro F1, :math:`2 \cdot \text{hits} / (\text{predicted} + \text{positives})`.

    Args:
        scores, hits: Results of :func:`scores_and_hits`.
        num_positives: Number of positives of all queries, predicted or not.

    >>> threshold_for_f1(np.array([0.9, 0.8, 0.3, 0.2]), np.array([1, 0, 1, 0]), 2)
    0.3
    """
    thresholds, predicted, right = _cuts(scores, hits)
    return float(thresholds[(right / (predicted + num_positives)).argmax()])


def threshold_for_count(scores: np.ndarray, num_queries: int, labels_per_query: float) -> float:
    """Return the lowest threshold that at most ``labels_per_query`` predictions per query reach, on average.

    Raises:
        ValueError: if more predictions than that share the highest score.

    >>> threshold_for_count(np.array([0.9, 0.8, 0.3, 0.2]), num_queries=2, labels_per_query=1.5)
    0.3
    """
    thresholds, predicted, _ = _cuts(scores, np.zeros(len(scores)))
    few = np.flatnonzero(predicted <= labels_per_query * num_queries)
    if not len(few):
        raise ValueError(f"{predicted[0]} predictions share the highest score, so no threshold returns fewer.")
    return float(thresholds[few[-1]])


def _cuts(scores: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all thresholds, highest first, with the numbers of predictions and of hits at or above each."""
    if not len(scores):
        raise ValueError("a threshold needs at least one prediction, got none. Pass validation queries with labels.")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # equal scores reach a threshold together
    return ranked[last], last + 1, hits[order].cumsum()[last]


def expected_calibration_error(probabilities: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    r"""Return the ECE, :math:`\sum_b \frac{n_b}{n} |\bar p_b - \bar y_b|` over equal bins (Guo et al., ICML 2017).

    With the first k predictions of each query, this is ECE@k.

    >>> expected_calibration_error(np.array([0.5, 0.5]), np.array([1, 0]))
    0.0
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=probabilities - hits, minlength=bins)
    return float(np.abs(gap).sum() / max(1, len(hits)))


def scores_and_hits(found: TopK, relevance: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of all predictions without padding, and whether each is a hit (1 or 0), both flat."""
    rows, places = np.nonzero(found.label_ids >= 0)
    if not len(rows):
        return np.empty(0), np.empty(0)
    hits = np.asarray(relevance[rows, found.label_ids[rows, places]]).ravel() > 0
    return found.scores[rows, places].astype(np.float64), hits.astype(np.float64)
