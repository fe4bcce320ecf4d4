"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys

import torch
from torch import Tensor

__all__ = ["keep_memory", "release", "return_memory"]

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


def release(value: Tensor) -> None:
    """Give back the memory of a tensor of a mapped file; who needs its values reads the file again.

    No values are lost: a tensor that is no such, or that was written to, is left alone. Elsewhere
    than on Linux, nothing happens.
    """
    if sys.platform != "linux" or not value.is_cpu:
        return
    # Whole pages: the others hold values of other tensors, too.
    first, end = -(-value.data_ptr() // mmap.PAGESIZE), value.data_ptr() + value.nbytes
    count = end // mmap.PAGESIZE - first
    if count <= 0:
        return
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            found = bytearray(pagemap.read(8 * count))
    except OSError:  # a kernel or sandbox without it
        return
    # The highest bits of a page: in memory, swapped out, of a file.
    bits = torch.frombuffer(found, dtype=torch.int64) >> 61 & 7
    if len(bits) == count and not bool(((bits & 6 != 0) & (bits & 1 == 0)).any()):
        address = ctypes.c_void_p(first * mmap.PAGESIZE)
        length = ctypes.c_size_t(count * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)
