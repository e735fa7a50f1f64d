"""Scores of some queries against this process's labels, a chunk of labels at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 4096  # labels: larger chunks gain nothing
TILE = 64  # queries of a chunk that are summed together: these scores stay in a core's cache from one step to the next


class Buffers:
    """Memory for the scores of a block of up to ``rows`` queries.

    ``kept`` is the precision in which what a loss makes of the scores is kept for all the labels; ``None`` to keep
    nothing but a chunk, and to make the scores again in each walk.
    """

    def __init__(self, rows: int, queries: Tensor, labels: Tensor, kept: torch.dtype | None) -> None:
        self.slices = [slice(at, min(at + CHUNK, len(labels))) for at in range(0, len(labels), CHUNK)]
        self.keeps = kept is not None
        size = rows * min(CHUNK, len(labels))
        self.chunk = queries.new_empty(0 if kept == queries.dtype else size)
        # Chunk by chunk and not row by row: a chunk's scores lie side by side in memory.
        self.memory = queries.new_empty(len(self.slices) if self.keeps else 0, size, dtype=kept)


class ScoreBlock:
    """Queries ``(b, D)`` against labels ``(L, D)``.

    Args:
        queries: in the precision in which scores are made, times the loss's scale.
        labels: in any precision; a chunk is converted when it is needed.
        offset: ``(b, 1)``, added to every score of a query.
        buffers: where the scores are made. Blocks that take turns can share them.
    """

    def __init__(self, queries: Tensor, labels: Tensor, offset: Tensor | None, buffers: Buffers) -> None:
        self.queries, self.labels, self.offset = queries, labels, offset
        self.chunk, self.memory = buffers.chunk, buffers.memory
        self.slices, self.keeps, self.filled = buffers.slices, buffers.keeps, False
        self.pairs = PairsByChunk(self.slices, queries.device)

    def leave_out(self, rows: Tensor, columns: Tensor) -> None:
        """From now on, the scores of these pairs are minus infinity."""
        fresh = PairsByChunk(self.slices, rows.device, rows, columns)
        if self.filled:
            for number in range(len(self.slices)):
                fresh.put_(self._of(self.memory[number], number), number, -math.inf)
        self.pairs = self.pairs.joined(fresh)

    def scores_of(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The scores of these pairs, whether left out or not."""
        scores = self.queries.new_zeros(len(rows))
        for part in torch.arange(len(rows), device=rows.device).split(CHUNK):
            labels = self.labels[columns[part]].to(self.queries.dtype)
            scores[part] = (self.queries[rows[part]] * labels).sum(1)
        return scores if self.offset is None else scores + self.offset[rows, 0]

    def scores(self) -> Iterator[tuple[int, Tensor]]:
        """Number and scores ``(b, c)`` of each chunk.

        They may be overwritten. A block that keeps them hands them out again as they were left.
        """
        for number, columns in enumerate(self.slices):
            out = self._of(self.memory[number] if self._in_place else self.chunk, number)
            if not self.filled:
                torch.mm(self.queries, self.labels[columns].to(self.queries.dtype).T, out=out)
                if self.offset is not None:
                    out += self.offset
                self.pairs.put_(out, number, -math.inf)
            yield number, out
        self.filled = self._in_place

    def max_and_sum(self) -> tuple[Tensor, Tensor]:
        """Of each query, ``(b, 1)``: the largest score, and the sum of ``2 ** (score - largest)``.

        Kept apart: their log-sum alone, near 1e4, has lost the sum.
        """
        top = self.queries.new_full((len(self.queries), 1), torch.finfo(self.queries.dtype).min)
        total = torch.zeros_like(top)
        self.tops = []  # the largest score so far, which the exponentials of a chunk are relative to
        for number, scores in self.scores():
            new_top, added = torch.empty_like(top), torch.empty_like(top)
            for rows in (slice(at, at + TILE) for at in range(0, len(top), TILE)):
                tile, tile_top = scores[rows], new_top[rows]
                torch.maximum(top[rows], tile.amax(1, keepdim=True), out=tile_top)
                torch.sum(tile.sub_(tile_top).exp2_(), 1, keepdim=True, out=added[rows])
            total = total * (top - new_top).exp2_() + added
            top = new_top
            self.tops.append(top)
            if self.keeps and not self._in_place:
                self._of(self.memory[number], number).copy_(scores)
        return top, total

    def exponentials(self, top: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number of each chunk and ``2 ** (score - top)``, ``(b, c)``, to be multiplied by a factor ``(b, 1)``."""
        if self.keeps:  # `max_and_sum` has left them
            for number, relative_to in enumerate(self.tops):
                yield number, self._of(self.memory[number], number), (relative_to - top).exp2_()
        else:
            for number, scores in self.scores():
                yield number, scores.sub_(top).exp2_(), torch.ones_like(top)

    @property
    def _in_place(self) -> bool:
        return self.keeps and self.memory.dtype == self.queries.dtype

    def _of(self, memory: Tensor, number: int) -> Tensor:
        columns = self.slices[number]
        shape = len(self.queries), columns.stop - columns.start
        return memory[: math.prod(shape)].view(shape)


class PairsByChunk:
    """Pairs of a query and a label, sorted by chunk, with a value each."""

    def __init__(
        self, slices: list[slice], device: torch.device, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        rows, columns = nothing if rows is None else rows, nothing if columns is None else columns
        self.slices, (self.columns, self.order) = slices, columns.sort()
        self.rows = rows[self.order]
        starts = torch.tensor([s.start for s in slices], dtype=torch.long)
        self.bounds = [*torch.searchsorted(self.columns, starts.to(device)).tolist(), len(rows)]

    def joined(self, other: PairsByChunk) -> PairsByChunk:
        rows, columns = torch.cat([self.rows, other.rows]), torch.cat([self.columns, other.columns])
        return PairsByChunk(self.slices, rows.device, rows, columns)

    def put_(self, chunk: Tensor, number: int, value: float | Tensor) -> None:
        """Write ``value``, or the pairs' own of many, into a chunk."""
        here = slice(self.bounds[number], self.bounds[number + 1])
        if here.start < here.stop:
            within = self.columns[here] - self.slices[number].start
            chunk[self.rows[here], within] = value[self.order[here]] if isinstance(value, Tensor) else value
