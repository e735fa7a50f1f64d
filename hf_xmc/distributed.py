"""Label shards, and every collective operation of the package."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_xmc.padding import IGNORE_INDEX

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # a launcher ends all processes if one fails, so a long wait is a slow process
LAUNCHER = os.getppid()


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
        """Return the columns of ``label_ids`` in this shard, and ``IGNORE_INDEX`` for all other ids."""
        mine = (self.start <= label_ids) & (label_ids < self.stop)
        return torch.where(mine, label_ids - self.start, IGNORE_INDEX)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def join(device: str | None = None) -> str | None:
    """Join the other processes if a launcher such as ``torchrun`` started several, and return the device to use.

    The processes exchange objects on the CPU. Call :func:`leave` at the end.

    Args:
        device: Device that the user chose. By default each process of a machine takes the next GPU.

    Raises:
        ValueError: if ``accelerate launch`` was asked for several processes and started one, as it does on a CPU.

    Example:
        >>> join("cpu"), world_size()   # started as a single process
        ('cpu', 1)
    """
    environment = os.environ
    if "WORLD_SIZE" not in environment and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= environment.keys():
        raise ValueError(
            "`accelerate launch` was asked for several processes and started one, as it does on a CPU. Write "
            "`torchrun --nproc_per_node N` in place of `accelerate launch --num_processes N`."
        )
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
        if device in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{int(environment['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def leave() -> None:
    """Leave the other processes, once all have called this function.

    Call it at the end of each script that may run on several processes. Before that, drop each trainer: its
    ``DistributedDataParallel`` holds the process group, whose threads end only when nothing holds it. A thread that
    releases a tensor while Python exits aborts the process with "terminate called without an active exception":
    see https://github.com/pytorch/pytorch/issues/190489.
    """
    if world_size() > 1:
        dist.barrier()
        gc.collect()  # a trainer and its callbacks refer to each other
        dist.destroy_process_group()


def own_shares(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield this process's part of each round of items. All processes must pass the same items.

    In a round, each process takes up to ``size`` items, in the order of their ranks. Its part of the last round may be
    empty. :func:`gather_in_order` restores the order of the items.

    >>> list(own_shares("abcde", size=2))   # a single process takes all
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    remaining, start = iter(items), rank() * size
    while turn := list(islice(remaining, world_size() * size)):
        yield turn[start : start + size]


def gather_in_order(part: Iterable[T]) -> Iterable[T]:
    """Return the parts of all processes in the order of their ranks on the first process, and nothing on others.

    Raises:
        ProcessLookupError: if the launcher was killed. Its processes would continue, and a new run must not meet them.
    """
    if world_size() == 1:
        return part
    everyone: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(list(part), everyone)
    if os.getppid() != LAUNCHER:
        raise ProcessLookupError("the launcher of this process has ended. Start it again to continue.")
    return [item for theirs in everyone or [] for item in theirs]


def sum_(x: Tensor, shard: LabelShard | None) -> Tensor:
    """Sum ``x`` over the shards in place, and return it. ``None`` for ``shard`` means that there is only one.

    Not differentiable: the losses compute their gradients themselves.
    """
    if shard is not None and world_size() > 1:
        dist.all_reduce(x)
    return x


def max_(x: Tensor, shard: LabelShard | None) -> Tensor:
    """Take the maximum of ``x`` over the shards in place, and return it; see :func:`sum_`."""
    if shard is not None and world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def max_over_processes(x: Tensor) -> Tensor:
    """Take the maximum of ``x`` over all processes in place, so that all make the same decision, and return it."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def barrier() -> None:
    """Wait until every process has called this function."""
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
    """Return the rows of all processes, in the order of their ranks; their shapes may differ.

    Missing columns are filled with ``fill``. Not differentiable: use it for data.
    """
    if world_size() == 1:
        return x
    shapes = _shapes(x)
    wide = x.new_full((max(rows for rows, _ in shapes), max(columns for _, columns in shapes)), fill)
    wide[: x.shape[0], : x.shape[1]] = x
    everyone = [torch.empty_like(wide) for _ in shapes]
    dist.all_gather(everyone, wide)
    return torch.cat([theirs[:rows] for theirs, (rows, _) in zip(everyone, shapes, strict=True)])


def own_rows(number: int, device: torch.device | str = "cpu") -> slice:
    """Return where this process's rows are in the result of :func:`gather_rows` and :func:`gather_queries`.

    Every process must call it, with its number of rows.

    >>> own_rows(3)   # of a single process
    slice(0, 3, None)
    """
    if world_size() == 1:
        return slice(0, number)
    sizes = gather_rows(torch.tensor([[number]], device=device))[:, 0].tolist()
    start = sum(sizes[: rank()])
    return slice(start, start + number)


def gather_queries(queries: Tensor) -> Tensor:
    """Return the ``(B, D)`` queries of all processes. Every process must run the backward pass.

    The forward pass is an all-gather. Each process computes the gradient through its own labels only, so the backward
    pass sums over the processes, and each process keeps the rows of its own queries.
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
    """Return ``x`` with its gradient multiplied by ``factor``.

    If each process differentiates its own part of a loss, parameters need the *sum* of the gradients. But
    ``DistributedDataParallel`` takes the mean, so multiply by the number of processes.
    """
    return x if factor == 1 else x.detach() + factor * (x - x.detach())


def mean_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter whose gradient is the mean over the processes, without ``DistributedDataParallel``."""
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
