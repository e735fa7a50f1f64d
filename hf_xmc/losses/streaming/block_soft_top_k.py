"""Soft top-k as a criterion of :mod:`hf_xmc.losses.streaming.block_losses`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.soft_top_k import balance, both_sides, softplus, solve_threshold, threshold_bracket
from hf_xmc.losses.streaming.block_losses import LN2, LOG2_E, TINY, BlockPositives, Criterion
from hf_xmc.losses.streaming.score_blocks import PairsByChunk, ScoreBlock

TOP_LABELS = 32


class SoftTopK(Criterion):
    r"""A threshold a query, found by Newton steps.

    Scores and threshold are scaled by :math:`\alpha / \ln 2`, so that :math:`p = \sigma(\ln 2 \, (s + t))`. A query's
    top labels, at least ``2 k``, are treated one by one, in logarithms; none of the rest can have :math:`p > 1/2`. Of
    these the numbers :math:`e = 2^{s - s_K}`, relative to the last top label, are kept: with :math:`r = 2^{s_K + t}
    \le 1` they have :math:`p = r e / (1 + r e)`, and a Newton step takes no exponential.
    """

    def __init__(self, num_labels: int, shard: LabelShard | None, k: float, alpha: float) -> None:
        super().__init__(num_labels, shard)
        self.k, self.scale = k, alpha * LOG2_E

    def look(self, block: ScoreBlock, p: BlockPositives) -> None:
        unsampled = p.known & (p.weights == 0)
        self._leave_out(block, p, unsampled)
        k = p.share.new_full((len(p.share),), self.k)
        count = self.num_labels - unsampled.sum(1)

        self._find_top(block)
        lower, upper, start = self._bracket(k, count)
        self.are_exponentials = False
        first, second = self._moments(block)
        start = solve_threshold(lambda t: self._balance(t, k, *self._guess(t, first, second)), lower, upper, start, LN2)
        threshold = solve_threshold(lambda t: self._balance(t, k, *self._rest(t, block)), lower, upper, start, LN2)

        threshold = threshold.masked_fill(k >= count, math.inf)
        margin = LN2 * (p.scores + threshold[:, None])  # (b, P)
        weights = p.normalized_weights()
        self.value = torch.where(weights > 0, weights * softplus(-margin), 0.0).sum()
        self.slope = LN2 * weights * (-margin).sigmoid()

    def gradients(self, block: ScoreBlock, p: BlockPositives) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each label's part of the sum of ``p (1 - p)``: what the threshold loses as the label's score grows."""
        # Where k covers all labels the threshold is no number, and nothing is multiplied by it.
        missing = ~self.measured_at.isfinite()
        threshold = torch.where(missing, -self.top[:, 0].clamp(min=-1e38), self.measured_at)
        log_total = self.log_total.masked_fill(missing, 0.0)[:, None]
        z = LN2 * (self.top + threshold[:, None])
        top_slopes = F.logsigmoid(z) + F.logsigmoid(-z)  # (b, K)
        ratio = LN2 * (self.last + threshold)[:, None]
        largest = torch.maximum(top_slopes.amax(1, keepdim=True), ratio)
        factor = self.slope.sum(1, keepdim=True) * (largest - log_total).exp()
        at_top = (top_slopes - largest).exp()[self.entries]
        for number, rest in self._rest_exponentials(block):
            denominator = (rest * ratio.exp()).add_(1)
            rest.div_(denominator.mul_(denominator)).mul_((ratio - largest).exp())
            self.pairs.put_(rest, number, at_top)
            yield number, rest, factor

    def _find_top(self, block: ScoreBlock) -> None:
        """Scores ``top`` ``(b, K)`` of the best labels, descending; from now on the block is without them."""
        size = min(max(TOP_LABELS, math.ceil(2 * self.k)), max(1, block.num_labels))
        top = block.queries.new_full((len(block.queries), size), -math.inf)
        where = torch.zeros_like(top, dtype=torch.long)
        for number, scores in block.scores():
            rows = (scores.amax(1) > top[:, -1]).nonzero()[:, 0]
            values, columns = scores[rows].topk(min(size, scores.shape[1]), dim=1)
            values = torch.cat([top[rows], values], dim=1)
            columns = torch.cat([where[rows], columns + block.slices[number].start], dim=1)
            top[rows], order = values.topk(size, dim=1)
            where[rows] = columns.gather(1, order)
        self.top, self.entries = top, (top > -math.inf).nonzero(as_tuple=True)
        self.last = top[:, -1].clamp(min=torch.finfo(top.dtype).min)  # the rest of the scores are not above it
        columns = where[self.entries]
        self.pairs = PairsByChunk(block.slices, columns.device, self.entries[0], columns)
        block.leave_out(self.entries[0], columns)

    def _bracket(self, k: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower and upper bound of the threshold, and a guess, equal on all processes."""

        def highest(of: Tensor) -> Tensor:
            return distributed.max_(of.clone(), self.shard)

        def nth(n: int) -> Tensor:
            return highest(self.top[:, n - 1] if n <= self.top.shape[1] else torch.full_like(self.last, -math.inf))

        lowest = -highest(-self.top.masked_fill(self.top == -math.inf, math.inf).amin(1))
        lower, upper = threshold_bracket(lowest, highest(self.top[:, 0]), count, k, LN2)
        # With 2 k labels at p >= 1/2 the sum is k or more. Who has not so many labels has them all in its list.
        bound = -nth(math.ceil(2 * self.k))
        return lower, torch.where(bound.isfinite(), bound, upper), -nth(math.ceil(self.k))

    def _balance(self, threshold: Tensor, k: Tensor, rest: Tensor, rest_slope: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`hf_xmc.losses.soft_top_k.balance`, given the log-sums of ``p`` and ``p (1 - p)`` over the rest."""
        count, below, below_slope, above, above_slope = both_sides(LN2 * (self.top + threshold[:, None]))
        logs = torch.stack([torch.logaddexp(below, rest), torch.logaddexp(below_slope, rest_slope), above, above_slope])
        largest = distributed.max_(logs.clone(), self.shard).clamp(min=torch.finfo(logs.dtype).min)
        logs = distributed.sum_((logs - largest).exp(), self.shard).log() + largest
        self.measured_at, self.log_total = threshold, torch.logaddexp(logs[1], logs[3])
        below, below_slope, above, above_slope = logs
        return balance(distributed.sum_(count, self.shard), below, below_slope, above, above_slope, k)

    def _guess(self, threshold: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate :meth:`_rest` from the sums of ``e`` and ``e ** 2``; exact if all ``e`` are equal."""
        ratio = LN2 * (self.last + threshold)
        denominator = (ratio.exp() * second / first.clamp(min=TINY)).log1p()
        return ratio + first.log() - denominator, ratio + first.log() - 2 * denominator

    def _moments(self, block: ScoreBlock) -> tuple[Tensor, Tensor]:
        first, second = torch.zeros_like(self.last), torch.zeros_like(self.last)
        for _, rest in self._rest_exponentials(block):
            first += rest.sum(1)
            second += (rest * rest).sum(1)
        return first, second

    def _rest(self, threshold: Tensor, block: ScoreBlock) -> tuple[Tensor, Tensor]:
        """Log-sums of ``p`` and ``p (1 - p)`` over the labels that are not in the list."""
        log_ratio = LN2 * (self.last + threshold)
        ratio = log_ratio.exp()
        first, second = torch.zeros_like(ratio), torch.zeros_like(ratio)
        for _, rest in self._rest_exponentials(block):
            p = torch.mul(rest, ratio[:, None]).add_(1)
            torch.div(rest, p, out=p)
            first += p.sum(1)
            second += p.mul_(p).sum(1)
        return log_ratio + first.log(), log_ratio + (first - ratio * second).log()

    def _rest_exponentials(self, block: ScoreBlock) -> Iterator[tuple[int, Tensor]]:
        for number, scores in block.scores():
            yield number, scores if self.are_exponentials else scores.sub_(self.last[:, None]).exp2_()
        self.are_exponentials = block.filled
