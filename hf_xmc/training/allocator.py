"""Keep freed memory in the process while it trains, if the C library allows it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
KEEP = {M_MMAP_THRESHOLD: 2**31 - 1, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20}
AFTERWARDS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20, M_TOP_PAD: 128 << 10}  # as glibc would adapt them
GROWTH, LEAST = 1.5, 512 << 20  # factor and bytes by which a process may grow before memory is returned
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def keep_freed_memory(callbacks: CallbackHandler) -> Iterator[None]:
    """Reuse large blocks instead of returning them to the system, until the context ends.

    A training step allocates and frees the same large tensors again and again. glibc maps each of them again, and the
    system then clears every page of it: on a virtual machine that can take as long as the arithmetic. Afterwards the
    memory is returned. Without glibc, as on macOS and Windows, nothing changes, and neither does it if an environment
    variable already says what the allocator should do.

    Tensors of many sizes split the kept memory into pieces, and the process grows. :class:`ReturnGrowth` then returns
    what no tensor holds.

    Args:
        callbacks: The callbacks of the trainer, as ``trainer.callback_handler``.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None or any(name in os.environ for name in VARIABLES):
        yield
        return
    growth = ReturnGrowth(libc)
    callbacks.add_callback(growth)
    try:
        for parameter, value in KEEP.items():
            libc.mallopt(parameter, value)
        yield
    finally:
        callbacks.remove_callback(growth)
        for parameter, value in AFTERWARDS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


class ReturnGrowth(TrainerCallback):
    """Returns free memory to the system after a step in which the process has grown by half.

    The reference is the memory after the first step, and then after each first step that follows a return. Returning
    costs as much as a step's first use of its memory.

    Args:
        libc: The C library.
    """

    def __init__(self, libc: Any) -> None:
        self.libc = libc
        self.reference: int | None = None  # bytes

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Return free memory if there is too much."""
        now = resident_bytes()
        if self.reference is None:
            self.reference = now
        elif now > max(GROWTH * self.reference, self.reference + LEAST):
            self.libc.malloc_trim(0)
            self.reference = None


def resident_bytes() -> int:
    """Return the memory of this process, as Linux counts it, without mapped files."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
