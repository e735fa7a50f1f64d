"""Combine rows of different lengths into one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    dtype = torch.float32 if isinstance(fill, float) else torch.int64  # the same for empty rows
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def pad_flat(values: np.ndarray, offsets: np.ndarray, fill: float = IGNORE_INDEX) -> Tensor:
    """Return the same as :func:`pad` for rows in one array: row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    >>> pad_flat(np.array([4, 7, 1]), np.array([0, 2, 2, 3]))
    tensor([[   4,    7],
            [-100, -100],
            [   1, -100]])
    """
    lengths = np.diff(offsets)
    dtype = np.float32 if isinstance(fill, float) else np.int64
    real = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
    padded = np.full(real.shape, fill, dtype)
    padded[real] = values[offsets[0] : offsets[-1]]
    return torch.from_numpy(padded)
