"""Soft top-k as a :class:`~hf_xmc.losses.streaming.block_losses.BlockLoss`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.soft_top_k import (
    Balance,
    Solution,
    balance,
    both_sides,
    softplus,
    solve_threshold,
    threshold_bracket,
)
from hf_xmc.losses.streaming.block_losses import LN2, LOG2_E, TINY, BlockLoss, BlockPositives, ChunkGradient, Reduced
from hf_xmc.losses.streaming.score_blocks import PairsByChunk, ScoreBlock

TOP_LABELS = 32


class SoftTopK(BlockLoss):
    r"""One threshold per query, found by Newton steps.

    Scores and threshold are scaled by :math:`\alpha / \ln 2`, so that :math:`p = \sigma(\ln 2 \, (s + t))`. The top
    labels of a query, at least ``2 k``, are treated one by one, in logarithms. No other label can have
    :math:`p > 1/2`. For all other labels, the block keeps :math:`e = 2^{s - s_K}`, relative to the last top label. With
    :math:`r = 2^{s_K + t} \le 1` they have :math:`p = r e / (1 + r e)`, so a Newton step takes no exponential.
    """

    def __init__(self, num_labels: int, shard: LabelShard | None, k: float, alpha: float) -> None:
        super().__init__(num_labels, shard)
        self.k, self.scale = k, alpha * LOG2_E

    def reduce(self, block: ScoreBlock, p: BlockPositives, add: ChunkGradient | None) -> Reduced:
        unsampled = p.known & (p.weights == 0)
        block.mask_(*p.pairs(unsampled))
        k = p.query_weights.new_full((len(p.query_weights),), self.k)
        count = self.num_labels - unsampled.sum(1)

        top = TopScores(block, math.ceil(2 * self.k))
        rest = RestScores(block, top.last)
        solution = self._solve(top, rest, k, count)

        threshold = solution.threshold.masked_fill(k >= count, math.inf)
        margin = LN2 * (p.scores + threshold[:, None])  # (b, P)
        weights = p.normalized_weights()
        value = torch.where(weights > 0, weights * softplus(-margin), 0.0).sum()
        pull = LN2 * weights * (-margin).sigmoid()  # (b, P)
        if add is not None:
            _add_gradients(add, top, rest, solution, pull.sum(1, keepdim=True))
        return Reduced(value, -pull)

    def _solve(self, top: TopScores, rest: RestScores, k: Tensor, count: Tensor) -> Solution:
        lower, upper, start = self._bracket(top, k, count)
        first, second = rest.moments()
        guess = solve_threshold(
            lambda t: self._balance(top, t, k, *rest.estimated_sums(t, first, second)), lower, upper, start, LN2
        )
        return solve_threshold(lambda t: self._balance(top, t, k, *rest.sums(t)), lower, upper, guess.threshold, LN2)

    def _bracket(self, top: TopScores, k: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a lower bound, an upper bound and a guess of the threshold, equal on all processes."""

        def highest(of: Tensor) -> Tensor:
            return distributed.max_(of.clone(), self.shard)

        def nth(n: int) -> Tensor:
            size = top.scores.shape[1]
            return highest(top.scores[:, n - 1] if n <= size else torch.full_like(top.last, -math.inf))

        lowest = -highest(-top.scores.masked_fill(top.scores == -math.inf, math.inf).amin(1))
        lower, upper = threshold_bracket(lowest, highest(top.scores[:, 0]), count, k, LN2)
        # With 2 k labels at p >= 1/2 the sum is at least k. A query with fewer labels has all of them in its list.
        bound = -nth(math.ceil(2 * self.k))
        return lower, torch.where(bound.isfinite(), bound, upper), -nth(math.ceil(self.k))

    def _balance(self, top: TopScores, threshold: Tensor, k: Tensor, rest: Tensor, rest_slope: Tensor) -> Balance:
        """Call :func:`hf_xmc.losses.soft_top_k.balance` on the log-sums over top labels, other labels and processes."""
        count, below, below_slope, above, above_slope = both_sides(LN2 * (top.scores + threshold[:, None]))
        logs = torch.stack([torch.logaddexp(below, rest), torch.logaddexp(below_slope, rest_slope), above, above_slope])
        largest = distributed.max_(logs.clone(), self.shard).clamp(min=torch.finfo(logs.dtype).min)
        logs = distributed.sum_((logs - largest).exp(), self.shard).log() + largest
        below, below_slope, above, above_slope = logs
        return balance(distributed.sum_(count, self.shard), below, below_slope, above, above_slope, k)


class TopScores:
    """The best labels of each query of a block. They are then masked in the block.

    Args:
        block: The scores.
        size: Minimum number of labels. At least ``TOP_LABELS`` are used, if there are that many.

    Attributes:
        scores: ``(b, K)``, in descending order.
        last: ``(b,)``, the last score. No label that remains in the block scores above it.
    """

    def __init__(self, block: ScoreBlock, size: int) -> None:
        size = min(max(TOP_LABELS, size), max(1, block.num_labels))
        top = block.queries.new_full((len(block.queries), size), -math.inf)
        labels = torch.zeros_like(top, dtype=torch.long)
        for number, scores in block.scores():
            rows = (scores.amax(1) > top[:, -1]).nonzero()[:, 0]
            values, columns = scores[rows].topk(min(size, scores.shape[1]), dim=1)
            values = torch.cat([top[rows], values], dim=1)
            columns = torch.cat([labels[rows], columns + block.slices[number].start], dim=1)
            top[rows], order = values.topk(size, dim=1)
            labels[rows] = columns.gather(1, order)
        self.scores, self.last = top, top[:, -1].clamp(min=torch.finfo(top.dtype).min)
        self._entries = (top > -math.inf).nonzero(as_tuple=True)
        columns = labels[self._entries]
        self._pairs = PairsByChunk(block.slices, columns.device, self._entries[0], columns)
        block.mask_(self._entries[0], columns)

    def write_(self, chunk: Tensor, number: int, values: Tensor) -> None:
        """Write ``values``, ``(b, K)``, to the places of the top labels in a chunk."""
        self._pairs.put_(chunk, number, values[self._entries])


class RestScores:
    """The labels of a block that are not among the top labels, as ``e = 2 ** (score - last)``.

    Args:
        block: The scores, in which the top labels are masked.
        last: ``(b,)``, the score of the last top label.
    """

    def __init__(self, block: ScoreBlock, last: Tensor) -> None:
        self._block, self._last = block, last
        self._stored = False  # whether the block holds exponentials instead of scores

    def exponentials(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each chunk and its ``e``, ``(b, c)``."""
        for number, scores in self._block.scores():
            yield number, scores if self._stored else scores.sub_(self._last[:, None]).exp2_()
        self._stored = self._block.filled

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the sums of ``e`` and of ``e ** 2``, ``(b,)`` each."""
        first, second = torch.zeros_like(self._last), torch.zeros_like(self._last)
        for _, rest in self.exponentials():
            first += rest.sum(1)
            second += (rest * rest).sum(1)
        return first, second

    def sums(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-sums of ``p`` and of ``p (1 - p)``, ``(b,)`` each."""
        log_ratio = self.log_ratio(threshold)
        ratio = log_ratio.exp()
        first, second = torch.zeros_like(ratio), torch.zeros_like(ratio)
        for _, rest in self.exponentials():
            p = torch.mul(rest, ratio[:, None]).add_(1)
            torch.div(rest, p, out=p)
            first += p.sum(1)
            second += p.mul_(p).sum(1)
        return log_ratio + first.log(), log_ratio + (first - ratio * second).log()

    def estimated_sums(self, threshold: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate :meth:`sums` from :meth:`moments`; exact if all ``e`` are equal."""
        log_ratio = self.log_ratio(threshold)
        denominator = (log_ratio.exp() * second / first.clamp(min=TINY)).log1p()
        return log_ratio + first.log() - denominator, log_ratio + first.log() - 2 * denominator

    def log_ratio(self, threshold: Tensor) -> Tensor:
        r"""Return :math:`\log r`, ``(b,)``."""
        return LN2 * (self._last + threshold)


def _add_gradients(add: ChunkGradient, top: TopScores, rest: RestScores, solution: Solution, pull: Tensor) -> None:
    """Add the part of each label in the sum of ``p (1 - p)``: the fall of the threshold as its score grows."""
    # If k covers all labels the threshold is infinite. Use a finite stand-in: its factor is 0, and 0 * inf is NaN.
    missing = ~solution.measured_at.isfinite()
    threshold = torch.where(missing, -top.scores[:, 0].clamp(min=-1e38), solution.measured_at)
    log_total = solution.log_total.masked_fill(missing, 0.0)[:, None]
    z = LN2 * (top.scores + threshold[:, None])
    top_slopes = F.logsigmoid(z) + F.logsigmoid(-z)  # (b, K)
    log_ratio = rest.log_ratio(threshold)[:, None]
    largest = torch.maximum(top_slopes.amax(1, keepdim=True), log_ratio)
    factor = pull * (largest - log_total).exp()
    top_shares = (top_slopes - largest).exp()
    for number, chunk in rest.exponentials():
        denominator = (chunk * log_ratio.exp()).add_(1)
        chunk.div_(denominator.mul_(denominator)).mul_((log_ratio - largest).exp())
        top.write_(chunk, number, top_shares)
        add(number, chunk, factor)
