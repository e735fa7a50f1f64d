r"""Ranking metrics of extreme classification, from sparse predictions: P@k, nDCG@k, R@k, PSP@k, PSnDCG@k, PSR@k.

Every function takes the same two arguments and never builds a queries-by-labels array:

* ``label_ids``: ``(N, k_max)`` integers, the predicted labels of each query, best first. -1 is padding and a miss.
* ``relevance``: sparse ``(N, L)`` matrix; any value above 0 makes the label a positive.

Every metric is a fraction between 0 and 1 over the queries that have a positive. Other queries are skipped, and
:func:`evaluate_ranking` counts them as ``num_empty``. If no query has a positive, the metrics raise ``ValueError``.

Results do not depend on the order of the queries, bit for bit: hits are counted in integers, and fractions are added
with :func:`math.fsum`, which rounds only once, at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from hf_xmc.metrics.cells import (
    BoolArray,
    FloatArray,
    IntArray,
    SparseMatrix,
    binarize,
    cells_among,
    drop_filter_pairs,
    integers,
)


def precision_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""Return the fraction of the first k labels that are positives, :math:`\text{P@}k = |\text{top}_k \cap P| / k`.

    The denominator is k even if a query has fewer positives, as is standard.

    >>> precision_at_k([[2, 1, 0, 3]], sp.csr_array([[1, 0, 1, 0]]), k=4)  # hit, miss, hit, miss
    0.5
    """
    return match_predictions(label_ids, relevance).precision(k)


def recall_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""Return the fraction of positives within the first k labels, :math:`\text{R@}k = |\text{top}_k \cap P| / |P|`.

    >>> recall_at_k([[2, 1, 0, 3]], sp.csr_array([[1, 0, 1, 0]]), k=2)  # one of two
    0.5
    """
    return match_predictions(label_ids, relevance).recall(k)


def ndcg_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""Return the discounted gain of the first k labels, divided by the best possible one; a positive has a gain of 1.

    .. math:: \text{nDCG@}k = \sum_{j \le k,\, \text{hit}_j} \frac{1}{\log_2(1 + j)}
                       \Big/ \sum_{j \le \min(k, |P|)} \frac{1}{\log_2(1 + j)}

    >>> ndcg_at_k([[0, 1, 2]], sp.csr_array([[0, 0, 1]]), k=3)  # third: 1 / log2(4) of a possible 1
    0.5
    """
    return match_predictions(label_ids, relevance).ndcg(k)


def psp_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Return propensity-scored precision: a hit counts its label's inverse propensity :math:`w_l`, more if it is rare.

    .. math:: \text{PSP@}k = \sum_q \sum_{l \in \text{top}_k \cap P_q} w_l
                      \Big/ \sum_q \max_{S \subseteq P_q,\, |S| \le k} \sum_{l \in S} w_l

    This is a ratio of means over the queries, as defined by the Extreme Classification Repository, and not the mean of
    the queries' ratios. ``inverse_propensity`` has shape ``(L,)``. Source: Jain, Prabhu, Varma, KDD 2016.

    >>> psp_at_k([[0], [0]], sp.csr_array([[1, 0], [0, 1]]), [1, 3], k=1)  # gains 1 + 0 of a possible 1 + 3
    0.25
    """
    return match_predictions(label_ids, relevance).psp(inverse_propensity, k)


def psndcg_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Return propensity-scored nDCG: the gain of a hit at rank j is :math:`w_l / \log_2(1 + j)`.

    .. math:: \text{PSnDCG@}k = \sum_q \frac{\text{DCG}_q}{n_q} \Big/ \sum_q \frac{\text{best DCG}_q}{n_q},
              \qquad n_q = \sum_{j \le \min(k, |P_q|)} \frac{1}{\log_2(1 + j)}

    The best DCG ranks positives by :math:`w_l`, largest first. This is a ratio of means, as in pyxclib and napkinXC.

    >>> psndcg_at_k([[1, 0], [0, 1]], sp.csr_array([[1, 0], [1, 0]]), [3, 1], k=1)  # gains 0 + 3 of 3 + 3
    0.5
    """
    return match_predictions(label_ids, relevance).psndcg(inverse_propensity, k)


def psr_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Return propensity-scored recall: PSP with both sums of a query divided by its number of positives :math:`|P_q|`.

    This is a ratio of means, as in pyxclib and napkinXC. The denominator counts only the best k positives.

    >>> psr_at_k([[0], [0]], sp.csr_array([[1, 1], [1, 0]]), [1, 3], k=1)  # gains 1/2 + 1/1 of 3/2 + 1/1
    0.6
    """
    return match_predictions(label_ids, relevance).psr(inverse_propensity, k)


def evaluate_ranking(
    label_ids: ArrayLike,
    relevance: SparseMatrix,
    *,
    inverse_propensity: ArrayLike | None = None,
    filter_pairs: ArrayLike | None = None,
    p_at: Sequence[int] = (1, 3, 5),
    ndcg_at: Sequence[int] = (1, 3, 5),
    recall_at: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """Compute all metrics of a set of predictions, with a single lookup in ``relevance``.

    Args:
        label_ids: ``(N, k_max)`` predicted labels, best first, padded with -1.
        relevance: Sparse ``(N, L)`` matrix of positives.
        inverse_propensity: ``(L,)`` values from :func:`inverse_propensity` on the *training* labels. They add
            ``PSP@k``, ``PSnDCG@k`` and ``PSR@k`` for the k of ``P``, ``nDCG`` and ``R``.
        filter_pairs: ``(M, 2)`` cells that :func:`drop_filter_pairs` removes first. Later labels move up, so predict a
            few more labels than the largest k. Positives are not filtered.
        p_at, ndcg_at, recall_at: Values of k for each metric.

    Returns:
        Each metric, then ``num_queries`` and ``num_empty``, the number of queries without a positive.

    Raises:
        ValueError: if a k exceeds the columns of ``label_ids``, or a label is out of range or repeated in a row.

    >>> evaluate_ranking([[2], [0]], sp.csr_array([[0, 0, 1], [0, 0, 0]]), p_at=[1], ndcg_at=[1], recall_at=[1])
    {'P@1': 1.0, 'nDCG@1': 1.0, 'R@1': 1.0, 'num_queries': 2, 'num_empty': 1}
    """
    matches = match_predictions(label_ids, relevance, filter_pairs)
    metrics: dict[str, float] = {}
    for name, places in (("P", p_at), ("nDCG", ndcg_at), ("R", recall_at)):
        metrics |= {f"{name}@{k}": matches.measure(name, k) for k in places}
        if inverse_propensity is not None:
            metrics |= {f"PS{name}@{k}": matches.measure(f"PS{name}", k, inverse_propensity) for k in places}
    return metrics | {"num_queries": len(matches.hits) + matches.num_empty, "num_empty": matches.num_empty}


@dataclass(frozen=True)
class _Matches:
    """The queries that have a positive, with each prediction marked as hit or miss; the input of all metrics."""

    label_ids: IntArray  # (n, k_max)
    hits: BoolArray  # (n, k_max)
    positives: sp.csr_array  # (n, L)
    num_positives: IntArray  # (n,), at least 1
    num_empty: int  # number of queries without a positive

    def top(self, k: int) -> BoolArray:
        check_k(k)
        if k > self.hits.shape[1]:
            raise ValueError(
                f"`k` must be at most the {self.hits.shape[1]} columns of `label_ids`, got {k}. Predict more labels."
            )
        return self.hits[:, :k]

    def precision(self, k: int) -> float:
        return int(np.count_nonzero(self.top(k))) / (k * len(self.hits))

    def recall(self, k: int) -> float:
        return _mean(np.count_nonzero(self.top(k), axis=1) / self.num_positives)

    def ndcg(self, k: int) -> float:
        # cumsum adds from left to right in every row and in the ideal. So a perfect ranking is exactly 1, and the value
        # of a row does not depend on its position, as it may in a matrix product.
        gain = np.cumsum(self.top(k) * _discount(k), axis=1)[:, -1]
        return _mean(gain / self.ideal(k))

    def ideal(self, k: int) -> FloatArray:
        """Return the best DCG of each query, ``(n,)``, if every positive has a gain of 1."""
        ideal: FloatArray = np.cumsum(_discount(k))[np.minimum(self.num_positives, k) - 1]
        return ideal

    def psp(self, inverse_propensity: ArrayLike, k: int) -> float:
        return self._share_of_best(inverse_propensity, self.top(k), np.ones(k), np.ones(len(self.hits)))

    def psndcg(self, inverse_propensity: ArrayLike, k: int) -> float:
        return self._share_of_best(inverse_propensity, self.top(k), _discount(k), self.ideal(k))

    def psr(self, inverse_propensity: ArrayLike, k: int) -> float:
        return self._share_of_best(inverse_propensity, self.top(k), np.ones(k), self.num_positives)

    def measure(self, name: str, k: int, *weights: ArrayLike) -> float:
        methods = {"P": "precision", "nDCG": "ndcg", "R": "recall", "PSP": "psp", "PSnDCG": "psndcg", "PSR": "psr"}
        value: float = getattr(self, methods[name])(*weights, k)
        return value

    def _share_of_best(
        self, inverse_propensity: ArrayLike, hits: BoolArray, discount: FloatArray, norm: ArrayLike
    ) -> float:
        """Return the ratio of the gains to the best possible ones, both discounted by rank, normalised, and summed."""
        weights, k = self.check_per_label(inverse_propensity, "inverse_propensity", least=1), len(discount)
        # With labels renumbered by decreasing weight, sorting the indices of a row puts its best gains first.
        heaviest = np.argsort(-weights, kind="stable")
        indices, indptr = np.argsort(heaviest)[self.positives.indices], self.positives.indptr
        best = sp.csr_array((self.positives.data, indices, indptr), shape=self.positives.shape)
        best.sort_indices()
        row, norm = np.repeat(np.arange(len(self.hits)), self.num_positives), np.asarray(norm)
        place = np.arange(best.nnz) - indptr[row]
        row, place, best_labels = row[place < k], place[place < k], heaviest[best.indices[place < k]]
        best_gains = weights[best_labels] * discount[place] / norm[row]
        row, place = np.nonzero(hits)
        gains = weights[self.label_ids[row, place]] * discount[place] / norm[row]
        return math.fsum(gains.tolist()) / math.fsum(best_gains.tolist())

    def hits_per_label(self, k: int) -> IntArray:
        return np.bincount(self.label_ids[:, :k][self.top(k)], minlength=self.positives.shape[1])

    def check_per_label(self, values: ArrayLike, name: str, least: float) -> FloatArray:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != self.positives.shape[1:]:
            raise ValueError(
                f"`{name}` must have one value for each of the {self.positives.shape[1]} labels of `relevance`, got "
                f"shape {array.shape}."
            )
        for label in np.flatnonzero(~(np.isfinite(array) & (array >= least)))[:1]:
            raise ValueError(f"`{name}` must be finite and at least {least}, got {array[label]} for label {label}.")
        return array


def match_predictions(label_ids: ArrayLike, relevance: SparseMatrix, filter_pairs: ArrayLike | None = None) -> _Matches:
    label_ids, positives = integers(label_ids, "label_ids"), binarize(relevance)
    num_queries, num_labels = positives.shape
    if len(label_ids) != num_queries:
        raise ValueError(
            f"`label_ids` and `relevance` must have the same rows, got {len(label_ids)} and {num_queries}."
        )
    for row, place in np.argwhere((label_ids < -1) | (label_ids >= num_labels))[:1]:
        raise ValueError(
            f"row {row} predicts label {label_ids[row, place]}, but `relevance` has only {num_labels} labels (ids 0 to "
            f"{num_labels - 1}; -1 is padding). Do both use the same label ids?"
        )
    by_id = np.sort(label_ids, axis=1)
    for row, place in np.argwhere((by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] >= 0))[:1]:
        raise ValueError(
            f"row {row} predicts label {by_id[row, place]} twice, but a hit counts once. Keep the better rank."
        )
    if filter_pairs is not None:
        label_ids, _ = drop_filter_pairs(label_ids, filter_pairs, num_labels=num_labels)
    num_positives = np.diff(positives.indptr)
    kept = num_positives > 0
    if not kept.any():
        raise ValueError(f"`relevance` must have a positive in at least one row, got none in {num_queries} rows.")
    matches: IntArray = label_ids[kept]
    positives, num_positives = positives[kept], num_positives[kept]
    rows = np.repeat(np.arange(len(matches)), num_positives)
    hits = cells_among(matches, rows, positives.indices)
    return _Matches(matches, hits, positives, num_positives, num_empty=int(np.count_nonzero(~kept)))


def check_k(k: int) -> None:
    """Raise ``ValueError`` if ``k`` is not a whole number of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"`k` must be a whole number of at least 1, got {k!r}.")


def _discount(k: int) -> FloatArray:
    discount: FloatArray = 1 / np.log2(np.arange(2, k + 2))
    return discount


def _mean(values: FloatArray) -> float:
    return math.fsum(values.tolist()) / len(values)
