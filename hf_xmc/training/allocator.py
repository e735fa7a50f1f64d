"""Keep freed memory in the process while it trains, if the C library allows it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
KEEP = {M_MMAP_THRESHOLD: 2**31 - 1, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20}
AFTERWARDS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20, M_TOP_PAD: 128 << 10}  # as glibc would adapt them
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Reuse large blocks instead of returning them to the system, until the context ends.

    A training step allocates and frees the same large tensors again and again. glibc maps each of them again, and the
    system then clears every page of it: on a virtual machine that can take as long as the arithmetic. Afterwards the
    memory is returned. Without glibc, as on macOS and Windows, nothing changes, and neither does it if an environment
    variable already says what the allocator should do.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None or any(name in os.environ for name in VARIABLES):
        yield
        return
    try:
        for parameter, value in KEEP.items():
            libc.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in AFTERWARDS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
