"""Kernels in Triton: what they are compiled for; see `device` and `launching` for what they share.

The package is imported where Triton runs, and only there: `mfmjt.kernels._backends` says so.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

from mfmjt.kernels._backends import INTERPRETED

__all__ = ["cdiv", "jit", "power_of_2", "target", "tl"]

jit: Any = triton.jit


def target() -> tuple[str, Any]:
    """Return what kernels are compiled for: ("cuda", 90) for sm_90, ("hip", "gfx942")."""
    if INTERPRETED:
        return "cuda", 90
    return _target_of(triton.runtime.driver.active.get_current_device())


@functools.cache  # asked at every launch, and the driver asks the device anew each time
def _target_of(device: Any) -> tuple[str, Any]:
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch


def cdiv(n: int, block: int) -> int:
    """Return how many blocks cover n."""
    return -(-n // block)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is not less than n (and not less than 1)."""
    return 1 << max(0, n - 1).bit_length()
