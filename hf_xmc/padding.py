"""Pad rows of different lengths to one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100  # as in torch.nn.CrossEntropyLoss


def pad(rows: Sequence[Sequence[float]], fill: float = IGNORE_INDEX) -> Tensor:
    """Return rows of different lengths as one tensor, padded with ``fill``: int64, or float32 if ``fill`` is a float.

    >>> pad([[4, 7], [], [1]])
    tensor([[   4,    7],
            [-100, -100],
            [   1, -100]])
    """
    width = max(1, max(map(len, rows), default=0))
    dtype = torch.float32 if isinstance(fill, float) else torch.int64  # of all processes, whatever their rows hold
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
