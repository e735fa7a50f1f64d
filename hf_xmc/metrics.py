r"""The ranking metrics of extreme classification, from sparse predictions: P@k, PSP@k, nDCG@k, R@k.

Every function reads the same two things and never builds a queries-by-labels array:

* ``label_ids``: ``(N, k_max)`` integers, the predicted labels of each query, best first. -1 is an empty place: a miss.
* ``relevance``: sparse ``(N, L)``; a value above 0 makes the label a positive, whatever the value.

Every metric is a fraction between 0 and 1, averaged over the queries that have a positive. The others are skipped, and
:func:`evaluate_ranking` counts them as ``num_empty``; if none is left there is nothing to average, which is an error.

Each result is the same to the last bit in whatever order the queries come: hits are counted in integers, and fractions
are added by :func:`math.fsum`, which rounds once, at the end, and so cannot see the order of its terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

#: ``(a, b)`` of :func:`inverse_propensity`, as the Extreme Classification Repository sets them: "amazon" for the Amazon
#: data sets (Amazon-670K, Amazon-3M, LF-AmazonTitles-131K, LF-AmazonTitles-1.3M), "wikipedia" for WikiLSHTC-325K and
#: Wikipedia-500K in all their forms, "default" for everything else, WikiSeeAlso and EURLex included.
PROPENSITY_PRESETS = {"default": (0.55, 1.5), "amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4)}


def precision_at_k(label_ids: npt.ArrayLike, relevance: Any, k: int) -> float:
    r"""The share of the first k places that hold a positive: :math:`\text{P@}k = \frac1k |\text{top}_k \cap P|`.

    The k places count even where a query has fewer than k positives, as everywhere in the field.

    >>> precision_at_k([[2, 0, 1]], sp.csr_array([[1, 0, 1]]), k=3)  # right, right, wrong
    0.6666666666666666
    """
    return _judge(label_ids, relevance).precision(k)


def recall_at_k(label_ids: npt.ArrayLike, relevance: Any, k: int) -> float:
    r"""The share of a query's positives found in the first k places: :math:`\text{R@}k = |\text{top}_k \cap P| / |P|`.

    >>> recall_at_k([[2, 0, 1]], sp.csr_array([[1, 0, 1]]), k=1)  # one of two
    0.5
    """
    return _judge(label_ids, relevance).recall(k)


def ndcg_at_k(label_ids: npt.ArrayLike, relevance: Any, k: int) -> float:
    r"""The discounted gain of the first k places over the best that this query allows; the gain of a positive is 1.

    .. math:: \text{nDCG@}k = \sum_{j \le k,\, \text{hit}_j} \frac{1}{\log_2(1 + j)}
                       \Big/ \sum_{j \le \min(k, |P|)} \frac{1}{\log_2(1 + j)}

    >>> ndcg_at_k([[0, 1, 2]], sp.csr_array([[0, 0, 1]]), k=3)  # found third: 1 / log2(4), where 1 was possible
    0.5
    """
    return _judge(label_ids, relevance).ndcg(k)


def psp_at_k(label_ids: npt.ArrayLike, relevance: Any, inverse_propensity: npt.ArrayLike, k: int) -> float:
    r"""Propensity-scored precision: a hit is worth the label's inverse propensity :math:`w`, so rare labels count more.

    .. math:: \text{PSP@}k = \sum_q \sum_{l \in \text{top}_k \cap P_q} w_l
                      \Big/ \sum_q \max_{S \subseteq P_q,\, |S| \le k} \sum_{l \in S} w_l

    It is a ratio of means, each over all queries, as the Extreme Classification Repository defines it; the mean of the
    per-query ratios is another number. Source: Jain, Prabhu, Varma, KDD 2016. ``inverse_propensity`` is ``(L,)``.

    >>> relevance = sp.csr_array([[1, 0], [0, 1]])
    >>> psp_at_k([[0], [0]], relevance, [1.0, 3.0], k=1)  # gains 1 + 0, where 1 + 3 was possible
    0.25
    """
    judged = _judge(label_ids, relevance)
    return judged.psp(judged.one_a_label(inverse_propensity, "inverse_propensity"), k)


def evaluate_ranking(
    label_ids: npt.ArrayLike,
    relevance: Any,
    *,
    inverse_propensity: npt.ArrayLike | None = None,
    filter_pairs: npt.ArrayLike | None = None,
    p_at: Sequence[int] = (1, 3, 5),
    ndcg_at: Sequence[int] = (1, 3, 5),
    recall_at: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """All the metrics of one set of predictions, which are looked up in ``relevance`` once.

    Args:
        inverse_propensity: ``(L,)``, from :func:`inverse_propensity` on the *training* labels; adds ``PSP@k``.
        filter_pairs: ``(M, 2)`` cells (row, label) that :func:`drop_filter_pairs` removes first. The places after them
            move up, so predict a few labels more than the largest k. The positives are left as they are.
        p_at: the k of ``P@k`` and of ``PSP@k``.

    Returns:
        ``P@k``, ``PSP@k``, ``nDCG@k``, ``R@k``, then ``num_queries``, of which ``num_empty`` had no positive and were
        left out of every average.

    Raises:
        ValueError: a k beyond the columns of ``label_ids``; a label id out of range or twice in a row; rows of
            ``label_ids`` and ``relevance`` that do not match; no query with a positive.

    >>> evaluate_ranking([[2], [0]], sp.csr_array([[0, 0, 1], [0, 0, 0]]), p_at=[1], ndcg_at=[1], recall_at=[1])
    {'P@1': 1.0, 'nDCG@1': 1.0, 'R@1': 1.0, 'num_queries': 2, 'num_empty': 1}
    """
    judged = _judge(label_ids, relevance, filter_pairs)
    metrics: dict[str, float] = {f"P@{k}": judged.precision(k) for k in p_at}
    if inverse_propensity is not None:
        weights = judged.one_a_label(inverse_propensity, "inverse_propensity")
        metrics |= {f"PSP@{k}": judged.psp(weights, k) for k in p_at}
    metrics |= {f"nDCG@{k}": judged.ndcg(k) for k in ndcg_at}
    metrics |= {f"R@{k}": judged.recall(k) for k in recall_at}
    return metrics | {"num_queries": len(judged.hits) + judged.num_empty, "num_empty": judged.num_empty}


class FrequencyDecile(NamedTuple):
    """A tenth of the labels, and how well they are found."""

    num_labels: int
    min_count: int  # training queries of its rarest label
    max_count: int  # training queries of its most frequent label
    num_positives: int  # test positives of its labels
    recall: float  # of these positives, the share found in the first ``recall_at`` places
    precision: float  # its part of P@k, k = ``precision_at``: the ten parts add up to P@k


def by_frequency_decile(
    label_ids: npt.ArrayLike,
    relevance: Any,
    train_counts: npt.ArrayLike,
    *,
    precision_at: int = 5,
    recall_at: int = 100,
) -> list[FrequencyDecile]:
    """Where the hits come from: ten equal groups of labels, from the rarest in training to the most frequent.

    The labels grouped are those with a positive in ``relevance``: a label that is never asked for can be neither found
    nor missed, and groups of such labels would have no recall. Sizes differ by one at most. Labels of equal frequency
    stand in the order of their ids, so a cut among them is arbitrary but always the same.

    Args:
        train_counts: ``(L,)``, from :func:`label_counts` on the *training* labels.
    """
    judged = _judge(label_ids, relevance)
    train_counts = judged.one_a_label(train_counts, "train_counts")
    positives = np.bincount(judged.positives.indices, minlength=judged.num_labels)
    labels = np.flatnonzero(positives)
    if len(labels) < 10:
        raise ValueError(f"ten groups need 10 labels that have a positive, got {len(labels)}: use recall_at_k instead.")
    labels = labels[np.argsort(train_counts[labels], kind="stable")]
    found, precise = judged.hits_per_label(recall_at), judged.hits_per_label(precision_at)
    return [
        FrequencyDecile(
            num_labels=len(group),
            min_count=int(train_counts[group[0]]),
            max_count=int(train_counts[group[-1]]),
            num_positives=int(positives[group].sum()),
            recall=int(found[group].sum()) / int(positives[group].sum()),
            precision=int(precise[group].sum()) / (precision_at * len(judged.hits)),
        )
        for group in np.array_split(labels, 10)
    ]


def label_counts(relevance: Any) -> IntArray:
    """How many queries each label is a positive of: sparse ``(N, L)`` to ``(L,)``.

    >>> label_counts(sp.csr_array([[1, 0, 0], [1, 0, 2]]))
    array([2, 0, 1])
    """
    positives = _positives(relevance)
    return np.bincount(positives.indices, minlength=positives.shape[1])


def inverse_propensity(counts: npt.ArrayLike, num_train: int, a: float = 0.55, b: float = 1.5) -> FloatArray:
    r"""How much a hit on each label is worth, when annotators miss rare labels more often: 1 or more, and finite.

    .. math:: w_l = 1 + c\,(n_l + b)^{-a}, \qquad c = (\ln N - 1)(b + 1)^a

    Args:
        counts: ``(L,)``, :math:`n_l` from :func:`label_counts` on the training set; 0 is allowed.
        num_train: :math:`N`, the number of training queries.
        a, b: of the data set; see ``PROPENSITY_PRESETS``.

    Source: Jain, Prabhu, Varma, "Extreme Multi-label Loss Functions", KDD 2016.

    >>> inverse_propensity([1, 3], num_train=100, a=1.0, b=1.0) == 1 + (np.log(100) - 1) * np.array([2 / 2, 2 / 4])
    array([ True,  True])
    """
    counts = np.asarray(counts)
    if num_train < 3:
        raise ValueError(f"num_train must be at least 3, got {num_train}: below that the propensities would exceed 1.")
    if not (a >= 0 and b > 0):
        raise ValueError(f"propensities need a >= 0 and b > 0, got a={a} and b={b}; see PROPENSITY_PRESETS.")
    for label in np.flatnonzero(~((counts >= 0) & (counts <= num_train)))[:1]:
        raise ValueError(
            f"label {label} has count {counts[label]}, but num_train is {num_train}: pass the number of training "
            "queries that have each label, and the number of all training queries."
        )
    c = (math.log(num_train) - 1) * (b + 1) ** a
    weights: FloatArray = 1 + c * (counts + b) ** -a
    return weights


@overload
def drop_filter_pairs(
    label_ids: npt.ArrayLike, filter_pairs: npt.ArrayLike, scores: None = None, *, num_labels: int | None = None
) -> IntArray: ...
@overload
def drop_filter_pairs(
    label_ids: npt.ArrayLike, filter_pairs: npt.ArrayLike, scores: npt.ArrayLike, *, num_labels: int | None = None
) -> tuple[IntArray, npt.NDArray[Any]]: ...
def drop_filter_pairs(
    label_ids: npt.ArrayLike,
    filter_pairs: npt.ArrayLike,
    scores: npt.ArrayLike | None = None,
    *,
    num_labels: int | None = None,
) -> IntArray | tuple[IntArray, npt.NDArray[Any]]:
    """Take the cells ``filter_pairs`` out of the predictions; what follows moves up, and the end is padded.

    Benchmarks list the pairs that would leak the answer: a query and the label that is the same item, or a reciprocal.

    Args:
        filter_pairs: ``(M, 2)`` of (row, label); repeated pairs and an empty array are fine.
        scores: ``(N, k_max)``, moved along with the labels; padded with minus infinity where these get -1.
        num_labels: if given, a larger label in ``filter_pairs`` is an error.

    >>> drop_filter_pairs([[5, 7, 9]], [[0, 7]])
    array([[ 5,  9, -1]])
    """
    label_ids = _integers(label_ids, "label_ids")
    pairs = _integers(filter_pairs, "filter_pairs") if np.size(filter_pairs) else np.empty((0, 2), dtype=np.int64)
    if pairs.shape[1] != 2:
        raise ValueError(f"filter_pairs must have two columns, (row, label), got shape {pairs.shape}.")
    rows, labels = pairs.T
    width = 1 + max(label_ids.max(initial=0), labels.max(initial=0)) if num_labels is None else num_labels
    for row, label in pairs[(rows < 0) | (rows >= len(label_ids)) | (labels < 0) | (labels >= width)][:1]:
        raise ValueError(
            f"filter_pairs names row {row}, label {label}, but there are {len(label_ids)} rows and "
            f"{num_labels or 'no negative'} labels: is it the filter file of this split?"
        )
    dropped = _cells_among(label_ids, rows, labels, width)
    order = np.argsort(dropped, axis=1, kind="stable")  # the kept places first, in their old order
    label_ids = np.take_along_axis(np.where(dropped, -1, label_ids), order, axis=1)
    if scores is None:
        return label_ids
    return label_ids, np.take_along_axis(np.where(dropped, -np.inf, scores), order, axis=1)


@dataclass(frozen=True)
class _Judged:
    """Predictions held against the positives: what every metric needs, looked up once."""

    label_ids: IntArray  # (n, k_max), of the queries that have a positive
    hits: BoolArray  # (n, k_max)
    positives: sp.csr_array  # (n, L)
    num_empty: int

    @property
    def num_labels(self) -> int:
        return int(self.positives.shape[1])

    @property
    def counts(self) -> IntArray:
        return np.diff(self.positives.indptr).astype(np.int64)

    def precision(self, k: int) -> float:
        return int(self._top(self.hits, k).sum()) / (k * len(self.hits))

    def recall(self, k: int) -> float:
        return math.fsum(self._top(self.hits, k).sum(1) / self.counts) / len(self.hits)

    def ndcg(self, k: int) -> float:
        discounts = 1 / np.log2(np.arange(2, k + 2))
        # cumsum adds left to right in every row alike, so that a row's gain cannot depend on where the row stands
        gains = np.where(self._top(self.hits, k), discounts, 0.0).cumsum(1)[:, -1]
        best = discounts.cumsum()[np.minimum(self.counts, k) - 1]
        return math.fsum(gains / best) / len(self.hits)

    def psp(self, weights: FloatArray, k: int) -> float:
        labels, hits = self._top(self.label_ids, k), self._top(self.hits, k)
        gain = math.fsum(weights[labels[hits]])
        row = np.repeat(np.arange(len(self.hits)), self.counts)
        worth = weights[self.positives.indices]
        order = np.lexsort((-worth, row))
        rank = np.arange(len(row)) - np.repeat(self.positives.indptr[:-1], self.counts)
        return gain / math.fsum(worth[order][rank < k])

    def hits_per_label(self, k: int) -> IntArray:
        found = self._top(self.label_ids, k)[self._top(self.hits, k)]
        return np.bincount(found, minlength=self.num_labels)

    def one_a_label(self, values: npt.ArrayLike, name: str) -> FloatArray:
        values = np.asarray(values)
        if values.shape != (self.num_labels,):
            raise ValueError(
                f"{name} has shape {values.shape}; expected one number for each of {self.num_labels} labels."
            )
        return values

    def _top(self, table: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
        if not 1 <= k <= table.shape[1]:
            raise ValueError(f"k is {k}, but label_ids holds {table.shape[1]} predictions a query: predict at least k.")
        return table[:, :k]


def _judge(label_ids: npt.ArrayLike, relevance: Any, filter_pairs: npt.ArrayLike | None = None) -> _Judged:
    label_ids = _integers(label_ids, "label_ids")
    positives = _positives(relevance)
    num_queries, num_labels = positives.shape
    if len(label_ids) != num_queries:
        raise ValueError(
            f"label_ids has {len(label_ids)} rows, relevance {num_queries}: both must speak of the same queries."
        )
    for row, place in np.argwhere((label_ids < -1) | (label_ids >= num_labels))[:1]:
        raise ValueError(
            f"row {row} predicts label id {label_ids[row, place]}, but there are {num_labels} labels "
            f"(ids 0 to {num_labels - 1}; -1 is an empty place)."
        )
    ordered = np.sort(label_ids, axis=1)
    for row in np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))[:1]:
        raise ValueError(f"row {row} predicts a label twice, and a hit would count twice: {label_ids[row].tolist()}.")
    if filter_pairs is not None:
        label_ids = drop_filter_pairs(label_ids, filter_pairs, num_labels=num_labels)
    counts = np.diff(positives.indptr)
    asked = np.flatnonzero(counts)
    if not len(asked):
        raise ValueError(f"none of the {num_queries} queries has a positive: there is nothing to average.")
    rows = np.repeat(np.arange(num_queries), counts)
    hits = _cells_among(label_ids, rows, positives.indices, num_labels)
    return _Judged(label_ids[asked], hits[asked], positives[asked], num_queries - len(asked))


def _cells_among(label_ids: IntArray, rows: npt.NDArray[Any], labels: npt.NDArray[Any], num_labels: int) -> BoolArray:
    """Which cells of ``label_ids`` hold one of the (row, label) pairs."""
    cells = np.arange(len(label_ids))[:, None] * num_labels + label_ids
    wanted = np.unique(rows.astype(np.int64) * num_labels + labels)
    found: BoolArray = np.isin(cells, wanted) & (label_ids >= 0)
    return found


def _positives(relevance: Any) -> sp.csr_array:
    """The cells above 0, each once, sorted within a row."""
    positives = sp.csr_array(relevance, copy=True)
    positives.sum_duplicates()
    positives.data = (positives.data > 0).astype(np.int8)
    positives.eliminate_zeros()
    positives.sort_indices()
    return positives


def _integers(values: npt.ArrayLike, name: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a table of integers, got shape {array.shape} of {array.dtype}.")
    return array.astype(np.int64)
