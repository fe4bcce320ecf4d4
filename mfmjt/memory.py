"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_memory", "return_memory"]

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # glibc's malloc.h


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors instead of returning it.

    By default every large tensor is a fresh mapping whose pages the kernel zeroes at first touch:
    a third of a training step's time on the CPU. Elsewhere than on glibc, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**27)):
            mallopt(option, value)


def return_memory() -> None:
    """Give freed memory that glibc keeps back to the system. Elsewhere, nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
