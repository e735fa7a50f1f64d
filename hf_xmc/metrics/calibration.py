"""Scores that mean probability, and thresholds: for a wanted precision, the best F1, or a number of labels a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.isotonic import IsotonicRegression

from hf_xmc.topk import TopK


@dataclass(frozen=True)
class Calibration:
    """A rising map from scores to probabilities, one for all: isotonic regression (Zadrozny and Elkan, KDD 2002).

    Where that would give many scores one probability, it is the probability of their mean, and the map is linear from
    there to the next (centered isotonic regression, Oron and Flournoy, 2017): scores that differ are still told apart.

    The same score may mean less at a lower place: a dot product compares labels of one text, not texts. So the labels
    after the ``first`` ones of a text may have a map of their own, ``deeper``, which is never above the other.

    Attributes:
        scores, probabilities: The points, rising.
        first: How many labels of a text the points are for; ``None`` for all.
        deeper: The map for the labels after those.

    Raises:
        ValueError: if the points do not make such a map, or only one of ``first`` and ``deeper`` is given.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    first: int | None = None
    deeper: Calibration | None = None

    def __post_init__(self) -> None:
        scores, probabilities = (np.asarray(points, dtype=np.float64) for points in (self.scores, self.probabilities))
        if scores.ndim != 1 or scores.shape != probabilities.shape or not len(scores):
            raise ValueError(f"{len(scores)} scores and {len(probabilities)} probabilities: expected as many, and one.")
        if not np.isfinite(scores).all() or not (np.diff(scores) > 0).all():
            raise ValueError("the scores of a calibration are finite and rise from point to point.")
        if not ((probabilities >= 0) & (probabilities <= 1)).all() or not (np.diff(probabilities) >= 0).all():
            raise ValueError("the probabilities of a calibration lie between 0 and 1 and never fall.")
        alone = self.first is None and self.deeper is None
        if not alone and (self.deeper is None or not isinstance(self.first, int) or self.first < 1):
            raise ValueError(f"first must be an integer of at least 1 and come with deeper, got {self.first!r}.")

    @classmethod
    def fit(cls, found: TopK, relevance: sp.csr_array, first: int | None = None) -> Calibration:
        """Learn the map from predictions for validation queries, which nothing was trained on.

        Args:
            found: The best labels of ``N`` queries, as many of each as predictions will be read.
            relevance: Sparse ``(N, L)``.
            first: How many labels of a query share a map; those after them get a map of their own. ``None``: all.

        Raises:
            ValueError: if there is no prediction to learn from.
        """
        if first is not None:
            head, tail = (TopK(*(part[:, here] for part in found)) for here in (np.s_[:first], np.s_[first:]))
            above = cls.fit(head, relevance)
            deeper = cls.fit(tail, relevance) if (tail.label_ids >= 0).any() else None
            return above if deeper is None else cls(above.scores, above.probabilities, first, deeper)
        scores, hits = scores_and_hits(found, relevance)
        if not len(scores):
            raise ValueError("there is no prediction to calibrate on: give validation queries with labels.")
        fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(scores, hits)
        probabilities, level_of, size = np.unique(fitted, return_inverse=True, return_counts=True)
        means = np.bincount(level_of, weights=scores) / size
        return cls(tuple(means.tolist()), tuple(probabilities.tolist()))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return probabilities of the shape of ``scores``; 0 for padding, which has a score of minus infinity.

        A column of ``(N, k)`` scores is the place among the labels of a text. Any other shape is of first labels.
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
    """The threshold of the best micro F1, unless a precision or a number of labels is wanted; see below for each.

    Args:
        found: the best labels of ``N`` queries.
        relevance: sparse ``(N, L)``.
        precision, labels_per_text: what is wanted; one of them at most.
    """
    check_wanted(precision, labels_per_text)
    scores, hits = scores_and_hits(found, relevance)
    if precision is not None:
        return threshold_for_precision(scores, hits, precision)
    if labels_per_text is not None:
        return threshold_for_count(scores, relevance.shape[0], labels_per_text)
    return threshold_for_f1(scores, hits, int((relevance.data > 0).sum()))


def check_wanted(precision: float | None, labels_per_text: float | None) -> None:
    """Refuse what no threshold can be chosen for.

    Raises:
        ValueError: if a number is out of range, or both are given.
    """
    if precision is not None and labels_per_text is not None:
        raise ValueError("a threshold is chosen for a precision or for labels_per_text, not for both.")
    if precision is not None and not 0 < precision <= 1:
        raise ValueError(f"precision must be above 0 and at most 1, got {precision}.")
    if labels_per_text is not None and not labels_per_text > 0:
        raise ValueError(f"labels_per_text must be positive, got {labels_per_text}.")


def threshold_for_precision(scores: np.ndarray, hits: np.ndarray, precision: float) -> float:
    """The lowest threshold at which the predictions that reach it are right in ``precision`` of all cases.

    Args:
        scores, hits: as :func:`scores_and_hits` gives them. Of probabilities the threshold is one too.

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
            f"no threshold reaches a precision of {precision}; the best on these queries is {share.max():.3f}."
        )
    return float(thresholds[enough[-1]])


def threshold_for_f1(scores: np.ndarray, hits: np.ndarray, num_positives: int) -> float:
    r"""The threshold of the largest micro F1, :math:`2 \cdot \text{right} / (\text{predicted} + \text{positives})`.

    Args:
        scores, hits: as :func:`scores_and_hits` gives them.
        num_positives: how many labels the queries have in all, found or not.

    >>> threshold_for_f1(np.array([0.9, 0.8, 0.3, 0.2]), np.array([1, 0, 1, 0]), 2)
    0.3
    """
    thresholds, predicted, right = _cuts(scores, hits)
    return float(thresholds[(right / (predicted + num_positives)).argmax()])


def threshold_for_count(scores: np.ndarray, num_queries: int, labels_per_query: float) -> float:
    """The lowest threshold that no more than ``labels_per_query`` predictions a query reach, on average.

    Raises:
        ValueError: if the predictions that share the highest score are already more.

    >>> threshold_for_count(np.array([0.9, 0.8, 0.3, 0.2]), num_queries=2, labels_per_query=1.5)
    0.3
    """
    thresholds, predicted, _ = _cuts(scores, np.zeros(len(scores)))
    few = np.flatnonzero(predicted <= labels_per_query * num_queries)
    if not len(few):
        raise ValueError(f"{predicted[0]} predictions share the highest score: no threshold leaves fewer.")
    return float(thresholds[few[-1]])


def _cuts(scores: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold, highest first, how many predictions reach it, and how many of them are right."""
    if not len(scores):
        raise ValueError("there is no prediction to choose a threshold by.")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # all of equal score reach it, or none
    return ranked[last], last + 1, hits[order].cumsum()[last]


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
