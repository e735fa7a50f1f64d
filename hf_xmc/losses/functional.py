r"""The four losses on a score matrix.

Notation, here and in :mod:`hf_xmc.losses.streaming`: ``B`` queries, ``L`` labels, ``s_j`` the score of label ``j`` for
a query (similarity divided by the temperature), ``P`` the query's positives, ``N`` its negatives: every label that is
not a known positive. ``positives`` is a ``(B, P)`` tensor of label ids, padded with ``IGNORE_INDEX``. Each row is read
as a set, so a repeated label counts once. ``weights`` is a ``(B, P)`` tensor of graded relevance. A positive that was
not sampled has weight 0, and then counts neither as a positive nor as a negative.

Each loss is the mean over the queries that have a positive; a query without one contributes nothing. Half precision
scores are computed in float32.

Source of the losses: Gupta et al., Dual-Encoders for Extreme Multi-Label Classification, ICLR 2024, arXiv 2310.10636.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc.losses.soft_top_k import at_least_float32, soft_top_k_threshold, softplus
from hf_xmc.padding import IGNORE_INDEX


def decoupled_softmax_loss(scores: Tensor, positives: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return the decoupled softmax loss: a positive competes with the negatives, never with another positive.

    .. math:: \frac{1}{\sum_p w_p} \sum_{p \in P} -w_p \log \frac{e^{s_p}}{e^{s_p} + \sum_{n \in N} e^{s_n}}

    Args:
        scores: ``(B, L)`` similarities, already divided by the temperature.
        positives: ``(B, P)`` label ids, padded with ``IGNORE_INDEX``.
        weights: ``(B, P)`` weight of each positive, 0 for one that was not sampled.

    Raises:
        ValueError: if a label id is out of range, a weight is negative, or the shapes disagree.

    >>> decoupled_softmax_loss(torch.zeros(1, 4), torch.tensor([[0, 1]])).exp()   # 1 positive against 2 negatives
    tensor(3.)
    """
    scores, known, weights = _prepare(scores, positives, weights)
    negatives = _log_sum_exp(scores, where=~_mask_of(scores, positives, known))  # (B, 1)
    return _mean(softplus(negatives - _at(scores, positives)), weights)


def softmax_loss(scores: Tensor, positives: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return the multi-label softmax loss (InfoNCE): positives share one distribution, so they compete.

    .. math:: \frac{1}{\sum_p w_p} \sum_{p \in P} -w_p \log \frac{e^{s_p}}{\sum_{j} e^{s_j}}

    The sum runs over the negatives and the positives with a weight above 0. Arguments and errors are those of
    :func:`decoupled_softmax_loss`.

    >>> softmax_loss(torch.zeros(1, 4), torch.tensor([[0, 1]])).exp()   # 1 label against all 4
    tensor(4.)
    """
    scores, known, weights = _prepare(scores, positives, weights)
    everyone = _log_sum_exp(scores, where=~_mask_of(scores, positives, known & (weights == 0)))  # (B, 1)
    return _mean(everyone - _at(scores, positives), weights)


def bce_loss(
    scores: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Return the binary cross-entropy, one against all, with an optional learned bias and scale.

    .. math:: \frac{1}{|N| + \sum_p w_p}
        \Big[ \sum_{p \in P} w_p \log(1 + e^{-z_p}) + \sum_{n \in N} \log(1 + e^{z_n}) \Big], \quad z = a s + b

    Nearly all of many labels are negative, so most scores must lie far below 0. The similarities of a dual encoder do
    not, unless a bias :math:`b` shifts them. Cosines need a scale :math:`a` too (Zhai et al., Sigmoid Loss for Language
    Image Pre-Training, 2023). Without weights this is ``F.binary_cross_entropy_with_logits``.

    Other arguments and errors are those of :func:`decoupled_softmax_loss`.

    Args:
        bias: Number or scalar tensor; receives a gradient.
        scale: Number or scalar tensor; receives a gradient.

    >>> bce_loss(torch.zeros(1, 4), torch.tensor([[0, 1]])).exp()
    tensor(2.)
    """
    scores, known, weights = _prepare(scores, positives, weights)
    scores = scale * scores + bias
    negative = ~_mask_of(scores, positives, known)
    mass = negative.sum(1, keepdim=True) + weights.sum(1, keepdim=True)  # (B, 1)
    hits = (weights * softplus(-_at(scores, positives))).sum(1, keepdim=True)
    misses = softplus(scores.masked_fill(~negative, -math.inf)).sum(1, keepdim=True)
    has_positive = weights.sum(1, keepdim=True) > 0
    return _mean((hits + misses) / mass.clamp(min=1e-30), has_positive.to(scores.dtype))


def soft_top_k_loss(
    scores: Tensor, positives: Tensor, k: float | Tensor, alpha: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    r"""Return the soft top-k loss: every positive should be among the ``k`` labels that :func:`soft_top_k` selects.

    .. math:: \frac{1}{\sum_p w_p} \sum_{p \in P} -w_p \log \sigma(\alpha (s_p + t)), \quad
        \sum_j \sigma(\alpha (s_j + t)) = k

    A positive of weight 0 is excluded from both sums. Other arguments and errors are those of
    :func:`decoupled_softmax_loss`.

    Args:
        k: The prediction budget, a number or ``(B,)``. A query with at most ``k`` labels contributes 0.
        alpha: Sharpness.

    >>> soft_top_k_loss(torch.zeros(1, 4), torch.tensor([[0, 1]]), k=2).exp()   # each of 4 is selected with 1/2
    tensor(2.)
    """
    scores, known, weights = _prepare(scores, positives, weights)
    taking_part = scores.masked_fill(_mask_of(scores, positives, known & (weights == 0)), -math.inf)
    threshold = soft_top_k_threshold(taking_part, k, alpha)  # (B,)
    return _mean(softplus(-alpha * (_at(scores, positives) + threshold[:, None])), weights)


def soft_top_k(scores: Tensor, k: float | Tensor, alpha: float = 1.0) -> Tensor:
    r"""Return the degree to which each label is among the top ``k``, ``(B, L)``; each row sums to ``k``.

    .. math:: p_j = \sigma(\alpha (s_j + t)) \quad \text{with } t \text{ such that} \quad \sum_j p_j = k

    If ``k`` is at least the number of labels, every :math:`p_j` is 1.

    >>> soft_top_k(torch.tensor([[3., 3., -9., -9.]]), k=2).round()
    tensor([[1., 1., 0., 0.]])
    """
    scores = at_least_float32(scores)
    z = alpha * (scores + soft_top_k_threshold(scores, k, alpha)[:, None])
    return z.sigmoid().masked_fill(scores == -math.inf, 0.0)


def check_positives(positives: Tensor, num_labels: int) -> None:
    """Raise ``ValueError`` if a label id, other than padding, lies outside ``[0, num_labels)``."""
    wrong = (positives != IGNORE_INDEX) & ((positives < 0) | (positives >= num_labels))
    if bool(wrong.any()):
        raise ValueError(
            f"`positives` contains label id {positives[wrong][0].item()}, but there are only {num_labels} labels (ids "
            f"0 to {num_labels - 1}; {IGNORE_INDEX} is padding). Are the queries and the labels from the same data set?"
        )


def positive_weights(positives: Tensor, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``known`` and ``weights``, ``(B, P)`` each.

    ``known`` marks the entries that name a positive, the first of a repeated label. ``weights`` is 0 elsewhere.

    Args:
        positives: ``(B, P)`` label ids, padded with ``IGNORE_INDEX``.
        weights: ``(B, P)`` weights, or ``None`` for 1.
        dtype: Type of the returned weights.

    Raises:
        ValueError: if a weight is negative or NaN, or the shapes differ.

    >>> known, weights = positive_weights(torch.tensor([[4, 7, 4, -100]]), None, torch.float32)
    >>> weights
    tensor([[1., 1., 0., 0.]])
    """
    ordered, order = positives.sort(dim=1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    known = (positives != IGNORE_INDEX) & ~torch.zeros_like(again).scatter(1, order, again)
    if weights is None:
        return known, known.to(dtype)
    if weights.shape != positives.shape:
        raise ValueError(
            f"`weights` must have the shape of `positives`, {tuple(positives.shape)}, got {tuple(weights.shape)}."
        )
    if not bool((weights >= 0).all()):
        raise ValueError(f"`weights` must be 0 or positive, got {weights.min().item():g}.")
    return known, weights.to(dtype) * known


def _prepare(scores: Tensor, positives: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if scores.ndim != 2 or positives.ndim != 2 or len(scores) != len(positives):
        raise ValueError(
            f"`scores` and `positives` must have shapes (B, L) and (B, P), with one row per query, got "
            f"{tuple(scores.shape)} and {tuple(positives.shape)}."
        )
    check_positives(positives, scores.shape[1])
    scores = at_least_float32(scores)
    return scores, *positive_weights(positives, weights, scores.dtype)


def _at(scores: Tensor, positives: Tensor) -> Tensor:
    return scores.gather(1, positives.clamp(min=0))  # (B, P); padding may read any score, since its weight is 0


def _mask_of(scores: Tensor, positives: Tensor, entries: Tensor) -> Tensor:
    """Return ``(B, L)`` booleans that mark the labels in the chosen entries of ``positives``."""
    rows = entries.nonzero(as_tuple=True)[0]
    return torch.zeros_like(scores, dtype=torch.bool).index_put((rows, positives[entries]), torch.tensor(True))


def _log_sum_exp(scores: Tensor, where: Tensor) -> Tensor:
    """Return ``(B, 1)`` log-sums; minus infinity, with gradient 0 instead of NaN, for an empty sum."""
    empty = ~where.any(1, keepdim=True)
    total = scores.masked_fill(~where & ~empty, -math.inf).logsumexp(1, keepdim=True)
    return total.masked_fill(empty, -math.inf)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of each row, averaged over rows with any weight. Weight 0 hides even infinity.

    >>> _mean(torch.tensor([[1., 3.], [math.inf, 5.], [7., 7.]]), torch.tensor([[1., 1.], [0., 2.], [0., 0.]]))
    tensor(3.5000)
    """
    mass = weights.sum(1)  # (B,)
    has_weight = mass > 0
    rows = torch.where(weights > 0, weights * values, 0.0).sum(1) / torch.where(has_weight, mass, 1.0)
    return rows.sum() / has_weight.sum().clamp(min=1)
