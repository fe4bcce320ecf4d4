"""`conv1d(fast=True)` on a CPU: Toom and Cook's method, for a value that nobody differentiates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _dual, _native, _op

__all__ = ["fast", "pays"]

_kernel: Any = _native.op("conv1d_toom", required=True)
_BUILT = _kernel is not None and _native.status()["cpu"] != "portable"


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv1d(x, weight, bias, padding=padding, dilation=dilation).contiguous()


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """Return True for channels and taps of which the method was measured faster."""
    return (
        _BUILT
        and _native.in_use
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.numel() > 0
        and min(weight.shape[:2]) >= 16
        and weight.shape[2] in (3, 7, 11, 15)
        and 0 < dilation * weight.shape[2] <= 1024
    )


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    run = _kernel if _takes(x, weight, bias, dilation) else _formula
    return run(x, weight, bias, dilation)


_library_op = _op.register(
    "conv1d_toom(Tensor x, Tensor weight, Tensor? bias, SymInt dilation) -> Tensor",
    _formula,
    lambda x, weight, bias, dilation: x.new_empty(x.shape[0], weight.shape[0], x.shape[2]),
    _on_cpu,
)


def pays(x: Tensor, weight: Tensor, bias: Any, dilation: int) -> bool:
    """Return True if no derivative is wanted and samples make up for transforming the weights."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and x.shape[1] >= 512
        and x.numel() >= 2**16
        and not _op.use_reference()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and _dual.levels() == 0
        and not torch.is_autocast_enabled("cpu")
        and _takes(x, weight, bias, dilation)
    )


def fast(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve (B, N, C) to (B, N, O), both of which lie in memory as (B, C, N)."""
    y: Tensor = _library_op(x.transpose(1, 2), weight, bias, dilation)
    return y.transpose(1, 2)
