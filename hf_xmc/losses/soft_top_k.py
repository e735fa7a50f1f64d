r"""The threshold of soft top-k: one number ``t`` per query, such that :math:`\sum_j \sigma(\alpha (s_j + t)) = k`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_NEWTON_STEPS = 100


class Balance(NamedTuple):
    """The constraint of soft top-k at a threshold; ``(B,)`` each.

    Attributes:
        gap: 0 at the root, and increasing with the threshold.
        slope: Derivative of ``gap`` by ``alpha t``.
        log_total: Logarithm of the sum of ``p (1 - p)`` over labels.
    """

    gap: Tensor
    slope: Tensor
    log_total: Tensor


class Solution(NamedTuple):
    """A threshold, and the last point at which the constraint was measured; ``(B,)`` each.

    Attributes:
        threshold: The root.
        measured_at: The threshold one Newton step earlier, equal up to rounding.
        log_total: ``Balance.log_total`` at ``measured_at``.
    """

    threshold: Tensor
    measured_at: Tensor
    log_total: Tensor


def soft_top_k_threshold(scores: Tensor, k: float | Tensor, alpha: float = 1.0) -> Tensor:
    r"""Return the threshold ``t`` of :func:`hf_xmc.losses.functional.soft_top_k`, ``(B,)``.

    The threshold is infinite if ``k`` covers all labels. A label with score minus infinity is ignored. The gradient
    follows from the constraint (implicit function theorem):
    :math:`\partial t / \partial s_j = -v_j / \sum_l v_l` with :math:`v = p (1 - p)`.

    Args:
        scores: ``(B, L)`` scores.
        k: The prediction budget, a number or ``(B,)``.
        alpha: Sharpness.

    Raises:
        ValueError: if ``k`` or ``alpha`` is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"`alpha` must be positive, got {alpha}.")
    scores = at_least_float32(scores)
    k = torch.as_tensor(k, dtype=scores.dtype, device=scores.device).expand(len(scores))
    if not bool((k > 0).all()):
        raise ValueError(f"`k` must be positive, got {k.min().item():g}.")
    threshold: Tensor = _Threshold.apply(scores, k, alpha)
    return threshold


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, alpha: float) -> Tensor:
        present = scores > -math.inf
        count = present.sum(1)
        lowest = scores.masked_fill(~present, math.inf).amin(1)
        lower, upper = threshold_bracket(lowest, scores.amax(1), count, k, alpha)
        start = -scores.topk(min(int(k.max().ceil()), scores.shape[1]), dim=1).values[:, -1]

        def measure(threshold: Tensor) -> Balance:
            return balance(*both_sides(alpha * (scores + threshold[:, None])), k)

        threshold = solve_threshold(measure, lower, upper, start, alpha).threshold.masked_fill(k >= count, math.inf)
        ctx.save_for_backward(scores, threshold)
        ctx.alpha = alpha
        return threshold

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, threshold = ctx.saved_tensors
        z = ctx.alpha * (scores + threshold[:, None])
        # In logarithms: v underflows when no score lies near the threshold, but its ratio to the sum does not.
        weights = (F.logsigmoid(z) + F.logsigmoid(-z)).softmax(1)
        return torch.where(threshold.isinf()[:, None], 0.0, -weights * grad[:, None]), None, None


def both_sides(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the first five arguments of :func:`balance` for ``z = alpha (s + t)``, ``(B, L)``."""
    above = z >= 0
    tail = F.logsigmoid(-z.abs())  # log p below the threshold, log (1 - p) above
    slope = tail + F.logsigmoid(z.abs())  # log p (1 - p)
    return (
        above.sum(1),
        tail.masked_fill(above, -math.inf).logsumexp(1),
        slope.masked_fill(above, -math.inf).logsumexp(1),
        tail.masked_fill(~above, -math.inf).logsumexp(1),
        slope.masked_fill(~above, -math.inf).logsumexp(1),
    )


def balance(
    count: Tensor, below: Tensor, below_slope: Tensor, above: Tensor, above_slope: Tensor, k: Tensor
) -> Balance:
    r"""Return the equation :math:`\sum_j p_j = k` as a balance of logarithms.

    With :math:`m` labels at or above the threshold, :math:`\sum_j p_j - k = (m - k) + \sum_{below} p - \sum_{above}
    (1 - p)`. The difference ``log(positive terms) - log(negative terms)`` is nearly linear in ``t``. It also keeps
    its precision if all terms underflow, as they do for scores of 1e4.

    Args:
        count: Number of labels at or above the threshold, ``(B,)``.
        below: Log-sum of ``p`` over the labels below the threshold, ``(B,)``.
        below_slope: Log-sum of ``p (1 - p)`` over the labels below, ``(B,)``.
        above: Log-sum of ``1 - p`` over the labels at or above, ``(B,)``.
        above_slope: Log-sum of ``p (1 - p)`` over the labels at or above, ``(B,)``.
        k: The prediction budget, ``(B,)``.
    """
    surplus = count - k
    gain = torch.logaddexp(below, surplus.clamp(min=0).log())
    loss = torch.logaddexp(above, (-surplus).clamp(min=0).log())
    slope = (below_slope - gain).exp() + (above_slope - loss).exp()
    return Balance(gain - loss, slope, torch.logaddexp(below_slope, above_slope))


def threshold_bracket(lowest: Tensor, highest: Tensor, count: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return a lower and an upper bound of the threshold, NaN if there is no root.

    Every :math:`p_j` is at most ``k`` divided by the number of labels at the lower bound, and at least that at the
    upper bound.
    """
    even = (k / (count - k)).log() / alpha
    return even - highest, even - lowest


def solve_threshold(
    measure: Callable[[Tensor], Balance], lower: Tensor, upper: Tensor, start: Tensor, alpha: float
) -> Solution:
    """Find the root of ``measure`` in each row by Newton's method inside a bracket.

    A step that leaves the bracket is replaced by the bracket's midpoint. The search stops when every step is as small
    as the rounding of its numbers.
    """
    threshold = start.clamp(min=lower, max=upper)
    tolerance = 32 * torch.finfo(start.dtype).eps
    for _ in range(MAX_NEWTON_STEPS):
        measured_at = threshold
        gap, slope, log_total = measure(threshold)
        lower = torch.where(gap <= 0, threshold, lower)
        upper = torch.where(gap >= 0, threshold, upper)
        new = threshold - gap / (alpha * slope)
        new = torch.where((lower <= new) & (new <= upper), new, (lower + upper) / 2)
        step = (new - threshold).abs()
        threshold = new
        if not bool((step > tolerance * (1 / alpha + threshold.abs())).any()):  # rows without a root are NaN: done
            break
    return Solution(threshold, measured_at, log_total)


def softplus(x: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^x)`, with value and gradient exact in float64.

    The stock function returns ``x`` above 20, where the error is still 2e-9. Above 40 the error is below any rounding.
    """
    return F.softplus(x, threshold=40.0)


def at_least_float32(scores: Tensor) -> Tensor:
    """Return half-precision scores as float32, and others unchanged."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
