"""The gradients of a streamed loss, accumulated over blocks of queries and chunks of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_xmc.losses.streaming import score_blocks
from hf_xmc.losses.streaming.block_losses import BlockPositives


class Gradients:
    """Accumulate the gradients of queries, labels and offset; the products have precision ``dtype``."""

    def __init__(self, x: Tensor, labels: Tensor, offset: Tensor | None, dtype: torch.dtype) -> None:
        self.x, self.y, self.dtype = x, labels, dtype
        self.queries = torch.zeros_like(x)
        self.labels = torch.empty_like(labels, dtype=x.dtype)  # the first block writes, later ones add
        self.offset = None if offset is None else x.new_zeros(len(x), 1)

    def add(self, rows: slice, columns: slice, derivative: Tensor, factor: Tensor) -> None:
        """Add two matrix products. The factor multiplies the small matrices, not the large one."""
        if self.offset is not None:
            self.offset[rows] += factor * derivative.sum(1, keepdim=True)
        derivative = derivative.to(self.dtype)
        self.queries[rows].addcmul_(factor, (derivative @ self.y[columns].to(self.dtype)).to(factor.dtype))
        x = (factor * self.x[rows]).to(self.dtype)
        out = self.labels[columns]
        if rows.start > 0 and self.dtype == out.dtype:
            out.addmm_(derivative.T, x)
        elif rows.start > 0:
            out += derivative.T @ x
        elif self.dtype == out.dtype:
            torch.mm(derivative.T, x, out=out)
        else:
            out.copy_(derivative.T @ x)

    def add_positives(self, rows: slice, p: BlockPositives, derivative: Tensor) -> None:
        queries, x = self.queries[rows], self.x[rows]
        for part in torch.arange(len(p.rows), device=p.rows.device).split(score_blocks.CHUNK):
            row, column = p.rows[part], p.texts[part]
            by_score = derivative[row, p.slots[part], None]
            queries.index_add_(0, row, by_score * self.y[column])
            self.labels.index_add_(0, column, by_score * x[row])
            if self.offset is not None:
                self.offset[rows].index_add_(0, row, by_score)

    def scale_(self, factor: Tensor) -> None:
        for gradient in (self.queries, self.labels, self.offset):
            if gradient is not None:
                gradient.mul_(factor)
