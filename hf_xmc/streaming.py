r"""The losses of :mod:`hf_xmc.functional` from embeddings, without ever holding the ``B x L`` score matrix.

Each function takes ``queries`` ``(B, D)`` and ``labels`` ``(L, D)``; the score is their dot product (divide the queries
by the temperature first). Value and gradient are exact. Scores are made for a block of queries and a chunk of labels at
a time, within ``memory_budget`` bytes:

* A block of queries keeps the scores of all its labels until their gradient is made from them in place: three matrix
  products in all. This is the default.
* Where the budget holds no useful block, all queries walk over chunks of labels, and a chunk's scores are made once to
  be summed and again for the gradient: four products (soft top-k: one more for each Newton step).

The gradients are made in the forward pass, so that nothing but them has to be kept.

Over several processes, every process holds all the queries, all the positives, and its own :class:`LabelShard` of the
labels. Sums over labels are sums over processes; the loss is the same number on each. The gradient of ``queries`` is
the part that comes through the process's own labels: :func:`hf_xmc.sharding.gather_queries` sums it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc import sharding
from hf_xmc.functional import balance, check_positives, positive_weights, solve_threshold, threshold_bracket
from hf_xmc.sharding import IGNORE_INDEX, LabelShard

MEMORY_BUDGET = 256 * 2**20
LARGE, TINY = 3e38, 1e-30
MIN_BLOCK = 64  # queries: smaller blocks waste the matrix product
CHUNK = 4096  # labels: larger chunks gain nothing


def decoupled_softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """:func:`hf_xmc.functional.decoupled_softmax_loss` of ``queries @ labels.T``.

    Args:
        queries: ``(B, D)``, all queries of the step, already divided by the temperature.
        labels: ``(L, D)``, or this process's shard of them.
        positives, weights: ``(B, P)``, with ids counted over all labels.
        shard: which labels these are; ``None`` for all.
        memory_budget: bytes for scores.
    """
    return _streamed(queries, labels, positives, weights, _Softmax(decoupled=True), shard, memory_budget)


def softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """:func:`hf_xmc.functional.softmax_loss` of ``queries @ labels.T``; arguments as above."""
    return _streamed(queries, labels, positives, weights, _Softmax(decoupled=False), shard, memory_budget)


def bce_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """:func:`hf_xmc.functional.bce_loss` of ``queries @ labels.T``; arguments as above."""
    # a <q, y> + b = <(a q, b), (y, 1)>: bias and scale need no code of their own below.
    bias_column = torch.as_tensor(bias, dtype=queries.dtype, device=queries.device).expand(len(queries), 1)
    queries = torch.cat([scale * queries, bias_column], dim=1)
    labels = F.pad(labels, (0, 1), value=1.0)
    return _streamed(queries, labels, positives, weights, _BCE(), shard, memory_budget)


def soft_top_k_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    k: float,
    alpha: float = 1.0,
    weights: Tensor | None = None,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """:func:`hf_xmc.functional.soft_top_k_loss` of ``queries @ labels.T``; arguments as above."""
    if not (k > 0 and alpha > 0):
        raise ValueError(f"k and alpha must be positive, got k={k} and alpha={alpha}.")
    return _streamed(queries, labels, positives, weights, _SoftTopK(k, alpha), shard, memory_budget)


def _streamed(queries: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    if queries.ndim != 2 or labels.ndim != 2 or queries.shape[1] != labels.shape[1]:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and labels {tuple(labels.shape)}; expected (B, D) and (L, D)."
        )
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _Streamed.apply(queries, labels, *rest)
    return loss


class _Block:
    """Some queries against this process's labels, a chunk of labels at a time.

    ``known`` and ``weights`` are those of :func:`positive_weights`, ``mine`` the columns of the positives that this
    process owns, ``share`` ``(b, 1)`` what a query counts in the loss: one over their number, 0 without a positive.
    """

    def __init__(
        self, queries: Tensor, labels: Tensor, mine: Tensor, known: Tensor, weights: Tensor, share: Tensor, keep: bool
    ) -> None:
        self.queries, self.labels, self.known, self.weights, self.share = queries, labels, known, weights, share
        self.rows, self.slots = (known & (mine != IGNORE_INDEX)).nonzero(as_tuple=True)
        self.columns = mine[self.rows, self.slots]
        self.left_out = torch.ones_like(self.columns, dtype=torch.bool)  # which of them no sum over labels counts
        self.chunk = max(1, min(CHUNK, len(labels)))
        self.buffer = queries.new_empty(len(queries), len(labels) if keep else self.chunk)
        self.keep, self.filled = keep, False

    def chunks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Number, columns and scores ``(b, c)`` of each chunk, minus infinity where a label is left out.

        The scores may be overwritten: a block that keeps them hands them out again as they were left, another makes
        them afresh.
        """
        for number, start in enumerate(range(0, len(self.labels), self.chunk)):
            columns = slice(start, min(start + self.chunk, len(self.labels)))
            scores = self.buffer[:, columns if self.keep else slice(columns.stop - start)]
            if not self.filled:
                torch.mm(self.queries, self.labels[columns].T, out=scores)
                rows, within, _ = self._positives(columns, self.left_out)
                scores[rows, within] = -math.inf
            yield number, columns, scores
        self.filled = self.keep

    def positive_scores(self) -> Tensor:
        """``(b, P)``, where this process owns the label; 0 elsewhere."""
        scores = self.weights.new_zeros(self.weights.shape)
        for part in torch.arange(len(self.rows), device=self.rows.device).split(CHUNK):
            rows = self.rows[part]
            scores[rows, self.slots[part]] = (self.queries[rows] * self.labels[self.columns[part]]).sum(1)
        return scores

    def add_at_positives_(self, gradient: Tensor, columns: slice, values: Tensor) -> None:
        rows, within, slots = self._positives(columns, torch.ones_like(self.left_out))
        gradient[rows, within] += values[rows, slots]

    def _positives(self, columns: slice, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = which & (columns.start <= self.columns) & (self.columns < columns.stop)
        return self.rows[here], self.columns[here] - columns.start, self.slots[here]


class _Loss:
    """A loss as the driver sees it: a value from any number of walks over the chunks, then each chunk's gradient."""

    shard: LabelShard | None
    num_labels: int

    def value(self, block: _Block) -> Tensor:
        raise NotImplementedError

    def gradient_(self, block: _Block, number: int, columns: slice, scores: Tensor) -> None:
        """Turn scores into the derivative of the value with respect to them."""
        raise NotImplementedError


class _Softmax(_Loss):
    """Softmax and decoupled softmax: a function of each positive's score and one log-sum-exp a query."""

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled

    def value(self, block: _Block) -> Tensor:
        if not self.decoupled:  # positives take part in the sum, unless they were not sampled
            block.left_out = block.weights[block.rows, block.slots] == 0
        # Maximum and sum are kept apart: their log-sum-exp alone, near 1e4, has lost the sum.
        top = block.queries.new_full((len(block.queries), 1), torch.finfo(block.queries.dtype).min)
        total = torch.zeros_like(top)
        self.tops = []  # the maximum that each chunk's exponentials are relative to
        for _, _, scores in block.chunks():
            new_top = torch.maximum(top, scores.amax(1, keepdim=True))
            total = total * (top - new_top).exp() + scores.sub_(new_top).exp_().sum(1, keepdim=True)
            top = new_top
            self.tops.append(top)
        self.top = sharding.max_(top.clone(), self.shard)
        total = sharding.sum_(total * (top - self.top).exp(), self.shard)  # (b, 1)

        margin = self.top + total.log() - sharding.sum_(block.positive_scores(), self.shard)  # (b, P)
        weights = block.share * block.weights / block.weights.sum(1, keepdim=True).clamp(min=TINY)
        losses = F.softplus(margin) if self.decoupled else margin
        self.slope = weights * (margin.sigmoid() if self.decoupled else 1.0)
        self.pull = self.slope.sum(1, keepdim=True) / total.clamp(min=TINY)
        return torch.where(weights > 0, weights * losses, 0.0).sum()

    def gradient_(self, block: _Block, number: int, columns: slice, scores: Tensor) -> None:
        if block.keep:  # `value` has left their exponentials
            scores.mul_(self.pull * (self.tops[number] - self.top).exp())
        else:
            scores.sub_(self.top).exp_().mul_(self.pull)
        block.add_at_positives_(scores, columns, -self.slope)


class _BCE(_Loss):
    """One against all: the gradient of a score needs no other score."""

    def value(self, block: _Block) -> Tensor:
        misses = block.queries.new_zeros(len(block.queries), 1)
        for _, _, scores in block.chunks():
            misses += F.softplus(scores).sum(1, keepdim=True)
        misses = sharding.sum_(misses, self.shard)
        negatives = self.num_labels - block.known.sum(1, keepdim=True)
        self.share = block.share / (negatives + block.weights.sum(1, keepdim=True)).clamp(min=TINY)
        margin = -sharding.sum_(block.positive_scores(), self.shard)
        self.slope = self.share * block.weights * margin.sigmoid()
        hits = (block.weights * F.softplus(margin)).sum(1, keepdim=True)
        return (self.share * (hits + misses)).sum()

    def gradient_(self, block: _Block, number: int, columns: slice, scores: Tensor) -> None:
        scores.sigmoid_().mul_(self.share)
        block.add_at_positives_(scores, columns, -self.slope)


class _SoftTopK(_Loss):
    """A threshold a query, found by Newton steps over sums of ``p`` and ``1 - p``."""

    def __init__(self, k: float, alpha: float) -> None:
        self.k, self.alpha = k, alpha

    def value(self, block: _Block) -> Tensor:
        unsampled = block.known & (block.weights == 0)
        block.left_out = unsampled[block.rows, block.slots]
        k = block.queries.new_full((len(block.queries),), self.k)
        count = self.num_labels - unsampled.sum(1)
        lower, upper, start = self._bracket(block, k, count)

        def measure(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return balance(*self._both_sides(block, threshold), k)

        threshold = solve_threshold(measure, lower, upper, start, self.alpha)
        threshold = threshold.masked_fill(k >= count, math.inf)
        _, _, below_slope, _, above_slope = self._both_sides(block, threshold)
        self.threshold, self.log_total = threshold[:, None], torch.logaddexp(below_slope, above_slope)[:, None]

        margin = self.alpha * (sharding.sum_(block.positive_scores(), self.shard) + self.threshold)  # (b, P)
        weights = block.share * block.weights / block.weights.sum(1, keepdim=True).clamp(min=TINY)
        self.slope = self.alpha * weights * (-margin).sigmoid()
        self.pull = self.slope.sum(1, keepdim=True)
        return torch.where(weights > 0, weights * F.softplus(-margin), 0.0).sum()

    def gradient_(self, block: _Block, number: int, columns: slice, scores: Tensor) -> None:
        # pull * p (1 - p) / total, by way of logarithms: see hf_xmc.functional
        distance = scores.add_(self.threshold).mul_(self.alpha).abs_()
        log_denominator = distance.neg().exp_().log1p_().mul_(2)
        scores.add_(log_denominator).neg_().sub_(self.log_total.clamp(min=-1e30)).exp_().mul_(self.pull)
        block.add_at_positives_(scores, columns, -self.slope)

    def _bracket(self, block: _Block, k: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower and upper bound of the threshold, and a guess: the k-th largest of the maxima of groups of labels."""
        groups = max(1, min(64, int(len(block.labels) / (4 * self.k))))
        lowest = k.new_full(k.shape, math.inf)
        maxima = [k.new_full((len(k), 1), -math.inf)]
        for _, _, scores in block.chunks():
            lowest = torch.minimum(lowest, scores.masked_fill(scores == -math.inf, math.inf).amin(1))
            maxima.append(F.max_pool1d(scores, groups, ceil_mode=True) if groups > 1 else scores.clone())
        best = torch.cat(maxima, dim=1)
        best = best.topk(min(math.ceil(self.k), best.shape[1]), dim=1).values
        if self.shard is not None:
            best = sharding.gather_rows(best.T.contiguous()).T
        best = best.topk(min(math.ceil(self.k), best.shape[1]), dim=1).values
        lower, upper = threshold_bracket(-sharding.max_(-lowest, self.shard), best[:, 0], count, k, self.alpha)
        return lower, upper, -best[:, -1]

    def _both_sides(self, block: _Block, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The sums of :func:`balance`: exponentials relative to the label nearest to the threshold."""
        shift = threshold.new_full((len(threshold), 1), LARGE)
        sums = threshold.new_zeros(5, len(threshold))
        for _, _, scores in block.chunks():
            z = (scores + threshold[:, None]).mul_(self.alpha)
            above = (z >= 0).to(z.dtype)
            distance = z.abs_()
            new_shift = torch.minimum(shift, distance.amin(1, keepdim=True))
            tail = (new_shift - distance).exp_()
            denominator = (tail * (-new_shift).exp()).add_(1)
            tail /= denominator  # (1 - p above the threshold, p below) * e^shift
            slope = tail / denominator  # p (1 - p) * e^shift
            sums[1:] *= (new_shift - shift).exp()[:, 0]
            shift = new_shift
            above_tail, above_slope = (tail * above).sum(1), (slope * above).sum(1)
            sums += torch.stack(
                [above.sum(1), tail.sum(1) - above_tail, slope.sum(1) - above_slope, above_tail, above_slope]
            )
        nearest = -sharding.max_(-shift, self.shard)
        sums[1:] *= (nearest - shift).exp()[:, 0]
        sums = sharding.sum_(sums, self.shard)
        below, below_slope, above_tail, above_slope = sums[1:].log() - nearest[:, 0]
        return sums[0], below, below_slope, above_tail, above_slope


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        labels: Tensor,
        positives: Tensor,
        weights: Tensor | None,
        loss: _Loss,
        shard: LabelShard | None,
        memory_budget: int,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        x, y = (e if e.dtype == torch.float64 else e.float() for e in (queries, labels))
        loss.shard, loss.num_labels = shard, int(sharding.sum_(torch.tensor(len(y), device=y.device), shard))
        check_positives(positives, loss.num_labels)
        known, weights = positive_weights(positives, weights, x.dtype)
        mine = positives if shard is None else shard.localize(positives)
        has_positive = weights.sum(1, keepdim=True) > 0
        share = has_positive / has_positive.sum().clamp(min=1).to(x.dtype)

        widest = int(sharding.max_(torch.tensor(len(y), device=y.device), shard))  # all ranks must cut the same blocks
        block_size = memory_budget // (max(1, widest) * x.element_size())
        keep = block_size >= min(MIN_BLOCK, len(x))
        if not keep:
            block_size = max(1, memory_budget // (CHUNK * x.element_size()))

        value = x.new_zeros(())
        grad_x, grad_y = (torch.zeros_like(x), torch.zeros_like(y)) if wanted else (x, y)
        for start in range(0, len(x), block_size):
            rows = slice(start, start + block_size)
            block = _Block(x[rows], y, mine[rows], known[rows], weights[rows], share[rows], keep)
            value += loss.value(block)
            for number, columns, scores in block.chunks() if wanted else ():
                loss.gradient_(block, number, columns, scores)
                grad_x[rows].addmm_(scores, y[columns])
                grad_y[columns].addmm_(scores.T, block.queries)
        ctx.save_for_backward(grad_x, grad_y)
        ctx.dtypes = queries.dtype, labels.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ((grad * g).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return grad_x, grad_y, None, None, None, None, None
