"""What a kernel file takes from Triton, and the few device functions that kernels share.

Triton is loaded where PyTorch is a GPU build, which brings it; elsewhere `jit` leaves a kernel as
the Python function that nobody calls. TRITON_INTERPRET, which Triton reads itself, is a wish for it
on a CPU too, in front of the C++ kernels and on any build: with 1 kernels run there one operation
at a time, and the tests of the ops judge the Triton kernels; with 0 they are compiled for GPUs that
are not there and do not run (`python -m bench.aot`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "ON_CPU",
    "cdiv",
    "fma",
    "jit",
    "power_of_2",
    "rows",
    "target",
    "tl",
    "wide",
]

_installed = importlib.util.find_spec("triton") is not None
_gpu_build = bool(torch.version.cuda or torch.version.hip)
_interpret = os.environ.get("TRITON_INTERPRET")
INTERPRETED = _installed and _interpret == "1"
ON_CPU = INTERPRETED or (_installed and _interpret == "0")
AVAILABLE = ON_CPU or (_installed and _gpu_build)

F = TypeVar("F", bound=Callable[..., Any])

if AVAILABLE:
    import triton
    import triton.language as tl

    _ROUNDS_PRODUCTS = tl.constexpr(INTERPRETED)
else:
    triton, tl = None, None


def jit(kernel: F) -> Any:
    """`triton.jit`, or the function itself where there is no Triton."""
    return triton.jit(kernel) if AVAILABLE else kernel


@jit
def wide(x):
    """The same numbers in the dtype of sums: float32, or float64 for float64."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@jit
def fma(x, y, z):
    """Return x y + z, rounded once; Triton's interpreter has no instruction for that."""
    if _ROUNDS_PRODUCTS:
        return (x.to(tl.float64) * y + z).to(x.dtype)
    return tl.fma(x, y, z)


def target() -> tuple[str, Any]:
    """What kernels are compiled for: ("cuda", 90) for sm_90, ("hip", "gfx942")."""
    if INTERPRETED:
        return "cuda", 90
    return _target_of(triton.runtime.driver.active.get_current_device())


@functools.cache  # asked at every launch, and the driver asks the device anew each time
def _target_of(device: Any) -> tuple[str, Any]:
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch


def cdiv(n: int, block: int) -> int:
    """How many blocks cover n."""
    return -(-n // block)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n (and not less than 1)."""
    return 1 << max(0, n - 1).bit_length()


def rows(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) with dense channels; a view where the strides allow."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()
