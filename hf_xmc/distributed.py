"""Label shards, and every collective operation of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_xmc.padding import IGNORE_INDEX

T = TypeVar("T")


@dataclass(frozen=True)
class LabelShard:
    """The half-open range of labels that this process scores.

    >>> [LabelShard.of(11, rank, world_size=3) for rank in range(3)]
    [LabelShard(start=0, stop=3), LabelShard(start=3, stop=7), LabelShard(start=7, stop=11)]
    """

    start: int
    stop: int

    @classmethod
    def of(cls, num_labels: int, rank: int, world_size: int) -> LabelShard:
        return cls(rank * num_labels // world_size, (rank + 1) * num_labels // world_size)

    def localize(self, label_ids: Tensor) -> Tensor:
        """Columns of ``label_ids`` in this shard; everything else becomes ``IGNORE_INDEX``."""
        mine = (self.start <= label_ids) & (label_ids < self.stop)
        return torch.where(mine, label_ids - self.start, IGNORE_INDEX)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_(x: Tensor, shard: LabelShard | None) -> Tensor:
    """``x``, summed over the shards in place. ``None`` for ``shard``: there is only one, nothing to do.

    Not differentiable: the losses make their gradients themselves.
    """
    if shard is not None and world_size() > 1:
        dist.all_reduce(x)
    return x


def max_(x: Tensor, shard: LabelShard | None) -> Tensor:
    """``x``, its maximum over the shards in place; as :func:`sum_`."""
    if shard is not None and world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def max_over_processes(x: Tensor) -> Tensor:
    """The maximum of ``x`` over all processes, in place: what they decide by it, they decide alike."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` on the first process and return its result, or raise its exception, on every process."""
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    first: T = made[0]
    return first


def gather_rows(x: Tensor, fill: float = 0) -> Tensor:
    """The rows of all processes, in the order of their ranks; numbers of rows, and of columns, may differ.

    Missing columns are filled with ``fill``. Not differentiable: for data.
    """
    if world_size() == 1:
        return x
    shapes = _shapes(x)
    wide = x.new_full((max(rows for rows, _ in shapes), max(columns for _, columns in shapes)), fill)
    wide[: x.shape[0], : x.shape[1]] = x
    everyone = [torch.empty_like(wide) for _ in shapes]
    dist.all_gather(everyone, wide)
    return torch.cat([theirs[:rows] for theirs, (rows, _) in zip(everyone, shapes, strict=True)])


def gather_queries(queries: Tensor) -> Tensor:
    """The queries of all processes ``(B, D)``, differentiable; every process must take part in the backward pass.

    All-gather forward. Each process knows the gradient through its own labels only, so backward sums over the
    processes and keeps the slice of its own queries.
    """
    if world_size() == 1:
        return queries
    gathered: Tensor = _GatherQueries.apply(queries)
    return gathered


def _shapes(x: Tensor) -> list[tuple[int, int]]:
    mine = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(shapes, mine)
    return [(int(rows), int(columns)) for rows, columns in shapes]


class _GatherQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor) -> Tensor:
        rows = [n for n, _ in _shapes(queries)]
        ctx.start, ctx.stop = sum(rows[: rank()]), sum(rows[: rank() + 1])
        return gather_rows(queries)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.stop]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient arrives multiplied by ``factor``.

    A loss that every process differentiates for its own share needs the *sum* of the parameter gradients, where
    ``DistributedDataParallel`` takes the mean: multiply by the number of processes.
    """
    return x if factor == 1 else x.detach() + factor * (x - x.detach())


def mean_gradient(parameter: Tensor) -> Tensor:
    """A parameter that no ``DistributedDataParallel`` wraps: its gradient becomes the mean over the processes."""
    if world_size() == 1:
        return parameter
    same: Tensor = _MeanGradient.apply(parameter)
    return same


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total / world_size()
