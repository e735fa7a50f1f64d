"""One loss of embeddings: blocks of queries against chunks of labels, and the gradients of both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.functional import check_positives, positive_weights
from hf_xmc.losses.streaming import score_blocks
from hf_xmc.losses.streaming.block_losses import BlockLoss, BlockPositives, ChunkGradient
from hf_xmc.losses.streaming.gradients import Gradients
from hf_xmc.losses.streaming.options import StreamingOptions
from hf_xmc.losses.streaming.score_blocks import LabelTextRows, ScoreBlock, ScoreBuffers, TextBlock
from hf_xmc.losses.streaming.triton_check import kernels_work
from hf_xmc.padding import IGNORE_INDEX

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
MIN_BLOCK = 96  # queries: smaller blocks waste more in their products than a fourth product costs
MAX_BLOCK = 256  # queries: larger blocks gain nothing on a CPU


@dataclass(frozen=True)
class Task:
    """The inputs of a loss in addition to embeddings.

    Attributes:
        make_loss: Function that makes the loss, given the number of all labels and the shard.
        positives: ``(B, P)`` label ids.
        weights: ``(B, P)`` weights of the positives, or ``None``.
        options: The settings.
    """

    make_loss: Callable[[int, LabelShard | None], BlockLoss]
    positives: Tensor
    weights: Tensor | None
    options: StreamingOptions


def stream(queries: Tensor, labels: Tensor, task: Task, offset: Tensor | None = None) -> Tensor:
    """Return a loss whose score matrix is never stored.

    Args:
        queries: ``(B, D)``.
        labels: ``(L, D)``.
        task: The loss, the positives and the settings.
        offset: ``(B, 1)``, added to the scores of each query.

    Raises:
        ValueError: if shapes disagree, ``text_counts`` do not fit ``labels``, or a positive is invalid.
    """
    if queries.ndim != 2 or labels.ndim != 2 or queries.shape[1] != labels.shape[1]:
        raise ValueError(
            f"`queries` and `labels` must have shapes (B, D) and (L, D), got {tuple(queries.shape)} and "
            f"{tuple(labels.shape)}."
        )
    counts = task.options.text_counts
    if counts is not None and (bool((counts < 1).any()) or int(counts.sum()) != len(labels)):
        raise ValueError(
            f"`text_counts` must be at least 1 and add up to the {len(labels)} rows of `labels`, got a sum of "
            f"{int(counts.sum())} and a minimum of {int(counts.min()) if len(counts) else 0}."
        )
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _Streamed.apply(queries, labels, offset, task)
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, labels: Tensor, offset: Tensor | None, task: Task) -> Tensor:
        options = task.options
        texts = None if options.text_counts is None else LabelTextRows(options.text_counts)
        x = queries if queries.dtype == torch.float64 else queries.float()
        positives, num_labels = _QueryPositives.of(task, len(labels) if texts is None else len(texts.counts), x.dtype)
        block_loss = task.make_loss(num_labels, options.shard)
        x = block_loss.scale * x
        gradients = None
        if any(ctx.needs_input_grad):
            gradients = Gradients(x, labels, offset, options.gradient_dtype or x.dtype)
        half = queries.dtype in HALF
        given = queries if half and labels.dtype == queries.dtype else x
        block_type = TextBlock if texts else _block_type(given, labels, block_loss, options)
        kept = None
        if block_loss.needs_rows and block_type in (ScoreBlock, TextBlock):
            kept = gradients.dtype if gradients and block_loss.keeps_exponentials else x.dtype
        block_size, kept = _plan(x, labels, texts, kept, options)

        buffers = ScoreBuffers(block_size, x, labels, kept, texts, options.score_dtype)
        value = x.new_zeros(())
        for start in range(0, max(1, len(x)), block_size):
            rows = slice(start, start + block_size)
            block = block_type(x[rows], labels, None if offset is None else offset[rows], buffers)
            if half:
                block.unscaled = queries[rows], block_loss.scale
            p = positives.of_block(block, rows)
            reduced = block_loss.reduce(block, p, _adder(gradients, block, rows) if gradients else None)
            if gradients:
                gradients.add_positives(rows, p, reduced.positive_grad)
            value += reduced.value
        if gradients:
            gradients.queries *= block_loss.scale
        ctx.gradients, ctx.dtypes = gradients, (queries.dtype, labels.dtype)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of a streamed loss are computed in its forward pass and returned by the first backward "
                "pass. Call the loss again before a second backward pass."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if grad != 1:  # the comparison is cheaper than a pass over the gradients, which nothing else uses
            gradients.scale_(grad)
        grad_offset = None if gradients.offset is None else gradients.offset.to(ctx.dtypes[0])
        return gradients.queries.to(ctx.dtypes[0]), gradients.labels.to(ctx.dtypes[1]), grad_offset, None


def _adder(gradients: Gradients, block: ScoreBlock, rows: slice) -> ChunkGradient:
    def add(number: int, derivative: Tensor, factor: Tensor) -> None:
        gradients.add(rows, block.rows_of(number), block.by_row(number, derivative), factor)

    return add


@dataclass(frozen=True)
class _QueryPositives:
    """The positives of all queries, as in BlockPositives. ``own`` holds the columns of this process's labels."""

    own: Tensor
    known: Tensor
    weights: Tensor
    query_weights: Tensor
    shard: LabelShard | None

    @classmethod
    def of(cls, task: Task, num_own_labels: int, dtype: torch.dtype) -> tuple[_QueryPositives, int]:
        """Check the positives. Return them and the number of labels of all processes."""
        positives, shard = task.positives, task.options.shard
        num_labels = int(distributed.sum_(torch.tensor(num_own_labels, device=positives.device), shard))
        check_positives(positives, num_labels)
        known, weights = positive_weights(positives, task.weights, dtype)
        has_positive = weights.sum(1, keepdim=True) > 0
        query_weights = has_positive / has_positive.sum().clamp(min=1).to(dtype)
        own = positives if shard is None else shard.localize(positives)
        return cls(own, known, weights, query_weights, shard), num_labels

    def of_block(self, block: ScoreBlock, queries: slice) -> BlockPositives:
        known, own, weights = self.known[queries], self.own[queries], self.weights[queries]
        rows, slots = (known & (own != IGNORE_INDEX)).nonzero(as_tuple=True)
        columns = own[rows, slots]
        scores = torch.zeros_like(weights)
        scores[rows, slots], texts = block.scores_of(rows, columns)
        scores = distributed.sum_(scores, self.shard)
        return BlockPositives(known, weights, self.query_weights[queries], rows, slots, columns, texts, scores)


def _block_type(x: Tensor, labels: Tensor, block_loss: BlockLoss, options: StreamingOptions) -> type[ScoreBlock]:
    fits = block_loss.keeps_exponentials and x.dtype != torch.float64
    if options.engine == "torch" or options.score_dtype or not fits:
        return ScoreBlock
    if options.engine == "auto":
        if not is_on_gpu(x):
            return ScoreBlock
        works = triton_is_installed() and kernels_work(x.device, (x.dtype, labels.dtype), x.shape[1])
        # All ranks must use the same blocks.
        if distributed.max_(torch.tensor(0 if works else 1, device=x.device), options.shard):
            return ScoreBlock
    from hf_xmc.losses.streaming.triton_blocks import TritonBlock

    return TritonBlock


def is_on_gpu(x: Tensor) -> bool:
    """Return whether Triton is the engine for this tensor, if it works."""
    return x.is_cuda


@cache
def triton_is_installed() -> bool:
    """Return whether Triton is installed, with a warning the first time that it is not."""
    installed = find_spec("triton") is not None
    if not installed:
        logger.warning(
            "Triton is not installed, so losses on the GPU run in plain torch. Install it with `pip install triton`."
        )
    return installed


def _plan(
    x: Tensor, labels: Tensor, texts: LabelTextRows | None, kept: torch.dtype | None, options: StreamingOptions
) -> tuple[int, torch.dtype | None]:
    """Return the queries of a block, and the precision in which it keeps all its labels; ``None`` for one chunk."""
    of_texts = 0 if texts is None else 2  # a chunk's products and their derivatives
    size = options.memory_budget // (score_blocks.CHUNK * (1 + of_texts) * x.element_size())
    if kept is not None:
        row = (
            len(labels) * kept.itemsize if texts is None else len(texts.counts) * (kept.itemsize + texts.dtype.itemsize)
        )
        # All ranks must use the same blocks.
        widest = int(distributed.max_(torch.tensor(row, device=x.device), options.shard))
        rows = options.memory_budget // max(kept.itemsize, widest)
        if rows >= min(MIN_BLOCK, len(x)):
            size = rows if x.is_cuda else min(rows, MAX_BLOCK)
        else:
            kept = None
    size = max(1, min(size, len(x)))
    return math.ceil(len(x) / math.ceil(len(x) / size)) or 1, kept
