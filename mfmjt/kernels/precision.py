"""Float32 in place of dtypes that this CPU has no instructions for.

PyTorch multiplies matrices in such a dtype one number after the other, 5 to 30 times as slowly as
in float32. There a matmul, convolution or attention of ours multiplies float32 copies and rounds
its results once. Weights and activations stay in the dtype, half as large: a weight is copied at
every call, which takes 3 % of a matmul of 500 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _backends

__all__ = [
    "SLOW",
    "cost",
    "dtype_of",
    "fast_dtype",
    "float16_by",
    "in_float32",
    "is_slow",
    "to",
]


def _slow() -> frozenset[torch.dtype]:
    """Return the dtypes for which oneDNN, as PyTorch uses it, has no instructions here.

    PyTorch asks the processor alone, so its own limit (ATEN_CPU_CAPABILITY) is asked for as well.
    """
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    has_onednn = torch.backends.mkldnn.is_available() and not limited
    supports = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    ask = torch.ops.mkldnn
    return frozenset(
        dtype for dtype, name in supports.items() if not (has_onednn and getattr(ask, name)())
    )


SLOW = _slow()
"""Dtypes whose products a CPU like this one computes in float32."""


def dtype_of(args: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype of the first floating tensor, itself or in a list; None if there is none."""
    for arg in args:
        for x in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.dtype
    return None


def is_slow(x: Tensor) -> bool:
    """Return True if products with x, under autocast if that is on, are to be in float32."""
    if not x.is_cpu or _backends.ON_CPU:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype in SLOW


def float16_by(
    reference: Callable[..., Any], value: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Return an op's `plain` that is for float16 on a CPU, and nothing else.

    The C++ kernels take no float16, and copies in float32 often take longer than all that PyTorch
    does in it.

    Args:
        reference: Computes where gradients may be wanted.
        value: Computes where none are; the reference by default.
    """

    def plain(x: Tensor, *others: Any) -> Any:
        if x.dtype != torch.float16 or not x.is_cpu or _backends.ON_CPU:
            return NotImplemented
        by = reference if value is None or torch.is_grad_enabled() else value
        return by(x, *others)

    return plain


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return what a network of 16-bit or 32-bit weights is fastest in on a device, without harm.

    bfloat16 where there are instructions for it, else float32. float16 is never chosen: activations
    of networks that were trained in bfloat16 or float32 may be beyond its range.
    """
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or torch.bfloat16 in SLOW:
        return False
    # With AVX-512 alone oneDNN converts to float32 and back, in a product that is no faster.
    x86 = torch.cpu._is_avx2_supported()
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cost(dtype: torch.dtype, device: torch.device) -> str:
    """Return a line for a user who asked for a dtype that a device is slow in; else nothing."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype in SLOW:
        return (
            f"This CPU has no instructions for {name}: it computes in float32 and rounds results "
            f"to {name}. float32 takes no longer and is more exact, but needs more memory."
        )
    if device.type == "cuda" and dtype == torch.bfloat16 and not _has_bfloat16(device):
        return "This GPU has no instructions for bfloat16, which is slow there. Use float32."
    return ""


def in_float32(function: Callable[..., Any], args: Sequence[Any], rounded: int) -> Any:
    """Call a function with float32 copies of 16-bit tensors, and round its first results back.

    Args:
        function: Takes and returns tensors, lists of them, and constants.
        args: Its arguments; 16-bit tensors are of one dtype.
        rounded: How many leading results get that dtype again; the others are statistics.
    """
    dtype = dtype_of(args)
    assert dtype is not None
    found = function(*to(args, torch.float32))
    if not isinstance(found, tuple):
        return to(found, dtype)
    return (*to(found[:rounded], dtype), *found[rounded:])


def to(x: Any, dtype: torch.dtype) -> Any:
    """Return a tensor, or nested lists of tensors, in a dtype; float64 and others stay."""
    if isinstance(x, (list, tuple)):
        return [to(one, dtype) for one in x]
    casts = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.to(dtype) if casts else x
