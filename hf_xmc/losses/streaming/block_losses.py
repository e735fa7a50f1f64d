"""The value of each loss on a block of scores, and its derivative with respect to the scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.soft_top_k import softplus
from hf_xmc.losses.streaming.score_blocks import ScoreBlock

LN2, LOG2_E = math.log(2), 1 / math.log(2)
TINY = 1e-30


@dataclass
class BlockPositives:
    """The positives of a block's queries.

    ``known`` and ``weights`` are those of :func:`hf_xmc.losses.functional.positive_weights`, ``(b, P)``; ``share``
    ``(b, 1)`` what a query counts in the loss: one over their number, 0 without a positive; ``rows``, ``slots`` the
    entries whose label this process owns, ``columns`` the labels, ``texts`` the rows of the embeddings that they score
    by; ``scores`` ``(b, P)``, of all processes.
    """

    known: Tensor
    weights: Tensor
    share: Tensor
    rows: Tensor
    slots: Tensor
    columns: Tensor
    texts: Tensor
    scores: Tensor

    def normalized_weights(self) -> Tensor:
        return self.share * self.weights / self.weights.sum(1, keepdim=True).clamp(min=TINY)


class Criterion(ABC):
    """A loss as the driver sees it. Scores are multiplied by ``scale`` before it sees them."""

    scale = 1.0
    needs_rows = True  # the derivative by one score depends on the query's other scores
    keeps_exponentials = False  # whose low precision costs the gradient as much precision, and the value none

    value: Tensor
    slope: Tensor  # (b, P), minus the derivative by the positives' own scores, as if they took no part in any sum

    def __init__(self, num_labels: int, shard: LabelShard | None) -> None:
        self.num_labels, self.shard = num_labels, shard

    @abstractmethod
    def look(self, block: ScoreBlock, p: BlockPositives) -> None:
        """Walk over the scores until their derivatives are known."""

    @abstractmethod
    def gradients(self, block: ScoreBlock, p: BlockPositives) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number of each chunk, and the derivative by its scores, ``(b, c)``, to be multiplied by a factor ``(b, 1)``.

        Without what ``slope`` holds. Afterwards, ``value`` holds the part of the loss.
        """

    @staticmethod
    def _leave_out(block: ScoreBlock, p: BlockPositives, which: Tensor) -> None:
        entries = which[p.rows, p.slots]
        block.leave_out(p.rows[entries], p.columns[entries])


class Softmax(Criterion):
    """A function of each positive's score and one log-sum-exp a query."""

    scale = LOG2_E  # 2 ** x costs less than e ** x
    keeps_exponentials = True
    decoupled = False

    def look(self, block: ScoreBlock, p: BlockPositives) -> None:
        # Positives take part in the sum, unless they were not sampled. Decoupled: none does.
        self._leave_out(block, p, p.known if self.decoupled else p.known & (p.weights == 0))
        top, total = block.max_and_sum()
        self.top = distributed.max_(top.clone(), self.shard)
        total = distributed.sum_(total * (top - self.top).exp2_(), self.shard)
        margin = LN2 * (self.top + total.log2() - p.scores)  # (b, P)
        weights = p.normalized_weights()
        losses = softplus(margin) if self.decoupled else margin
        self.value = torch.where(weights > 0, weights * losses, 0.0).sum()
        self.slope = LN2 * weights * (margin.sigmoid() if self.decoupled else 1.0)
        self.factor = self.slope.sum(1, keepdim=True) / total.clamp(min=TINY)

    def gradients(self, block: ScoreBlock, p: BlockPositives) -> Iterator[tuple[int, Tensor, Tensor]]:
        for number, exponentials, factor in block.exponentials(self.top):
            yield number, exponentials, factor * self.factor


class DecoupledSoftmax(Softmax):
    decoupled = True


class BCE(Criterion):
    """One against all: the derivative by a score needs no other score."""

    needs_rows = False

    def look(self, block: ScoreBlock, p: BlockPositives) -> None:
        pass

    def gradients(self, block: ScoreBlock, p: BlockPositives) -> Iterator[tuple[int, Tensor, Tensor]]:
        self._leave_out(block, p, p.known)
        negatives = self.num_labels - p.known.sum(1, keepdim=True)
        share = p.share / (negatives + p.weights.sum(1, keepdim=True)).clamp(min=TINY)
        self.slope = share * p.weights * (-p.scores).sigmoid()
        misses = torch.zeros_like(share)
        for number, scores in block.scores():
            misses += softplus(scores).sum(1, keepdim=True)
            yield number, scores.sigmoid_(), share
        hits = (p.weights * softplus(-p.scores)).sum(1, keepdim=True)
        self.value = (share * (hits + distributed.sum_(misses, self.shard))).sum()
