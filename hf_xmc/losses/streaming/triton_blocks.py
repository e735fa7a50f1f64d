"""Scores on a GPU, in Triton: computed, masked and exponentiated in registers.

:class:`TritonBlock` does what :class:`~hf_xmc.losses.streaming.score_blocks.ScoreBlock` does for softmax and decoupled
softmax. One kernel computes the largest score and the sum of exponentials, and writes no scores. For the gradient, a
second kernel computes the exponentials of a chunk, the input of two library products. Excluded positives are masked
while their tile is computed. Subtracting them from the sum later would lose the sum, since in good training they are
nearly all of it.

If queries and labels are both bfloat16, or both float16, they are multiplied on the tensor cores of that type and added
up in float32. Products of such numbers are exact in float32. Otherwise both are converted to float32, and each product
is three products of TF32 (``tf32x3``), about as exact as float32. The tile is the fastest of a short list, measured on
the first block of a device, type and dimension.

The kernels are tested in Triton's interpreter, which runs them on a CPU, and compiled for three generations of GPUs.
They have not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from hf_xmc.losses.streaming.score_blocks import ScoreBlock, ScoreBuffers

PAIR_ROWS, PAIR_COLUMNS = 64, 64  # masked pairs are sorted by tiles of this size, which divides those of the kernels
SPLITS = 64  # programs that share the labels of one tile of queries
LOWEST = -3e38
HALF = (torch.bfloat16, torch.float16)


OutOfResources = triton.OutOfResources


class Tile(NamedTuple):
    """The scores that a program computes at a time, and how it is compiled."""

    rows: int  # queries
    columns: int  # labels
    depth: int  # embedding dimensions at a time
    warps: int
    stages: int


FLOAT32_TILES = (Tile(64, 64, 32, 4, 3), Tile(64, 128, 32, 8, 3))  # 128 x 128 spills 2 kB a thread on an A100
HALF_TILES = (Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))


class Case(NamedTuple):
    """The inputs that decide how a kernel is compiled."""

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]  # of queries and labels
    dim: int

    @property
    def is_half(self) -> bool:
        return self.dtypes[0] == self.dtypes[1] and self.dtypes[0] in HALF

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles to choose from, smallest first."""
        return HALF_TILES if self.is_half else FLOAT32_TILES


chosen: dict[tuple[Case, int, int], Tile] = {}  # by case, and by powers of two of queries and labels
refused: set[tuple[Case, Tile]] = set()  # tiles that need more memory than a multiprocessor has


@triton.jit
def _score_tile(
    x, y, scale, pair_rows, pair_columns, tile_starts, pair_tiles, num_rows, num_columns, dim, row_tile, column_tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PAIR_ROWS: tl.constexpr,
    PAIR_COLUMNS: tl.constexpr, AS_IS: tl.constexpr,
):  # fmt: skip
    """Return scores ``(ROWS, COLUMNS)``, minus infinity for masked pairs and beyond the last label."""
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    scores = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, dim, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x_at = x + row[:, None] * dim + k[None, :]
        y_at = y + column[:, None].to(tl.int64) * dim + k[None, :]  # labels times dimensions can exceed int32
        x_tile = tl.load(x_at, mask=(row < num_rows)[:, None] & (k < dim)[None, :], other=0.0)
        y_tile = tl.load(y_at, mask=(column < num_columns)[:, None] & (k < dim)[None, :], other=0.0)
        if AS_IS:
            scores = tl.dot(x_tile, tl.trans(y_tile), acc=scores)
        else:
            x_tile, y_tile = x_tile.to(tl.float32), y_tile.to(tl.float32)
            scores = tl.dot(x_tile, tl.trans(y_tile), acc=scores, input_precision="tf32x3")
    scores = tl.where((column < num_columns)[None, :], scores * scale, float("-inf"))
    for part in tl.static_range(ROWS // PAIR_ROWS):
        pair_row, pair_column = row_tile * (ROWS // PAIR_ROWS) + part, column_tile * (COLUMNS // PAIR_COLUMNS)
        first = tile_starts + pair_row * pair_tiles + pair_column
        width = tl.minimum(COLUMNS // PAIR_COLUMNS, pair_tiles - pair_column)
        exists = pair_row * PAIR_ROWS < num_rows
        stop = tl.load(first + width, mask=exists, other=0)
        for pair in range(tl.load(first, mask=exists, other=0), stop):  # nearly always empty
            here = (row == tl.load(pair_rows + pair))[:, None] & (column == tl.load(pair_columns + pair))[None, :]
            scores = tl.where(here, float("-inf"), scores)
    return scores


@triton.jit
def max_and_sum_kernel(
    x, y, scale, pair_rows, pair_columns, tile_starts, pair_tiles, num_rows, num_columns, dim, top_out, total_out,
    tiles_per_split, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PAIR_ROWS: tl.constexpr,
    PAIR_COLUMNS: tl.constexpr, AS_IS: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Write the largest score of each query in a split of the labels, and the sum of ``2 ** (score - largest)``."""
    row_tile, split = tl.program_id(0), tl.program_id(1)
    top = tl.full((ROWS,), LOWEST, dtype=tl.float32)  # finite, since -inf - -inf is NaN
    total = tl.zeros((ROWS,), dtype=tl.float32)
    first = split * tiles_per_split
    for column_tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(num_columns, COLUMNS))):
        scores = _score_tile(
            x, y, scale, pair_rows, pair_columns, tile_starts, pair_tiles, num_rows, num_columns, dim, row_tile,
            column_tile, ROWS, COLUMNS, DEPTH, PAIR_ROWS, PAIR_COLUMNS, AS_IS,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), axis=1)
        top = new_top
    row = row_tile * ROWS + tl.arange(0, ROWS)
    at = split * num_rows + row
    tl.store(top_out + at, top, mask=row < num_rows)
    tl.store(total_out + at, total, mask=row < num_rows)


@triton.jit
def exponentials_kernel(
    x, y, scale, pair_rows, pair_columns, tile_starts, pair_tiles, num_rows, num_columns, dim, top, out, first_tile,
    width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PAIR_ROWS: tl.constexpr,
    PAIR_COLUMNS: tl.constexpr, AS_IS: tl.constexpr,
):  # fmt: skip
    """Write ``2 ** (score - top)`` of each query and each label of a chunk."""
    row_tile, column_tile = tl.program_id(0), first_tile + tl.program_id(1)
    scores = _score_tile(
        x, y, scale, pair_rows, pair_columns, tile_starts, pair_tiles, num_rows, num_columns, dim, row_tile,
        column_tile, ROWS, COLUMNS, DEPTH, PAIR_ROWS, PAIR_COLUMNS, AS_IS,
    )  # fmt: skip
    row = row_tile * ROWS + tl.arange(0, ROWS)
    within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_top = tl.load(top + row, mask=row < num_rows, other=0.0)
    at = out + row[:, None] * width + within[None, :]
    tl.store(at, tl.exp2(scores - row_top[:, None]), mask=(row < num_rows)[:, None] & (within < width)[None, :])


class TritonBlock(ScoreBlock):
    """A block of queries that keeps no scores; arguments as in ``ScoreBlock``.

    Args:
        tile: Tile of the kernels; by default the fastest.
        splits: Programs that share the labels of one tile of queries.
    """

    _by_tile: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self,
        queries: Tensor,
        labels: Tensor,
        offset: Tensor | None,
        buffers: ScoreBuffers,
        tile: Tile | None = None,
        splits: int | None = None,
    ) -> None:
        super().__init__(queries, labels, offset, buffers)
        self.tile, self.splits = tile, splits or SPLITS

    def max_and_sum(self) -> tuple[Tensor, Tensor]:
        """Return the result of ``ScoreBlock``; each program sums a part of the labels, in no fixed order."""
        return self._max_and_sum(self._fastest())

    def exponentials(self, top: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        tile = self._fastest()
        if self.slices and self.slices[0].stop % tile.columns and len(self.slices) > 1:
            raise ValueError(
                f"CHUNK must be a multiple of the {tile.columns} labels of a tile, got {self.slices[0].stop}."
            )
        for number, columns in enumerate(self.slices):
            out = self._of(self.chunk, number)
            grid = (triton.cdiv(len(self.queries), tile.rows), triton.cdiv(out.shape[1], tile.columns))
            if out.numel():
                exponentials_kernel[grid](
                    *self._arguments(), top.contiguous(), out, columns.start // tile.columns, out.shape[1],
                    **self._constants(tile),
                )  # fmt: skip
            yield number, out, torch.ones_like(top)

    def mask_(self, rows: Tensor, columns: Tensor) -> None:
        super().mask_(rows, columns)
        self._by_tile = None

    def _max_and_sum(self, tile: Tile) -> tuple[Tensor, Tensor]:
        column_tiles = triton.cdiv(len(self.labels), tile.columns)
        splits = max(1, min(self.splits, column_tiles))
        tops = self.queries.new_full((splits, len(self.queries)), LOWEST)
        totals = torch.zeros_like(tops)
        grid = (triton.cdiv(len(self.queries), tile.rows), splits)
        if len(self.queries) and len(self.labels):
            max_and_sum_kernel[grid](
                *self._arguments(), tops, totals, triton.cdiv(column_tiles, splits), LOWEST=LOWEST,
                **self._constants(tile),
            )  # fmt: skip
        top = tops.amax(0)
        return top[:, None], (totals * (tops - top).exp2_()).sum(0)[:, None]

    def _fastest(self) -> Tile:
        """Return the tile, which the first block of a case and size measures on a GPU."""
        if self.tile is None:
            case = self._case
            key = case, min(len(self.queries), 256).bit_length(), len(self.labels).bit_length()
            if key not in chosen:
                tiles = [tile for tile in case.tiles if (case, tile) not in refused]
                chosen[key] = min(tiles, key=self._milliseconds) if is_measurable(self.labels) else tiles[0]
            self.tile = chosen[key]
        return self.tile

    def _milliseconds(self, tile: Tile) -> float:
        taken: float = do_bench(lambda: self._max_and_sum(tile))
        return taken

    @property
    def _case(self) -> Case:
        return Case(self.labels.device, (self._factor()[0].dtype, self.labels.dtype), self.queries.shape[1])

    def _factor(self) -> tuple[Tensor, float]:
        """Return the queries to multiply, and what their scores must be multiplied by."""
        if self.unscaled is not None and self.unscaled[0].dtype == self.labels.dtype:
            return self.unscaled
        return self.queries, 1.0

    def _constants(self, tile: Tile) -> dict[str, Any]:
        # The interpreter multiplies bfloat16 wrongly, without an error.
        as_is = self._case.is_half and isinstance(max_and_sum_kernel, triton.JITFunction)
        return constants_of(tile, as_is)

    def _arguments(self) -> tuple[Any, ...]:
        pair_tiles = triton.cdiv(len(self.labels), PAIR_COLUMNS)
        if self._by_tile is None:
            self._by_tile = pairs_by_tile(self.pairs.rows, self.pairs.columns, len(self.queries), pair_tiles)
        queries, scale = self._factor()
        shape = len(self.queries), len(self.labels), self.queries.shape[1]
        return (queries.contiguous(), self.labels.contiguous(), scale, *self._by_tile, pair_tiles, *shape)


def is_measurable(x: Tensor) -> bool:
    """Return whether the time of a kernel on this tensor can be measured: in the interpreter it means nothing."""
    return x.is_cuda


def constants_of(tile: Tile, as_is: bool) -> dict[str, Any]:
    """Return what a kernel is compiled for: the tile, and whether it multiplies its inputs without conversion."""
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    sizes |= {"PAIR_ROWS": PAIR_ROWS, "PAIR_COLUMNS": PAIR_COLUMNS, "AS_IS": as_is}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages}


def pairs_by_tile(rows: Tensor, columns: Tensor, num_rows: int, pair_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and columns of pairs sorted by tile, and where the pairs of each tile start, plus the end."""
    tiles, order = (rows // PAIR_ROWS * pair_tiles + columns // PAIR_COLUMNS).sort()
    numbers = torch.arange(triton.cdiv(num_rows, PAIR_ROWS) * pair_tiles + 1, device=rows.device)
    return rows[order].int(), columns[order].int(), torch.searchsorted(tiles, numbers).int()
