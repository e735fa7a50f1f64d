"""The value of each loss on a block of scores, and its derivative with respect to the scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.soft_top_k import softplus
from hf_xmc.losses.streaming.score_blocks import ScoreBlock

LN2, LOG2_E = math.log(2), 1 / math.log(2)
TINY = 1e-30

# Arguments: number of a chunk of labels, derivatives ``(b, c)`` by its scores, and a factor ``(b, 1)`` for them.
ChunkGradient: TypeAlias = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class BlockPositives:
    """The positives of a block's queries.

    Attributes:
        known: ``(b, P)``, as returned by :func:`hf_xmc.losses.functional.positive_weights`.
        weights: ``(b, P)``, as returned by the same function.
        query_weights: ``(b, 1)``, one over the number of queries with a positive; 0 for a query without one.
        rows: Queries of the positives that belong to this process.
        slots: Second index into ``known`` of the same positives.
        columns: Their labels, counted within this process.
        texts: Their rows in the label embeddings.
        scores: ``(b, P)`` scores, including those of other processes.
    """

    known: Tensor
    weights: Tensor
    query_weights: Tensor
    rows: Tensor
    slots: Tensor
    columns: Tensor
    texts: Tensor
    scores: Tensor

    def normalized_weights(self) -> Tensor:
        return self.query_weights * self.weights / self.weights.sum(1, keepdim=True).clamp(min=TINY)

    def pairs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the positives in a mask ``(b, P)`` that belong to this process."""
        entries = chosen[self.rows, self.slots]
        return self.rows[entries], self.columns[entries]


class Reduced(NamedTuple):
    """A loss on a block of scores.

    Attributes:
        value: The block's part of the loss.
        positive_grad: ``(b, P)`` derivative by each positive's own score, without the part that flows through sums
            over labels.
    """

    value: Tensor
    positive_grad: Tensor


class BlockLoss(ABC):
    """A loss of the scores of some queries against all labels.

    Attributes:
        scale: Scores are multiplied by this number in advance.
        needs_rows: Whether the derivative by one score depends on the other scores of its query.
        keeps_exponentials: Whether a block may keep exponentials of scores in the precision of the gradient. Storing
            them in bfloat16 gives the gradient the same relative error, and leaves the value unchanged.
    """

    scale = 1.0
    needs_rows = True
    keeps_exponentials = False

    def __init__(self, num_labels: int, shard: LabelShard | None) -> None:
        self.num_labels, self.shard = num_labels, shard

    @abstractmethod
    def reduce(self, block: ScoreBlock, p: BlockPositives, add: ChunkGradient | None) -> Reduced:
        """Return the loss of a block, and pass the derivatives by its scores to ``add``.

        Args:
            block: The scores.
            p: The positives of the block's queries.
            add: Called once for each chunk of labels, with derivatives that exclude ``positive_grad``. It may
                overwrite them. ``None`` if no gradient is needed.
        """


class Softmax(BlockLoss):
    """A function of each positive's score and one log-sum-exp per query."""

    scale = LOG2_E  # 2 ** x costs less than e ** x
    keeps_exponentials = True
    decoupled = False

    def reduce(self, block: ScoreBlock, p: BlockPositives, add: ChunkGradient | None) -> Reduced:
        # The sum includes positives, except those that were not sampled. Decoupled softmax excludes all of them.
        block.mask_(*p.pairs(p.known if self.decoupled else p.known & (p.weights == 0)))
        own_top, total = block.max_and_sum()
        top = distributed.max_(own_top.clone(), self.shard)
        total = distributed.sum_(total * (own_top - top).exp2_(), self.shard)
        margin = LN2 * (top + total.log2() - p.scores)  # (b, P)
        weights = p.normalized_weights()
        losses = softplus(margin) if self.decoupled else margin
        value = torch.where(weights > 0, weights * losses, 0.0).sum()
        pull = LN2 * weights * (margin.sigmoid() if self.decoupled else 1.0)  # (b, P)
        if add is not None:
            by_total = pull.sum(1, keepdim=True) / total.clamp(min=TINY)
            for number, exponentials, factor in block.exponentials(top):
                add(number, exponentials, factor * by_total)
        return Reduced(value, -pull)


class DecoupledSoftmax(Softmax):
    """A softmax whose sum excludes all positives of the query."""

    decoupled = True


class BCE(BlockLoss):
    """One-against-all classification, in which the derivative by a score needs no other score."""

    needs_rows = False

    def reduce(self, block: ScoreBlock, p: BlockPositives, add: ChunkGradient | None) -> Reduced:
        block.mask_(*p.pairs(p.known))
        negatives = self.num_labels - p.known.sum(1, keepdim=True)
        weight = p.query_weights / (negatives + p.weights.sum(1, keepdim=True)).clamp(min=TINY)
        misses = torch.zeros_like(weight)
        for number, scores in block.scores():
            misses += softplus(scores).sum(1, keepdim=True)
            if add is not None:
                add(number, scores.sigmoid_(), weight)
        hits = (p.weights * softplus(-p.scores)).sum(1, keepdim=True)
        value = (weight * (hits + distributed.sum_(misses, self.shard))).sum()
        return Reduced(value, -(weight * p.weights * (-p.scores).sigmoid()))
