r"""The threshold of soft top-k: one number ``t`` a query, with :math:`\sum_j \sigma(\alpha (s_j + t)) = k`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_NEWTON_STEPS = 100


def soft_top_k_threshold(scores: Tensor, k: float | Tensor, alpha: float = 1.0) -> Tensor:
    r"""The ``t`` of :func:`hf_xmc.losses.functional.soft_top_k`, ``(B,)``; infinite where ``k`` covers all the labels.

    A label with score minus infinity takes no part. The gradient follows from the constraint (implicit function
    theorem): :math:`\partial t / \partial s_j = -v_j / \sum_l v_l` with :math:`v = p (1 - p)`.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}.")
    scores = at_least_float32(scores)
    k = torch.as_tensor(k, dtype=scores.dtype, device=scores.device).expand(len(scores))
    if not bool((k > 0).all()):
        raise ValueError(f"k must be positive, got {k.min().item():g}.")
    threshold: Tensor = _Threshold.apply(scores, k, alpha)
    return threshold


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor, k: Tensor, alpha: float) -> Tensor:
        present = scores > -math.inf
        count = present.sum(1)
        lowest = scores.masked_fill(~present, math.inf).amin(1)
        lower, upper = threshold_bracket(lowest, scores.amax(1), count, k, alpha)
        start = -scores.topk(min(int(k.max().ceil()), scores.shape[1]), dim=1).values[:, -1]

        def measure(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return balance(*both_sides(alpha * (scores + threshold[:, None])), k)

        threshold = solve_threshold(measure, lower, upper, start, alpha).masked_fill(k >= count, math.inf)
        ctx.save_for_backward(scores, threshold)
        ctx.alpha = alpha  # type: ignore[attr-defined]
        return threshold

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        scores, threshold = ctx.saved_tensors
        z = ctx.alpha * (scores + threshold[:, None])
        # In logarithms: v underflows when no score lies near the threshold, its ratio to the sum does not.
        share = (F.logsigmoid(z) + F.logsigmoid(-z)).softmax(1)
        return torch.where(threshold.isinf()[:, None], 0.0, -share * grad[:, None]), None, None


def both_sides(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five sums over labels that :func:`balance` takes, for ``z = alpha (s + t)``, ``(B, L)``."""
    above = z >= 0
    tail = F.logsigmoid(-z.abs())  # log of what a label lacks to its side: p below the threshold, 1 - p above
    slope = tail + F.logsigmoid(z.abs())  # log p (1 - p)
    nothing = -math.inf
    return (
        above.sum(1),
        tail.masked_fill(above, nothing).logsumexp(1),
        slope.masked_fill(above, nothing).logsumexp(1),
        tail.masked_fill(~above, nothing).logsumexp(1),
        slope.masked_fill(~above, nothing).logsumexp(1),
    )


def balance(
    count: Tensor, below: Tensor, below_slope: Tensor, above: Tensor, above_slope: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The equation :math:`\sum_j p_j = k` as a balance of logarithms, and its derivative by :math:`\alpha t`.

    With :math:`m` labels at or above the threshold, :math:`\sum_j p_j - k = (m - k) + \sum_{below} p - \sum_{above}
    (1 - p)`. Weighing the positive against the negative terms as ``log(positive) - log(negative)`` is nearly linear in
    ``t`` and loses nothing when all the terms underflow, as they do for scores of 1e4.

    Args:
        count: labels at or above the threshold, ``(B,)``.
        below, below_slope: log-sum of ``p`` and of ``p (1 - p)`` over the labels below.
        above, above_slope: log-sum of ``1 - p`` and of ``p (1 - p)`` over the labels above.
    """
    surplus = count - k
    gain = torch.logaddexp(below, surplus.clamp(min=0).log())
    loss = torch.logaddexp(above, (-surplus).clamp(min=0).log())
    return gain - loss, (below_slope - gain).exp() + (above_slope - loss).exp()


def threshold_bracket(lowest: Tensor, highest: Tensor, count: Tensor, k: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return a lower and an upper bound of the threshold, NaN if there is no root.

    At the bounds every :math:`p_j` is at most, and at least, ``k`` divided by the number of labels."""
    even = (k / (count - k)).log() / alpha
    return even - highest, even - lowest


def solve_threshold(
    measure: Callable[[Tensor], tuple[Tensor, Tensor]], lower: Tensor, upper: Tensor, start: Tensor, alpha: float
) -> Tensor:
    """Newton's method inside a bracket, row by row: a step that leaves the bracket is replaced by its midpoint.

    ``measure`` gives :func:`balance` at a threshold. Stops when no row moves by more than the rounding of its numbers.
    """
    threshold = start.clamp(min=lower, max=upper)
    tolerance = 32 * torch.finfo(start.dtype).eps
    for _ in range(MAX_NEWTON_STEPS):
        gap, slope = measure(threshold)
        lower = torch.where(gap <= 0, threshold, lower)
        upper = torch.where(gap >= 0, threshold, upper)
        new = threshold - gap / (alpha * slope)
        new = torch.where((lower <= new) & (new <= upper), new, (lower + upper) / 2)
        step = (new - threshold).abs()
        threshold = new
        if not bool((step > tolerance * (1 / alpha + threshold.abs())).any()):  # rows without a root are NaN: done
            break
    return threshold


def softplus(x: Tensor) -> Tensor:
    r""":math:`\log(1 + e^x)` and its gradient, to the last bits of float64 too.

    The stock function returns ``x`` itself above 20, where the rest is still 2e-9. Above 40 it is below any rounding.
    """
    return F.softplus(x, threshold=40.0)


def at_least_float32(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
