"""Sparse gradients of static embeddings: rows for the tokens of a batch in place of the whole table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from hf_xmc import distributed
from hf_xmc.distributed import LabelShard
from hf_xmc.encoders.static import hold, release


@contextmanager
def sparse_gradients(encoder: nn.Module, sparse: bool = True) -> Iterator[None]:
    """Give the tables of static embeddings sparse gradients until the context ends, if ``sparse`` is true.

    torch has a sparse gradient for an ``EmbeddingBag`` too, but with a row for each token and not for each distinct
    token. A batch repeats most of its tokens, so here the gradient of each distinct token is added up at once.

    A token that :func:`hf_xmc.encoders.static.hold_unknown` holds at zero gets no gradient here either.
    """
    bags = [module.embedding for module in encoder.modules() if isinstance(module, StaticEmbedding)] if sparse else []
    before, held = [bag.sparse for bag in bags], [release(bag) for bag in bags]
    try:
        for bag, row in zip(bags, held, strict=True):
            bag.sparse = True  # DistributedDataParallel asks for it
            if bag.mode == "mean" and bag.padding_idx is None:
                vars(bag)["forward"] = partial(_mean_of_rows, bag, row)
        yield
    finally:
        for bag, was_sparse, row in zip(bags, before, held, strict=True):
            bag.sparse = was_sparse
            vars(bag).pop("forward", None)
            if row is not None:
                hold(bag, row)


def _mean_of_rows(bag: nn.EmbeddingBag, held: int | None, ids: Tensor, offsets: Tensor) -> Tensor:
    """Return what ``bag`` returns for these tokens, with a sparse gradient of one row for each distinct token."""
    if not len(ids):
        return type(bag).forward(bag, ids, offsets)
    mean: Tensor = _MeanOfRows.apply(bag.weight, held, ids, offsets)
    return mean


class _MeanOfRows(torch.autograd.Function):
    # The gradient of a row is a sum over the texts that have the token: an embedding bag too, whose table is the
    # gradient of the means. The backward pass of torch takes three times as long, and with `padding_idx`, its forward
    # pass takes five times as long.

    @staticmethod
    def forward(ctx: Any, table: Tensor, held: int | None, ids: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(ids, offsets)
        ctx.shape, ctx.held = table.shape, held
        return embedding_bag(ids, table, offsets, mode="mean")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, offsets = ctx.saved_tensors
        lengths = offsets.diff(append=offsets.new_tensor([len(ids)]))
        texts = torch.arange(len(offsets), device=ids.device).repeat_interleave(lengths)
        sorted_ids, order = ids.int().sort(stable=True)  # twice as fast as 64 bits
        if ctx.held is not None:
            kept = sorted_ids != ctx.held
            sorted_ids, order = sorted_ids[kept], order[kept]
        rows, counts = sorted_ids.unique_consecutive(return_counts=True)
        texts, starts = texts[order], counts.cumsum(0) - counts
        shares = lengths.to(grad.dtype).reciprocal()[texts]
        sums = embedding_bag(texts, grad, starts, mode="sum", per_sample_weights=shares)
        indices = rows.long()[None]
        gradient = torch.sparse_coo_tensor(indices, sums, ctx.shape, check_invariants=False, is_coalesced=True)
        return gradient, None, None, None


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a table, each at most once, so that the gradient of the table is sparse.

    >>> table = torch.zeros(4, 2, requires_grad=True)
    >>> gather_rows(table, torch.tensor([3, 1])).sum().backward()
    >>> table.grad.coalesce().indices()
    tensor([[1, 3]])
    """
    gathered: Tensor = _GatherRows.apply(table, rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = table.shape
        return table.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        in_order = bool((rows.diff() > 0).all())
        gradient = torch.sparse_coo_tensor(rows[None], grad, ctx.shape, check_invariants=False, is_coalesced=in_order)
        return gradient, None


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor],
    max_norm: float = math.inf,
    sharded: Iterable[Tensor] = (),
    shard: LabelShard | None = None,
) -> Tensor:
    """Scale gradients, sparse ones too, so that their joint norm is at most ``max_norm``; return the norm before.

    ``torch.nn.utils.clip_grad_norm_`` does the same for dense gradients, and raises for sparse ones.

    Args:
        parameters: Parameters that all processes have.
        max_norm: The norm to clip to.
        sharded: Parameters of this process alone; those of all processes count in the norm.
        shard: The part of this process; ``None`` for a single process.
    """
    values, own = _gradients_of(parameters), _gradients_of(sharded)
    norm: Tensor = torch.nn.utils.get_total_norm(values) if values else torch.zeros(())
    if shard is not None:
        square = torch.nn.utils.get_total_norm(own).square() if own else torch.zeros_like(norm)
        norm = (norm.square() + distributed.sum_(square.to(norm), shard)).sqrt()
    values += own
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if factor < 1:
        for value in values:
            value.mul_(factor)
    return norm


def _gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one; of sparse ones, the values."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values
