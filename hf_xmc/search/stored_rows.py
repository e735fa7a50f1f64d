"""Read single rows of a table that stays in its file."""

from __future__ import annotations

import os
import weakref
from math import prod
from pathlib import Path

import numpy as np


class StoredRows:
    """Rows of a matrix in a file, which are read when they are asked for, and not kept.

    A row of a mapped file brings the 64 KiB around it into the memory of the process, so the rows of a few hundred
    searches can map most of the file. The file may be replaced: the one that was opened stays readable.

    Args:
        path: The file.
        dtype: Type of the numbers.
        shape: ``(L, D)``.
        offset: Number of bytes before the first row.

    Raises:
        OSError: if the file cannot be opened, or is shorter than its rows.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, int], offset: int = 0) -> None:
        self.path, self.dtype, self.shape, self.offset = path, np.dtype(dtype), shape, offset
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        size, needed = os.fstat(self._file).st_size, offset + prod(shape) * self.dtype.itemsize
        if size < needed:
            raise OSError(f"{path} must hold {needed} bytes for its rows, got {size}.")

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Return rows ``(..., D)`` for ids ``(...)`` from 0 to L - 1; a negative id counts from the end."""
        num_rows, dim = self.shape
        width = dim * self.dtype.itemsize
        rows = [os.pread(self._file, width, self.offset + row * width) for row in (ids % num_rows).ravel().tolist()]
        return np.frombuffer(b"".join(rows), self.dtype).reshape(*ids.shape, dim)
