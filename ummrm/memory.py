"""What a process of ours asks of its allocator: for commands and workers, never for a program that imports ummrm."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, where there is glibc.

    By default it gives every large tensor back to the system and takes cleared pages for the next: 40% of the time of
    a small model in training on a CPU. The process then keeps what it has used at its peak.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
