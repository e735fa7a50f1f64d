"""Label frequency in training: the value of a hit on a rare label, and hits by label frequency."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_xmc.metrics.cells import FloatArray, IntArray, SparseMatrix, binarize
from hf_xmc.metrics.ranking import match_predictions

#: ``(a, b)`` of :func:`inverse_propensity`, as set by the Extreme Classification Repository: "amazon" for the Amazon
#: data sets (Amazon-670K, Amazon-3M, LF-AmazonTitles-131K, LF-AmazonTitles-1.3M), "wikipedia" for WikiLSHTC-325K and
#: Wikipedia-500K in all their forms, "default" for everything else, WikiSeeAlso and EURLex included.
PROPENSITY_PRESETS = {"default": (0.55, 1.5), "amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4)}


class FrequencyDecile(NamedTuple):
    """A tenth of the labels, with the quality of their predictions."""

    num_labels: int
    min_count: int  # training queries of its rarest label
    max_count: int  # training queries of its most frequent label
    num_positives: int  # test positives of its labels
    recall: float  # fraction of these within the first ``recall_at`` predictions
    precision: float  # contribution to P@k for k = ``precision_at``; the ten add up to P@k


def by_frequency_decile(
    label_ids: ArrayLike,
    relevance: SparseMatrix,
    train_counts: ArrayLike,
    *,
    precision_at: int = 5,
    recall_at: int = 100,
) -> list[FrequencyDecile]:
    """Count hits in ten equal groups of labels, from the rarest in training to the most frequent.

    Only labels with a positive in ``relevance`` are grouped, because other labels can be neither found nor missed.
    Group sizes differ by at most one. Labels of equal frequency are ordered by id, so a cut between them is arbitrary
    but reproducible. ``train_counts`` is ``(L,)``, the :func:`label_counts` of the *training* labels.
    """
    matches = match_predictions(label_ids, relevance)
    counts = matches.check_per_label(train_counts, "train_counts", least=0)
    positives = np.bincount(matches.positives.indices, minlength=len(counts))
    found, precise = matches.hits_per_label(recall_at), matches.hits_per_label(precision_at)
    labels = np.flatnonzero(positives)
    if len(labels) < 10:
        raise ValueError(f"`relevance` must have positives for at least 10 labels, got {len(labels)}. Use recall_at_k.")
    labels = labels[np.argsort(counts[labels], kind="stable")]
    return [
        FrequencyDecile(
            num_labels=len(group),
            min_count=int(counts[group[0]]),
            max_count=int(counts[group[-1]]),
            num_positives=int(positives[group].sum()),
            recall=int(found[group].sum()) / int(positives[group].sum()),
            precision=int(precise[group].sum()) / (precision_at * len(matches.hits)),
        )
        for group in np.array_split(labels, 10)
    ]


def label_counts(relevance: SparseMatrix) -> IntArray:
    """Return the number of queries for which each label is a positive: sparse ``(N, L)`` to ``(L,)``.

    >>> from scipy.sparse import csr_array
    >>> label_counts(csr_array([[1, 0, 0], [1, 0, 2]]))
    array([2, 0, 1])
    """
    positives = binarize(relevance)
    return np.bincount(positives.indices, minlength=positives.shape[1])


def inverse_propensity(counts: ArrayLike, num_train: int, a: float = 0.55, b: float = 1.5) -> FloatArray:
    r"""Return the value of a hit on each label, if annotators miss rare labels more often: finite, and at least 1.

    .. math:: w_l = 1 + c\,(n_l + b)^{-a}, \qquad c = (\ln N - 1)(b + 1)^a

    Args:
        counts: ``(L,)`` :func:`label_counts` of the training set, :math:`n_l`; may be 0.
        num_train: Number of training queries, :math:`N`.
        a, b: Parameters of the data set, see ``PROPENSITY_PRESETS``. Source: Jain, Prabhu, Varma, KDD 2016.

    >>> inverse_propensity([0, 3], num_train=100, a=1, b=1) == 1 + (math.log(100) - 1) * np.array([2 / 1, 2 / 4])
    array([ True,  True])
    """
    counts = np.asarray(counts, dtype=np.float64)
    if num_train < 3:
        raise ValueError(f"`num_train` must be at least 3, or propensities would exceed 1, got {num_train}.")
    if not (a >= 0 and b > 0):
        raise ValueError(f"`a` must be at least 0 and `b` above 0, got a={a} and b={b}. See PROPENSITY_PRESETS.")
    for label in np.flatnonzero(~((counts >= 0) & (counts <= num_train)))[:1]:
        raise ValueError(
            f"`counts` must be from 0 to num_train = {num_train}, got {counts[label]:g} for label {label}."
        )
    weights: FloatArray = 1 + (math.log(num_train) - 1) * (b + 1) ** a * (counts + b) ** -a
    return weights
