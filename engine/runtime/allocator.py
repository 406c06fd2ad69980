"""The C library's allocator during a run on the CPU: freed memory is kept for the next step.

glibc returns large blocks to the kernel when they are freed, and a training step frees and allocates the same blocks
repeatedly: each page is faulted in and zeroed again. docs/lab/2026-11-21.md has the cost.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import torch

# Parameters of mallopt(3), from malloc.h, and their values: blocks below 1 GiB come from the heap, its end is never
# returned, and it grows by 64 MiB at a time.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP_FREED = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
# The end of glibc's own adjustment. Defaults cannot be restored: setting a threshold switches the adjustment off.
_DEFAULTS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}

_open = 0


@contextlib.contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep freed memory in this process within the context; return free memory to the system afterwards.

    Does nothing on other devices than the CPU, without glibc, and if the environment already sets its malloc.
    """
    global _open
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    _open += 1
    _set(libc, _KEEP_FREED)
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            _set(libc, _DEFAULTS)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)  # returns 0 for a value out of range; the default is then kept
