r"""Sampling of labels: inclusion probabilities and a sample of fixed size.

A sum over labels :math:`\sum_l x_l` is estimated from a sample as :math:`\sum_l x_l / \pi_l`, where :math:`\pi_l` is
the probability of drawing label :math:`l`. The estimate is unbiased for any positive probabilities (Horvitz and
Thompson, A Generalization of Sampling Without Replacement From a Finite Universe, 1952). Its variance is low if they
are in proportion to :math:`|x_l|`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(importance: Tensor, size: int) -> Tensor:
    r"""Return probabilities in proportion to ``importance`` ``(L,)`` that sum to ``size``: ``(L,)`` in float64.

    .. math:: \pi_l = \min(1, c\, a_l) \quad \text{with } c \text{ such that} \quad \sum_l \pi_l = \text{size}

    A label of importance 0 is never drawn. If at most ``size`` labels have a positive importance, all are drawn. NaN
    counts as the largest importance, because an overflow must show in the sample.

    >>> inclusion_probabilities(torch.tensor([8., 1., 1., 0.]), size=2)
    tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    importance = importance.double()
    importance = importance.nan_to_num(nan=torch.inf).clamp(max=torch.finfo(torch.float32).max)
    ordered = importance.sort(descending=True).values  # a_0 >= a_1 >= ...
    rest = ordered.flip(0).cumsum(0).flip(0)  # a_m + a_{m+1} + ...
    left = size - torch.arange(len(ordered), device=importance.device)  # if the m largest are drawn for sure
    factors = left.clamp(min=0) / rest
    fits = factors * ordered <= 1  # the first m for which no probability exceeds 1
    if not bool(fits.any()):
        return (importance > 0).double()
    return (factors[fits][0] * importance).clamp(max=1)


def systematic_sample(probabilities: Tensor) -> Tensor:
    r"""Draw labels, each with its probability; return them in ascending order.

    The size of the sample is the sum of the probabilities, up to rounding. With one uniform number :math:`u` for all
    labels, label :math:`l` is drawn if an integer lies in :math:`(u + \sum_{m<l} \pi_m,\; u + \sum_{m \le l} \pi_m]`
    (Madow, On the Theory of Systematic Sampling, 1949). The random number comes from torch's CPU generator.

    >>> systematic_sample(torch.tensor([1.0, 0.0, 1.0]))
    tensor([0, 2])
    """
    for_sure = probabilities >= 1  # kept out of the sum: adding ones would round
    u = torch.rand((), dtype=torch.float64).to(probabilities.device)
    places = torch.where(for_sure, 0.0, probabilities.double()).cumsum(0).add(u).floor()
    drawn = places.diff(prepend=places.new_zeros(1)) > 0
    return (drawn | for_sure).nonzero()[:, 0]
