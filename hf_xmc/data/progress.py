"""Progress bars of ``datasets``, which are worth showing only if one has to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

MANY_ROWS = 200_000  # fewer are written in less than two seconds


@contextmanager
def no_bar_for_few(num_rows: int) -> Iterator[None]:
    """Hide the progress bars of ``datasets`` within the block if there are few rows."""
    if num_rows >= MANY_ROWS or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
