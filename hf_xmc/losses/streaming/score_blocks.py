"""Scores of some queries against this process's labels, a chunk of labels at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 4096  # labels: larger chunks gain nothing
TILE = 64  # queries of a chunk that are summed together: these scores stay in a core's cache from one step to the next


class Buffers:
    """Memory for the scores of a block of up to ``rows`` queries.

    ``kept`` is the precision in which what a loss makes of the scores is kept for all the labels; ``None`` to keep
    nothing but a chunk, and to make the scores again in each walk. ``texts`` says which rows of ``labels`` are texts of
    the same label; ``None`` if each label has one.
    """

    def __init__(
        self, rows: int, queries: Tensor, labels: Tensor, kept: torch.dtype | None, texts: LabelTextRows | None = None
    ) -> None:
        self.slices = [slice(at, min(at + CHUNK, len(labels))) for at in range(0, len(labels), CHUNK)]
        self.keeps, self.texts = kept is not None, texts
        if texts is not None:
            self.slices = texts.slices
            self.best = queries.new_empty(
                len(self.slices) if self.keeps else 1, rows * texts.widest[0], dtype=texts.dtype
            )
            self.of_texts = queries.new_empty(rows * texts.widest[1])
        size = rows * max((s.stop - s.start for s in self.slices), default=0)
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
        self.num_labels = self.slices[-1].stop if self.slices else 0
        self.pairs = PairsByChunk(self.slices, queries.device)

    def leave_out(self, rows: Tensor, columns: Tensor) -> None:
        """Set the scores of these pairs to minus infinity from now on."""
        fresh = PairsByChunk(self.slices, rows.device, rows, columns)
        if self.filled:
            for number in range(len(self.slices)):
                fresh.put_(self._of(self.memory[number], number), number, -math.inf)
        self.pairs = self.pairs.joined(fresh)

    def rows_of(self, number: int) -> slice:
        """The rows of the embeddings that a chunk is made of."""
        return self.slices[number]

    def by_row(self, number: int, derivative: Tensor) -> Tensor:
        """Derivatives by the scores of a chunk as those by the products of its rows."""
        return derivative

    def scores_of(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of these pairs, left out or not, and the row of the embeddings that each score comes from."""
        return self._products(rows, columns), columns

    def _products(self, rows: Tensor, columns: Tensor) -> Tensor:
        scores = self.queries.new_zeros(len(rows))
        for part in torch.arange(len(rows), device=rows.device).split(CHUNK):
            labels = self.labels[columns[part]].to(self.queries.dtype)
            scores[part] = (self.queries[rows[part]] * labels).sum(1)
        return scores if self.offset is None else scores + self.offset[rows, 0]

    def scores(self) -> Iterator[tuple[int, Tensor]]:
        """Number and scores ``(b, c)`` of each chunk.

        They may be overwritten. A block that keeps them hands them out again as they were left.
        """
        for number in range(len(self.slices)):
            out = self._of(self.memory[number] if self._in_place else self.chunk, number)
            if not self.filled:
                self._make(number, out)
                if self.offset is not None:
                    out += self.offset
                self.pairs.put_(out, number, -math.inf)
            yield number, out
        self.filled = self._in_place

    def max_and_sum(self) -> tuple[Tensor, Tensor]:
        """Return for each query, ``(b, 1)``, the largest score and the sum of ``2 ** (score - largest)``.

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

    def _make(self, number: int, out: Tensor) -> None:
        torch.mm(self.queries, self.labels[self.slices[number]].to(self.queries.dtype).T, out=out)

    @property
    def _in_place(self) -> bool:
        return self.keeps and self.memory.dtype == self.queries.dtype

    def _of(self, memory: Tensor, number: int) -> Tensor:
        columns = self.slices[number]
        shape = len(self.queries), columns.stop - columns.start
        return memory[: math.prod(shape)].view(shape)


class LabelTextRows:
    """Labels with several texts, of which each is a row of the embeddings; the texts of one label stand together.

    Args:
        counts: ``(L,)``, how many texts each label has, one at least.

    Attributes:
        slices, rows: the labels of each chunk, which have about ``CHUNK`` texts, and the rows of these texts.
        widest: the most labels and the most texts of a chunk.
        turns: of each chunk, the labels that have a first text, a second one, ..., and where these texts stand in it.
        dtype: of the number that says which of its texts a label scores by.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts, ends = counts, counts.cumsum(0)
        self.starts = ends - counts
        known, first = counts.cpu(), self.starts.cpu()  # asked for once: each look at a GPU's tensor waits for it
        bounds, until = [0], ends.cpu()
        while bounds[-1] < len(counts):
            limit = first[bounds[-1]] + CHUNK
            bounds.append(max(bounds[-1] + 1, int(torch.searchsorted(until, limit, right=True))))
        self.slices = [slice(*pair) for pair in pairwise(bounds)]
        self.rows = [slice(int(first[s.start]), int(until[s.stop - 1])) for s in self.slices]
        self.widest = tuple(max((s.stop - s.start for s in parts), default=0) for parts in (self.slices, self.rows))
        self.dtype = torch.uint8 if int(known.max() if len(known) else 1) <= 256 else torch.int32
        self.turns: list[list[tuple[Tensor, Tensor]]] = []
        for columns in self.slices:
            within, number = first[columns] - first[columns.start], known[columns]
            have = [(number > turn).nonzero()[:, 0] for turn in range(int(number.max()))]
            places = [within[labels] + turn for turn, labels in enumerate(have)]
            self.turns.append([(x.to(counts.device), y.to(counts.device)) for x, y in zip(have, places, strict=True)])


class TextBlock(ScoreBlock):
    """A block in which a label scores as the best of its texts, the first of equal ones, which alone has a gradient."""

    def __init__(self, queries: Tensor, labels: Tensor, offset: Tensor | None, buffers: Buffers) -> None:
        super().__init__(queries, labels, offset, buffers)
        assert buffers.texts is not None
        self.texts, self.best, self.of_texts = buffers.texts, buffers.best, buffers.of_texts

    def rows_of(self, number: int) -> slice:
        return self.texts.rows[number]

    def by_row(self, number: int, derivative: Tensor) -> Tensor:
        columns, rows = self.slices[number], self.rows_of(number)
        first = self.texts.starts[columns] - rows.start
        spread = derivative.new_zeros(len(derivative), rows.stop - rows.start)
        return spread.scatter_(1, self._best_of(number) + first, derivative)

    def scores_of(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        counts, starts = self.texts.counts[columns], self.texts.starts[columns]
        pair = torch.arange(len(columns), device=columns.device).repeat_interleave(counts)
        place = torch.arange(len(pair), device=columns.device)
        text = place + (starts - (counts.cumsum(0) - counts))[pair]
        scores = self._products(rows[pair], text)
        top = scores.new_full((len(columns),), -math.inf).scatter_reduce(0, pair, scores, "amax")
        wins = (scores == top[pair]) | scores.isnan()
        return top, (starts + counts).scatter_reduce(0, pair[wins], text[wins], "amin")

    def _make(self, number: int, out: Tensor) -> None:
        rows = self.rows_of(number)
        products = self.of_texts[: len(self.queries) * (rows.stop - rows.start)].view(len(self.queries), -1)
        torch.mm(self.queries, self.labels[rows].to(self.queries.dtype).T, out=products)
        best, ((_, firsts), *others) = self._best_of(number).zero_(), self.texts.turns[number]
        torch.index_select(products, 1, firsts, out=out)
        for turn, (columns, places) in enumerate(others, start=1):
            score, other = out[:, columns], products[:, places]
            best[:, columns] = torch.where(other > score, turn, best[:, columns])
            out[:, columns] = torch.maximum(score, other)

    def _best_of(self, number: int) -> Tensor:
        """``(b, c)``, which of its texts a label of a chunk scores by, counted from 0."""
        return self._of(self.best[number if self.keeps else 0], number)


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
