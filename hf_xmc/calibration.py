"""Scores that mean probability, and thresholds for a wanted precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.isotonic import IsotonicRegression

from hf_xmc.index import TopK


@dataclass(frozen=True)
class Calibration:
    """A rising map from scores to probabilities, linear between its points: isotonic regression, one for all labels.

    Source: Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability Estimates, 2002.

    Attributes:
        scores, probabilities: the points, rising.

    Raises:
        ValueError: points that make no such map.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        scores, probabilities = (np.asarray(points, dtype=np.float64) for points in (self.scores, self.probabilities))
        if scores.ndim != 1 or scores.shape != probabilities.shape or not len(scores):
            raise ValueError(f"{len(scores)} scores and {len(probabilities)} probabilities: expected as many, and one.")
        if not np.isfinite(scores).all() or not (np.diff(scores) > 0).all():
            raise ValueError("the scores of a calibration are finite and rise from point to point.")
        if not ((probabilities >= 0) & (probabilities <= 1)).all() or not (np.diff(probabilities) >= 0).all():
            raise ValueError("the probabilities of a calibration lie between 0 and 1 and never fall.")

    @classmethod
    def fit(cls, found: TopK, relevance: sp.csr_array) -> Calibration:
        """Learn the map from predictions of validation queries, which nothing was trained on.

        Args:
            found: the best labels of ``N`` queries, as many of each as predictions will be read.
            relevance: sparse ``(N, L)``.

        Raises:
            ValueError: there is no prediction to learn from.
        """
        scores, hits = scores_and_hits(found, relevance)
        if not len(scores):
            raise ValueError("there is no prediction to calibrate on: give validation queries with labels.")
        model = IsotonicRegression(y_min=0, y_max=1).fit(scores, hits)
        return cls(tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_)))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities of the shape of ``scores``; 0 for padding, which has a score of minus infinity."""
        return np.where(np.isneginf(scores), 0.0, np.interp(scores, self.scores, self.probabilities))


def threshold_for_precision(scores: np.ndarray, hits: np.ndarray, precision: float) -> float:
    """The lowest threshold at which the predictions that reach it are right in ``precision`` of all cases.

    Of scores it is finer than of probabilities, which isotonic regression gives in steps.

    Raises:
        ValueError: none is.

    >>> threshold_for_precision(np.array([0.9, 0.8, 0.3, 0.2]), np.array([1, 1, 0, 0]), 0.6)
    0.3
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    share = hits[order].cumsum() / np.arange(1, len(order) + 1)
    last = np.append(ranked[1:] != ranked[:-1], True)  # a threshold takes all of equal score, or none
    enough = np.flatnonzero((share >= precision) & last)
    if not len(enough):
        best = share[last].max(initial=0)
        raise ValueError(f"no threshold reaches a precision of {precision}; the best on these queries is {best:.3f}.")
    return float(ranked[enough[-1]])


def expected_calibration_error(probabilities: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    r"""ECE: :math:`\sum_b \frac{n_b}{n} |\bar p_b - \bar y_b|` over bins of equal width (Guo et al., ICML 2017).

    Of the first k predictions of each query, it is ECE@k.

    >>> expected_calibration_error(np.array([0.5, 0.5]), np.array([1, 0]))
    0.0
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=probabilities - hits, minlength=bins)
    return float(np.abs(gap).sum() / max(1, len(hits)))


def scores_and_hits(found: TopK, relevance: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The scores of all predictions in one row, padding aside, and whether each is right (0 or 1)."""
    rows, places = np.nonzero(found.label_ids >= 0)
    if not len(rows):
        return np.empty(0), np.empty(0)
    hits = np.asarray(relevance[rows, found.label_ids[rows, places]]).ravel() > 0
    return found.scores[rows, places].astype(np.float64), hits.astype(np.float64)
