"""Scores on a GPU, in Triton: made, masked and turned into exponentials in registers.

:class:`TritonBlock` does what :class:`~hf_xmc.losses.streaming.score_blocks.ScoreBlock` does for softmax and decoupled
softmax. Largest score and sum of exponentials come from one kernel that writes no scores; for the gradient a second one
makes the exponentials of a chunk, which two library products take. Positives that are left out are masked where their
tile is made. To subtract them from a sum that holds them would lose it: when training goes well they are nearly all of
it.

Products take float32 factors, as three products of TF32 where the hardware has them. The kernels are tested in
Triton's interpreter, which runs them on a CPU; on a GPU they have not been run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_xmc.losses.streaming.score_blocks import ScoreBlock

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of a tile: queries, labels, embedding dimensions at a time
SPLITS = 64  # programs that share the labels of one tile of queries
LOWEST = -3e38


@triton.jit
def _score_tile(
    x, y, pair_rows, pair_columns, tile_starts, row_tile, column_tile, num_column_tiles, num_rows, num_columns, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scores ``(ROWS, COLUMNS)``, minus infinity for pairs that are left out and beyond the last label."""
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    scores = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, dim, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x_at = x + row[:, None] * dim + k[None, :]
        y_at = y + column[:, None].to(tl.int64) * dim + k[None, :]  # more labels times dimensions than int32 counts
        x_tile = tl.load(x_at, mask=(row < num_rows)[:, None] & (k < dim)[None, :], other=0.0)
        y_tile = tl.load(y_at, mask=(column < num_columns)[:, None] & (k < dim)[None, :], other=0.0)
        # To float32 at once: the interpreter adds and multiplies bfloat16 wrongly, without an error.
        scores = tl.dot(x_tile.to(tl.float32), tl.trans(y_tile.to(tl.float32)), acc=scores, input_precision="tf32x3")
    scores = tl.where((column < num_columns)[None, :], scores, float("-inf"))
    tile = row_tile * num_column_tiles + column_tile
    for pair in range(tl.load(tile_starts + tile), tl.load(tile_starts + tile + 1)):  # nearly always none
        here = (row == tl.load(pair_rows + pair))[:, None] & (column == tl.load(pair_columns + pair))[None, :]
        scores = tl.where(here, float("-inf"), scores)
    return scores


@triton.jit
def _max_and_sum_kernel(
    x, y, pair_rows, pair_columns, tile_starts, num_column_tiles, num_rows, num_columns, dim, top_out, total_out,
    tiles_per_split, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    row_tile, split = tl.program_id(0), tl.program_id(1)
    top = tl.full((ROWS,), LOWEST, dtype=tl.float32)  # and not minus infinity, from which it cannot be subtracted
    total = tl.zeros((ROWS,), dtype=tl.float32)
    first = split * tiles_per_split
    for column_tile in range(first, tl.minimum(first + tiles_per_split, num_column_tiles)):
        scores = _score_tile(
            x, y, pair_rows, pair_columns, tile_starts, row_tile, column_tile, num_column_tiles, num_rows, num_columns,
            dim, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), axis=1)
        top = new_top
    row = row_tile * ROWS + tl.arange(0, ROWS)
    at = split * num_rows + row
    tl.store(top_out + at, top, mask=row < num_rows)
    tl.store(total_out + at, total, mask=row < num_rows)


@triton.jit
def _exponentials_kernel(
    x, y, pair_rows, pair_columns, tile_starts, num_column_tiles, num_rows, num_columns, dim, top, out, first_tile,
    width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tl.program_id(0), first_tile + tl.program_id(1)
    scores = _score_tile(
        x, y, pair_rows, pair_columns, tile_starts, row_tile, column_tile, num_column_tiles, num_rows, num_columns,
        dim, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    row = row_tile * ROWS + tl.arange(0, ROWS)
    within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_top = tl.load(top + row, mask=row < num_rows, other=0.0)
    at = out + row[:, None] * width + within[None, :]
    tl.store(at, tl.exp2(scores - row_top[:, None]), mask=(row < num_rows)[:, None] & (within < width)[None, :])


class TritonBlock(ScoreBlock):
    """A block of float32 queries that keeps nothing."""

    _by_tile: tuple[Tensor, Tensor, Tensor] | None = None

    def max_and_sum(self) -> tuple[Tensor, Tensor]:
        """Return the same as ``ScoreBlock``; each program sums a part of the labels, in no fixed order."""
        column_tiles = triton.cdiv(len(self.labels), COLUMNS)
        splits = max(1, min(SPLITS, column_tiles))
        tops = self.queries.new_full((splits, len(self.queries)), LOWEST)
        totals = torch.zeros_like(tops)
        grid = (triton.cdiv(len(self.queries), ROWS), splits)
        if len(self.queries) and len(self.labels):
            _max_and_sum_kernel[grid](
                *self._arguments(), tops, totals, triton.cdiv(column_tiles, splits),
                ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, LOWEST=LOWEST,
            )  # fmt: skip
        top = tops.amax(0)
        return top[:, None], (totals * (tops - top).exp2_()).sum(0)[:, None]

    def exponentials(self, top: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        if self.slices and self.slices[0].stop % COLUMNS and len(self.slices) > 1:
            raise ValueError(f"chunks of {self.slices[0].stop} labels do not end where tiles of {COLUMNS} do.")
        for number, columns in enumerate(self.slices):
            out = self._of(self.chunk, number)
            grid = (triton.cdiv(len(self.queries), ROWS), triton.cdiv(out.shape[1], COLUMNS))
            if out.numel():
                _exponentials_kernel[grid](
                    *self._arguments(), top.contiguous(), out, columns.start // COLUMNS, out.shape[1],
                    ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
                )  # fmt: skip
            yield number, out, torch.ones_like(top)

    def leave_out(self, rows: Tensor, columns: Tensor) -> None:
        super().leave_out(rows, columns)
        self._by_tile = None

    def _arguments(self) -> tuple[Any, ...]:
        column_tiles = triton.cdiv(len(self.labels), COLUMNS)
        if self._by_tile is None:
            self._by_tile = pairs_by_tile(self.pairs.rows, self.pairs.columns, len(self.queries), column_tiles)
        shape = len(self.queries), len(self.labels), self.queries.shape[1]
        return (self.queries.contiguous(), self.labels.contiguous(), *self._by_tile, column_tiles, *shape)


def pairs_by_tile(rows: Tensor, columns: Tensor, num_rows: int, column_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by tile, tiles row by row, and where each tile's pairs start, with an entry for the end."""
    tiles, order = (rows // ROWS * column_tiles + columns // COLUMNS).sort()
    numbers = torch.arange(triton.cdiv(num_rows, ROWS) * column_tiles + 1, device=rows.device)
    return rows[order].int(), columns[order].int(), torch.searchsorted(tiles, numbers).int()
