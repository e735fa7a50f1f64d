"""How frequent labels are in training: what a hit on a rare one is worth, and where the hits come from."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_xmc.metrics.cells import FloatArray, IntArray, SparseMatrix, positive_cells
from hf_xmc.metrics.ranking import judge

#: ``(a, b)`` of :func:`inverse_propensity`, as the Extreme Classification Repository sets them: "amazon" for the Amazon
#: data sets (Amazon-670K, Amazon-3M, LF-AmazonTitles-131K, LF-AmazonTitles-1.3M), "wikipedia" for WikiLSHTC-325K and
#: Wikipedia-500K in all their forms, "default" for everything else, WikiSeeAlso and EURLex included.
PROPENSITY_PRESETS = {"default": (0.55, 1.5), "amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4)}


class FrequencyDecile(NamedTuple):
    """A tenth of the labels, and how well they are found."""

    num_labels: int
    min_count: int  # training queries of its rarest label
    max_count: int  # training queries of its most frequent label
    num_positives: int  # test positives of its labels
    recall: float  # the share of these found in the first ``recall_at`` places
    precision: float  # its part of P@k, k = ``precision_at``: the ten parts add up to P@k


def by_frequency_decile(
    label_ids: ArrayLike,
    relevance: SparseMatrix,
    train_counts: ArrayLike,
    *,
    precision_at: int = 5,
    recall_at: int = 100,
) -> list[FrequencyDecile]:
    """Count hits in ten equal groups of labels, from the rarest in training to the most frequent.

    The labels grouped are those with a positive in ``relevance``: one that is never asked for is neither found nor
    missed. Sizes differ by one at most. Labels of equal frequency stand in the order of their ids, so that a cut among
    them is arbitrary but always the same. ``train_counts`` is ``(L,)``: :func:`label_counts` of the *training* labels.
    """
    judged = judge(label_ids, relevance)
    counts = judged.one_a_label(train_counts, "train_counts", least=0)
    positives = np.bincount(judged.positives.indices, minlength=len(counts))
    found, precise = judged.hits_per_label(recall_at), judged.hits_per_label(precision_at)
    labels = np.flatnonzero(positives)
    if len(labels) < 10:
        raise ValueError(f"ten groups need at least 10 labels with a positive, got {len(labels)}: use recall_at_k.")
    labels = labels[np.argsort(counts[labels], kind="stable")]
    return [
        FrequencyDecile(
            num_labels=len(group),
            min_count=int(counts[group[0]]),
            max_count=int(counts[group[-1]]),
            num_positives=int(positives[group].sum()),
            recall=int(found[group].sum()) / int(positives[group].sum()),
            precision=int(precise[group].sum()) / (precision_at * len(judged.hits)),
        )
        for group in np.array_split(labels, 10)
    ]


def label_counts(relevance: SparseMatrix) -> IntArray:
    """Return the number of queries that each label is a positive of: sparse ``(N, L)`` to ``(L,)``.

    >>> from scipy.sparse import csr_array
    >>> label_counts(csr_array([[1, 0, 0], [1, 0, 2]]))
    array([2, 0, 1])
    """
    positives = positive_cells(relevance)
    return np.bincount(positives.indices, minlength=positives.shape[1])


def inverse_propensity(counts: ArrayLike, num_train: int, a: float = 0.55, b: float = 1.5) -> FloatArray:
    r"""How much a hit on each label is worth if annotators miss rare labels more often: 1 or more, always finite.

    .. math:: w_l = 1 + c\,(n_l + b)^{-a}, \qquad c = (\ln N - 1)(b + 1)^a

    Args:
        counts: ``(L,)``, :math:`n_l`: :func:`label_counts` of the training set. 0 is allowed.
        num_train: :math:`N`, the number of training queries.
        a, b: belong to the data set, see ``PROPENSITY_PRESETS``. Source: Jain, Prabhu, Varma, KDD 2016.

    >>> inverse_propensity([0, 3], num_train=100, a=1, b=1) == 1 + (math.log(100) - 1) * np.array([2 / 1, 2 / 4])
    array([ True,  True])
    """
    counts = np.asarray(counts, dtype=np.float64)
    if num_train < 3:
        raise ValueError(f"num_train must be at least 3, or propensities would exceed 1; got {num_train}.")
    if not (a >= 0 and b > 0):
        raise ValueError(f"the propensity model needs a >= 0 and b > 0, got a={a} and b={b}: see PROPENSITY_PRESETS.")
    for label in np.flatnonzero(~((counts >= 0) & (counts <= num_train)))[:1]:
        raise ValueError(
            f"label {label} has count {counts[label]:g}, but must be in 0 to num_train = {num_train} queries."
        )
    weights: FloatArray = 1 + (math.log(num_train) - 1) * (b + 1) ** a * (counts + b) ** -a
    return weights
