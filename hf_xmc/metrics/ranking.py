r"""The ranking metrics of extreme classification, from sparse predictions: P@k, nDCG@k, R@k, PSP@k, PSnDCG@k, PSR@k.

Every function reads the same two things and never builds a queries-by-labels array:

* ``label_ids``: ``(N, k_max)`` integers, the predicted labels of each query, best first. -1 is an empty place: a miss.
* ``relevance``: sparse ``(N, L)``; a value above 0 makes the label a positive, whatever the value.

Every metric is a fraction between 0 and 1 over the queries that have a positive. The others are skipped, and
:func:`evaluate_ranking` counts them as ``num_empty``; where none is left there is nothing to average: a ``ValueError``.

Each result is the same to the last bit in whatever order the queries come: hits are counted in integers, and fractions
are added by :func:`math.fsum`, which rounds once, at the end, and so cannot see the order of its terms.
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
    cells_among,
    drop_filter_pairs,
    integers,
    positive_cells,
)


def precision_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""The share of the first k places that hold a positive: :math:`\text{P@}k = |\text{top}_k \cap P| / k`.

    All k places count even where a query has fewer positives, as everywhere in the field.

    >>> precision_at_k([[2, 1, 0, 3]], sp.csr_array([[1, 0, 1, 0]]), k=4)  # right, wrong, right, wrong
    0.5
    """
    return judge(label_ids, relevance).precision(k)


def recall_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""The share of a query's positives found in the first k places: :math:`\text{R@}k = |\text{top}_k \cap P| / |P|`.

    >>> recall_at_k([[2, 1, 0, 3]], sp.csr_array([[1, 0, 1, 0]]), k=2)  # one of two
    0.5
    """
    return judge(label_ids, relevance).recall(k)


def ndcg_at_k(label_ids: ArrayLike, relevance: SparseMatrix, k: int) -> float:
    r"""The discounted gain of the first k places over the best that the query allows; the gain of a positive is 1.

    .. math:: \text{nDCG@}k = \sum_{j \le k,\, \text{hit}_j} \frac{1}{\log_2(1 + j)}
                       \Big/ \sum_{j \le \min(k, |P|)} \frac{1}{\log_2(1 + j)}

    >>> ndcg_at_k([[0, 1, 2]], sp.csr_array([[0, 0, 1]]), k=3)  # found third: 1 / log2(4), where 1 was possible
    0.5
    """
    return judge(label_ids, relevance).ndcg(k)


def psp_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Propensity-scored precision: a hit is worth its label's inverse propensity :math:`w_l`, more if it is rare.

    .. math:: \text{PSP@}k = \sum_q \sum_{l \in \text{top}_k \cap P_q} w_l
                      \Big/ \sum_q \max_{S \subseteq P_q,\, |S| \le k} \sum_{l \in S} w_l

    A ratio of means over the queries, as the Extreme Classification Repository defines it; the mean of the queries'
    ratios is another number. ``inverse_propensity`` has shape ``(L,)``. Source: Jain, Prabhu, Varma, KDD 2016.

    >>> psp_at_k([[0], [0]], sp.csr_array([[1, 0], [0, 1]]), [1, 3], k=1)  # gains 1 + 0, where 1 + 3 was possible
    0.25
    """
    return judge(label_ids, relevance).psp(inverse_propensity, k)


def psndcg_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Propensity-scored nDCG: the gain of a hit in place j is :math:`w_l / \log_2(1 + j)`.

    .. math:: \text{PSnDCG@}k = \sum_q \frac{\text{DCG}_q}{n_q} \Big/ \sum_q \frac{\text{best DCG}_q}{n_q},
              \qquad n_q = \sum_{j \le \min(k, |P_q|)} \frac{1}{\log_2(1 + j)}

    The best DCG has the positives of the largest :math:`w_l` first. A ratio of means, as pyxclib and napkinXC have it.

    >>> psndcg_at_k([[1, 0], [0, 1]], sp.csr_array([[1, 0], [1, 0]]), [3, 1], k=1)  # gains 0 + 3 of 3 + 3
    0.5
    """
    return judge(label_ids, relevance).psndcg(inverse_propensity, k)


def psr_at_k(label_ids: ArrayLike, relevance: SparseMatrix, inverse_propensity: ArrayLike, k: int) -> float:
    r"""Propensity-scored recall: PSP with both sums of a query divided by its number of positives :math:`|P_q|`.

    A ratio of means, as pyxclib and napkinXC have it. Only the best k positives count as possible.

    >>> psr_at_k([[0], [0]], sp.csr_array([[1, 1], [1, 0]]), [1, 3], k=1)  # gains 1/2 + 1/1 of 3/2 + 1/1
    0.6
    """
    return judge(label_ids, relevance).psr(inverse_propensity, k)


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
    """All the metrics of one set of predictions, which are looked up in ``relevance`` once.

    Args:
        inverse_propensity: ``(L,)``, from :func:`inverse_propensity` on the *training* labels; adds ``PSP@k``,
            ``PSnDCG@k`` and ``PSR@k`` at the k of ``P``, ``nDCG`` and ``R``.
        filter_pairs: ``(M, 2)`` cells that :func:`drop_filter_pairs` removes first. The places after them move up, so
            predict a few labels more than the largest k. The positives are left as they are.
        p_at, ndcg_at, recall_at: the k of each metric.

    Returns each metric, then ``num_queries``, of which ``num_empty`` had no positive.
    Raises ``ValueError`` for a k beyond the columns of ``label_ids``, a label out of range or twice in a row.

    >>> evaluate_ranking([[2], [0]], sp.csr_array([[0, 0, 1], [0, 0, 0]]), p_at=[1], ndcg_at=[1], recall_at=[1])
    {'P@1': 1.0, 'nDCG@1': 1.0, 'R@1': 1.0, 'num_queries': 2, 'num_empty': 1}
    """
    judged = judge(label_ids, relevance, filter_pairs)
    metrics: dict[str, float] = {}
    for name, places in (("P", p_at), ("nDCG", ndcg_at), ("R", recall_at)):
        metrics |= {f"{name}@{k}": judged.measure(name, k) for k in places}
        if inverse_propensity is not None:
            metrics |= {f"PS{name}@{k}": judged.measure(f"PS{name}", k, inverse_propensity) for k in places}
    return metrics | {"num_queries": len(judged.hits) + judged.num_empty, "num_empty": judged.num_empty}


@dataclass(frozen=True)
class _Judged:
    """The queries that have a positive, each prediction marked right or wrong: what all the metrics read."""

    label_ids: IntArray  # (n, k_max)
    hits: BoolArray  # (n, k_max)
    positives: sp.csr_array  # (n, L)
    num_positives: IntArray  # (n,), at least 1
    num_empty: int  # queries left out

    def top(self, k: int) -> BoolArray:
        check_k(k)
        if k > self.hits.shape[1]:
            raise ValueError(
                f"k = {k}, but label_ids has {self.hits.shape[1]} columns: predict at least k labels a query."
            )
        return self.hits[:, :k]

    def precision(self, k: int) -> float:
        return int(np.count_nonzero(self.top(k))) / (k * len(self.hits))

    def recall(self, k: int) -> float:
        return _mean(np.count_nonzero(self.top(k), axis=1) / self.num_positives)

    def ndcg(self, k: int) -> float:
        # cumsum adds from left to right in every row and in the ideal: a perfect ranking is exactly 1, and the value of
        # a row does not depend on where the row stands, as it may in a matrix product.
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
        """Return the gains over the best possible ones: discounted by place, divided by each query's norm, summed."""
        weights, k = self.one_a_label(inverse_propensity, "inverse_propensity", least=1), len(discount)
        # With the labels renumbered from the heaviest down, sorting the indices of a row puts its best gains first.
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

    def one_a_label(self, values: ArrayLike, name: str, least: float) -> FloatArray:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != self.positives.shape[1:]:
            raise ValueError(f"{name} has shape {array.shape}, but relevance has {self.positives.shape[1]} labels.")
        for label in np.flatnonzero(~(np.isfinite(array) & (array >= least)))[:1]:
            raise ValueError(f"{name} must be finite and at least {least}, got {array[label]} for label {label}.")
        return array


def judge(label_ids: ArrayLike, relevance: SparseMatrix, filter_pairs: ArrayLike | None = None) -> _Judged:
    label_ids, positives = integers(label_ids, "label_ids"), positive_cells(relevance)
    num_queries, num_labels = positives.shape
    if len(label_ids) != num_queries:
        raise ValueError(
            f"label_ids has {len(label_ids)} rows, but relevance {num_queries}: they must be the same queries."
        )
    for row, place in np.argwhere((label_ids < -1) | (label_ids >= num_labels))[:1]:
        raise ValueError(
            f"row {row} predicts label {label_ids[row, place]}, but relevance has only {num_labels} labels (ids 0 to "
            f"{num_labels - 1}; -1 is an empty place). Do both number the labels alike?"
        )
    by_id = np.sort(label_ids, axis=1)
    for row, place in np.argwhere((by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] >= 0))[:1]:
        raise ValueError(
            f"row {row} predicts label {by_id[row, place]} twice, and a hit counts once: keep the best place."
        )
    if filter_pairs is not None:
        label_ids, _ = drop_filter_pairs(label_ids, filter_pairs, num_labels=num_labels)
    num_positives = np.diff(positives.indptr)
    kept = num_positives > 0
    if not kept.any():
        raise ValueError(f"none of the {num_queries} rows of relevance has a positive: there is nothing to average.")
    judged: IntArray = label_ids[kept]
    positives, num_positives = positives[kept], num_positives[kept]
    rows = np.repeat(np.arange(len(judged)), num_positives)
    hits = cells_among(judged, rows, positives.indices)
    return _Judged(judged, hits, positives, num_positives, num_empty=int(np.count_nonzero(~kept)))


def check_k(k: int) -> None:
    """Raise a ``ValueError`` if ``k`` is not a number of places."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}.")


def _discount(k: int) -> FloatArray:
    discount: FloatArray = 1 / np.log2(np.arange(2, k + 2))
    return discount


def _mean(values: FloatArray) -> float:
    return math.fsum(values.tolist()) / len(values)
