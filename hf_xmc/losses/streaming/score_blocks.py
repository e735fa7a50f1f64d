"""Scores of some queries against the labels of this process, one chunk of labels at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 4096  # labels: larger chunks gain nothing
TILE = 64  # queries that are summed together, so that their scores stay in the cache of a core between two operations


class ScoreBuffers:
    """Memory for the scores of a block of queries.

    Args:
        rows: Largest number of queries in a block.
        queries: All queries, for precision and device.
        labels: ``(L, D)`` embeddings.
        kept: Precision in which the scores of all labels, or their exponentials, are kept. ``None`` to keep one chunk,
            and to compute the scores again in each pass.
        texts: The rows of ``labels`` that are texts of the same label; ``None`` if every label has one text.
    """

    def __init__(
        self,
        rows: int,
        queries: Tensor,
        labels: Tensor,
        kept: torch.dtype | None,
        texts: LabelTextRows | None = None,
        score_dtype: torch.dtype | None = None,
    ) -> None:
        self.score_dtype = score_dtype
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
        # By chunk and not by row, so that the scores of a chunk are contiguous.
        self.memory = queries.new_empty(len(self.slices) if self.keeps else 0, size, dtype=kept)


class ScoreBlock:
    """Queries ``(b, D)`` against labels ``(L, D)``.

    Args:
        queries: Embeddings in the precision of the scores, multiplied by the scale of the loss.
        labels: Embeddings in any precision; each chunk is converted when it is needed.
        offset: ``(b, 1)``, added to every score of a query.
        buffers: Memory for the scores. Blocks that are used one after another can share it.

    Attributes:
        unscaled: Queries in half precision as the caller passed them, and the scale; ``None`` for other queries.
    """

    unscaled: tuple[Tensor, float] | None = None

    def __init__(self, queries: Tensor, labels: Tensor, offset: Tensor | None, buffers: ScoreBuffers) -> None:
        self.queries, self.labels, self.offset = queries, labels, offset
        self.chunk, self.memory = buffers.chunk, buffers.memory
        self.slices, self.keeps, self.filled = buffers.slices, buffers.keeps, False
        self.factor = queries if buffers.score_dtype is None else queries.to(buffers.score_dtype)
        self.num_labels = self.slices[-1].stop if self.slices else 0
        self.pairs = PairsByChunk(self.slices, queries.device)
        self.tops: list[Tensor] = []  # largest score up to each chunk, to which its exponentials are relative

    def mask_(self, rows: Tensor, columns: Tensor) -> None:
        """Set the scores of these pairs to minus infinity, in all later passes."""
        fresh = PairsByChunk(self.slices, rows.device, rows, columns)
        if self.filled:
            for number in range(len(self.slices)):
                fresh.put_(self._of(self.memory[number], number), number, -math.inf)
        self.pairs = self.pairs.joined(fresh)

    def rows_of(self, number: int) -> slice:
        """Return the rows of the embeddings of a chunk."""
        return self.slices[number]

    def by_row(self, number: int, derivative: Tensor) -> Tensor:
        """Return derivatives by the dot products of a chunk's rows, given those by its scores."""
        return derivative

    def scores_of(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of these pairs, masked or not, and the embedding row of each score."""
        return self._products(rows, columns), columns

    def _products(self, rows: Tensor, columns: Tensor) -> Tensor:
        scores = self.queries.new_zeros(len(rows))
        for part in torch.arange(len(rows), device=rows.device).split(CHUNK):
            labels = self.labels[columns[part]].to(self.queries.dtype)
            scores[part] = (self.queries[rows[part]] * labels).sum(1)
        return scores if self.offset is None else scores + self.offset[rows, 0]

    def scores(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the scores, ``(b, c)``, of each chunk.

        The caller may overwrite them. A block that keeps its scores yields them again as the caller left them.
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

        They are separate because a log-sum near 1e4 cannot represent the sum precisely.
        """
        top = self.queries.new_full((len(self.queries), 1), torch.finfo(self.queries.dtype).min)
        total = torch.zeros_like(top)
        self.tops.clear()
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
        """Yield the number of each chunk, exponentials ``(b, c)``, and a factor ``(b, 1)``, after :meth:`max_and_sum`.

        Their product is ``2 ** (score - top)``.
        """
        if self.keeps:  # stored by `max_and_sum`
            for number, relative_to in enumerate(self.tops):
                yield number, self._of(self.memory[number], number), (relative_to - top).exp2_()
        else:
            for number, scores in self.scores():
                yield number, scores.sub_(top).exp2_(), torch.ones_like(top)

    def _make(self, number: int, out: Tensor) -> None:
        self._multiply(self.slices[number], out)

    def _multiply(self, rows: slice, out: Tensor) -> None:
        labels = self.labels[rows].to(self.factor.dtype)
        if self.factor.dtype == out.dtype:
            torch.mm(self.factor, labels.T, out=out)
        else:
            out.copy_(self.factor @ labels.T)

    @property
    def _in_place(self) -> bool:
        return self.keeps and self.memory.dtype == self.queries.dtype

    def _of(self, memory: Tensor, number: int) -> Tensor:
        columns = self.slices[number]
        shape = len(self.queries), columns.stop - columns.start
        return memory[: math.prod(shape)].view(shape)


class LabelTextRows:
    """Labels with several texts. Each text is a row of the embeddings, and the rows of a label are consecutive.

    Args:
        counts: ``(L,)`` number of texts of each label, at least 1.

    Attributes:
        slices: Labels of each chunk, which together have about ``CHUNK`` texts.
        rows: Rows of the texts of each chunk.
        widest: Largest number of labels, and of texts, in a chunk.
        turns: For each chunk, the labels that have a first text, a second one, ..., and the positions of these texts.
        dtype: Type of the number of the best text of a label.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts, ends = counts, counts.cumsum(0)
        self.starts = ends - counts
        known, first = counts.cpu(), self.starts.cpu()  # copied once: each access to a tensor on the GPU waits for it
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
    """A block in which the best text of a label, the first of equal ones, gives its score and gets its gradient."""

    def __init__(self, queries: Tensor, labels: Tensor, offset: Tensor | None, buffers: ScoreBuffers) -> None:
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
        self._multiply(rows, products)
        best, ((_, firsts), *others) = self._best_of(number).zero_(), self.texts.turns[number]
        torch.index_select(products, 1, firsts, out=out)
        for turn, (columns, places) in enumerate(others, start=1):
            score, other = out[:, columns], products[:, places]
            best[:, columns] = torch.where(other > score, turn, best[:, columns])
            out[:, columns] = torch.maximum(score, other)

    def _best_of(self, number: int) -> Tensor:
        """Return the number of the best text of each label in a chunk, ``(b, c)``, counted from 0."""
        return self._of(self.best[number if self.keeps else 0], number)


class PairsByChunk:
    """Pairs of a query and a label, sorted by chunk."""

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
        """Write one value, or one value per pair, into a chunk."""
        here = slice(self.bounds[number], self.bounds[number + 1])
        if here.start < here.stop:
            within = self.columns[here] - self.slices[number].start
            chunk[self.rows[here], within] = value[self.order[here]] if isinstance(value, Tensor) else value
