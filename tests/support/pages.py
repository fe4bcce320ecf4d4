"""What of a tensor is in memory, as Linux counts it."""

from __future__ import annotations

import mmap

import torch


def resident(value: torch.Tensor) -> float:
    """The share of a tensor's whole pages that this process has in memory."""
    first = -(-value.data_ptr() // mmap.PAGESIZE)
    count = (value.data_ptr() + value.nbytes) // mmap.PAGESIZE - first
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        found = torch.frombuffer(bytearray(pagemap.read(8 * count)), dtype=torch.int64)
    return float((found < 0).float().mean())  # the highest bit
