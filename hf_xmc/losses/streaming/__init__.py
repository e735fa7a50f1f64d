r"""The losses of :mod:`hf_xmc.losses.functional` from embeddings, without ever holding the ``B x L`` score matrix.

Each function takes ``queries`` ``(B, D)`` and ``labels`` ``(L, D)``; the score is their dot product (divide the queries
by the temperature first). Value and gradient are exact. Scores are made for a block of queries and a chunk of labels at
a time, within ``memory_budget`` bytes:

* A block of queries keeps what it makes of the scores of all its labels until the gradient: three matrix products in
  all. This is the default.
* Where the budget holds no useful block, all queries walk over chunks of labels, and a chunk's scores are made once to
  be summed and again for the gradient: four products, a few MB whatever the number of labels (soft top-k: one more for
  each walk that its threshold takes). BCE needs one walk, and three products, either way.

The gradients are made in the forward pass, so that nothing but them has to be kept; going backward hands them over, and
so can be done once.

Precision: scores are made in float32 (float64 for float64), also under autocast. Labels in bfloat16 or float16 are
converted a chunk at a time. ``gradient_dtype=torch.bfloat16`` has the two products that make the gradients take
bfloat16 factors: half the memory and, where the hardware multiplies bfloat16 fast (a GPU, a CPU with AMX; on others it
takes longer), less time, for a relative error of about 2e-3 in the gradients and none in the value.

Engine: with labels on a GPU, softmax and decoupled softmax run in Triton
(:mod:`~hf_xmc.losses.streaming.triton_blocks`), which makes the scores twice and keeps none; BCE and soft top-k,
float64 and everything on a CPU run as above, in plain torch. Without Triton a log line says once that plain torch takes
its place. ``hf_xmc.losses.streaming.ENGINE = "torch"`` or ``"triton"`` decides otherwise: the second raises where
Triton is missing.

Several texts of a label: with ``text_counts``, a label has that many rows of ``labels``, one after another, and its
score is the largest of theirs, :math:`s_l = \max_{t \in T_l} \langle q, y_t \rangle`. Everything else counts labels:
ids, weights, shards and ``k``. The gradient reaches the best text alone, the first of equal ones. Such labels run in
plain torch.

Over several processes, every process holds all the queries, all the positives, and its own :class:`LabelShard` of the
labels. Sums over labels are sums over processes; the loss is the same number on each. The gradient of ``queries`` is
the part that comes through the process's own labels: :func:`hf_xmc.distributed.gather_queries` sums it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.losses.functional import check_positives, positive_weights
from hf_xmc.losses.streaming import score_blocks
from hf_xmc.losses.streaming.block_losses import BCE, BlockPositives, Criterion, DecoupledSoftmax, Softmax
from hf_xmc.losses.streaming.block_soft_top_k import SoftTopK
from hf_xmc.losses.streaming.gradients import Gradients
from hf_xmc.losses.streaming.score_blocks import Buffers, LabelTextRows, ScoreBlock, TextBlock
from hf_xmc.padding import IGNORE_INDEX

logger = logging.getLogger(__name__)

ENGINE = "auto"  # or "torch", or "triton"
MEMORY_BUDGET = 256 * 2**20
MIN_BLOCK = 96  # queries: below, the products of a block waste more than a fourth product costs
MAX_BLOCK = 256  # queries: larger blocks gain nothing on a CPU


def decoupled_softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
    gradient_dtype: torch.dtype | None = None,
    text_counts: Tensor | None = None,
) -> Tensor:
    """:func:`hf_xmc.losses.functional.decoupled_softmax_loss` of ``queries @ labels.T``.

    Args:
        queries: ``(B, D)``, all queries of the step, already divided by the temperature.
        labels: ``(L, D)``, or this process's shard of them.
        positives, weights: ``(B, P)``, with ids counted over all labels.
        shard: which labels these are; ``None`` for all.
        text_counts: ``(L,)``, how many rows of ``labels`` are texts of each label, if some label has several.
        memory_budget: bytes for scores.
        gradient_dtype: precision of the products that make the gradients, ``torch.bfloat16`` or ``None`` for
            that of the scores.
    """
    return _streamed(
        queries, labels, positives, weights, DecoupledSoftmax, shard, memory_budget, gradient_dtype, text_counts
    )


def softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    shard: LabelShard | None = None,
    memory_budget: int = MEMORY_BUDGET,
    gradient_dtype: torch.dtype | None = None,
    text_counts: Tensor | None = None,
) -> Tensor:
    """:func:`hf_xmc.losses.functional.softmax_loss` of ``queries @ labels.T``; arguments as above."""
    return _streamed(queries, labels, positives, weights, Softmax, shard, memory_budget, gradient_dtype, text_counts)


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
    gradient_dtype: torch.dtype | None = None,
    text_counts: Tensor | None = None,
) -> Tensor:
    """:func:`hf_xmc.losses.functional.bce_loss` of ``queries @ labels.T``; arguments as above."""
    offset = torch.as_tensor(bias, dtype=queries.dtype, device=queries.device).expand(len(queries), 1)
    return _streamed(
        scale * queries, labels, positives, weights, BCE, shard, memory_budget, gradient_dtype, text_counts, offset
    )


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
    gradient_dtype: torch.dtype | None = None,
    text_counts: Tensor | None = None,
) -> Tensor:
    """:func:`hf_xmc.losses.functional.soft_top_k_loss` of ``queries @ labels.T``; arguments as above."""
    if not (k > 0 and alpha > 0):
        raise ValueError(f"k and alpha must be positive, got k={k} and alpha={alpha}.")
    make = partial(SoftTopK, k=k, alpha=alpha)
    return _streamed(queries, labels, positives, weights, make, shard, memory_budget, gradient_dtype, text_counts)


def _streamed(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None,
    make: Callable[[int, LabelShard | None], Criterion],
    shard: LabelShard | None,
    memory_budget: int,
    gradient_dtype: torch.dtype | None,
    text_counts: Tensor | None,
    offset: Tensor | None = None,
) -> Tensor:
    if queries.ndim != 2 or labels.ndim != 2 or queries.shape[1] != labels.shape[1]:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and labels {tuple(labels.shape)}; expected (B, D) and (L, D)."
        )
    if gradient_dtype not in (None, torch.bfloat16):
        raise ValueError(f"gradient_dtype must be None or torch.bfloat16, got {gradient_dtype}.")
    if text_counts is not None and (bool((text_counts < 1).any()) or int(text_counts.sum()) != len(labels)):
        raise ValueError(
            f"text_counts must be 1 or more for each label and add up to the {len(labels)} rows of labels, got "
            f"{int(text_counts.sum())} texts, at least {int(text_counts.min()) if len(text_counts) else 0} of a label."
        )
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _Streamed.apply(
            queries, labels, positives, weights, make, shard, memory_budget, gradient_dtype, text_counts, offset
        )
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        labels: Tensor,
        positives: Tensor,
        weights: Tensor | None,
        make: Callable[[int, LabelShard | None], Criterion],
        shard: LabelShard | None,
        memory_budget: int,
        gradient_dtype: torch.dtype | None,
        text_counts: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        x = queries if queries.dtype == torch.float64 else queries.float()
        texts = None if text_counts is None else LabelTextRows(text_counts)
        owned = torch.tensor(len(labels if text_counts is None else text_counts), device=x.device)
        num_labels = int(distributed.sum_(owned, shard))
        check_positives(positives, num_labels)
        known, weights = positive_weights(positives, weights, x.dtype)
        mine = positives if shard is None else shard.localize(positives)
        has_positive = weights.sum(1, keepdim=True) > 0
        share = has_positive / has_positive.sum().clamp(min=1).to(x.dtype)

        criterion = make(num_labels, shard)
        x = criterion.scale * x
        block_of = TextBlock if texts else _block_type(x, criterion)
        gradients = Gradients(x, labels, offset, gradient_dtype or x.dtype) if any(ctx.needs_input_grad) else None
        kept = None
        if criterion.needs_rows and block_of in (ScoreBlock, TextBlock):
            kept = gradients.dtype if gradients and criterion.keeps_exponentials else x.dtype
        block_size, kept = _plan(x, labels, kept, shard, memory_budget, texts)

        buffers = Buffers(block_size, x, labels, kept, texts)
        value = x.new_zeros(())
        for start in range(0, max(1, len(x)), block_size):
            rows = slice(start, start + block_size)
            block = block_of(x[rows], labels, None if offset is None else offset[rows], buffers)
            p = _positives_of(block, mine[rows], known[rows], weights[rows], share[rows], shard)
            criterion.look(block, p)
            if gradients or not criterion.needs_rows:
                for number, derivative, factor in criterion.gradients(block, p):
                    if gradients:
                        gradients.add(rows, block.rows_of(number), block.by_row(number, derivative), factor)
            if gradients:
                gradients.add_positives(rows, p, -criterion.slope)
            value += criterion.value
        if gradients:
            gradients.queries *= criterion.scale
        ctx.gradients, ctx.dtypes = gradients, (queries.dtype, labels.dtype)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of a streamed loss are made in its forward pass and handed over by the first backward "
                "pass: call the loss again, instead of going backward through it twice."
            )
        made, ctx.gradients = ctx.gradients, None
        if grad != 1:  # to look costs less than a pass over the gradients; nobody else holds them
            made.scale_(grad)
        grad_offset = None if made.offset is None else made.offset.to(ctx.dtypes[0])
        grad_x, grad_y = made.queries.to(ctx.dtypes[0]), made.labels.to(ctx.dtypes[1])
        return grad_x, grad_y, None, None, None, None, None, None, None, grad_offset


def _block_type(x: Tensor, criterion: Criterion) -> type[ScoreBlock]:
    if ENGINE not in ("auto", "torch", "triton"):
        raise ValueError(f'hf_xmc.losses.streaming.ENGINE must be "auto", "torch" or "triton", got {ENGINE!r}.')
    fits = criterion.keeps_exponentials and x.dtype == torch.float32
    if ENGINE == "torch" or not fits or (ENGINE == "auto" and not (x.is_cuda and _triton_is_installed())):
        return ScoreBlock
    from hf_xmc.losses.streaming.triton_blocks import TritonBlock

    return TritonBlock


@cache
def _triton_is_installed() -> bool:
    installed = find_spec("triton") is not None
    if not installed:
        logger.warning("Triton is not installed: losses on the GPU run in plain torch. `pip install triton` is faster.")
    return installed


def _plan(
    x: Tensor,
    labels: Tensor,
    kept: torch.dtype | None,
    shard: LabelShard | None,
    memory_budget: int,
    texts: LabelTextRows | None,
) -> tuple[int, torch.dtype | None]:
    """Queries in a block, and the precision in which it keeps all its labels; ``None`` if it keeps only a chunk."""
    of_texts = 0 if texts is None else 2  # a chunk's products and their derivatives
    size = memory_budget // (score_blocks.CHUNK * (1 + of_texts) * x.element_size())
    if kept is not None:
        row = (
            len(labels) * kept.itemsize if texts is None else len(texts.counts) * (kept.itemsize + texts.dtype.itemsize)
        )
        widest = int(distributed.max_(torch.tensor(row, device=x.device), shard))  # all ranks cut the same blocks
        rows = memory_budget // max(kept.itemsize, widest)
        if rows >= min(MIN_BLOCK, len(x)):
            size = rows if x.is_cuda else min(rows, MAX_BLOCK)
        else:
            kept = None
    size = max(1, min(size, len(x)))
    return math.ceil(len(x) / math.ceil(len(x) / size)) or 1, kept


def _positives_of(
    block: ScoreBlock, mine: Tensor, known: Tensor, weights: Tensor, share: Tensor, shard: LabelShard | None
) -> BlockPositives:
    rows, slots = (known & (mine != IGNORE_INDEX)).nonzero(as_tuple=True)
    columns = mine[rows, slots]
    scores = torch.zeros_like(weights)
    scores[rows, slots], texts = block.scores_of(rows, columns)
    return BlockPositives(known, weights, share, rows, slots, columns, texts, distributed.sum_(scores, shard))
