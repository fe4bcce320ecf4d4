"""SwiGLU: silu(gate) * up.

    value      s = gate sigmoid(gate),  y = s up
    tangent    s' = sigmoid(gate) + s (1 - sigmoid(gate)),  y_dot = s' gate_dot up + s up_dot
    cotangent  up_bar = y_bar s,  gate_bar = y_bar up s'
    of both    gate_bar = y_bar up s' + y_dot_bar (s'' gate_dot up + s' up_dot),
               up_bar = y_bar s + y_dot_bar s' gate_dot,
               gate_dot_bar = y_dot_bar up s',  up_dot_bar = y_dot_bar s

gate, up: any shape, the same. Stored in their dtype, computed in float32 (float64 for float64);
kept for backward: gate and up. A fused kernel moves 3 elements per element, 6 with tangents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _native, precision
from mfmjt.kernels._op import Op, Tensors, check, check_tensors, work_dtype

__all__ = ["swiglu", "swiglu_ref"]

_silu_bar = torch.ops.aten.silu_backward


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `swiglu` in plain PyTorch; the definition of correct."""
    return F.silu(gate) * up


def _silu(gate: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return torch.ops.aten.silu.out(gate, out=out)


def _fwd(gate: Tensor, up: Tensor) -> Tensor:
    work = work_dtype(gate)
    return _silu(gate.to(work)).mul_(up).to(gate.dtype)


def _jvp(
    gate: Tensor, up: Tensor, gate_dot: Tensor | None, up_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    work, dtype = work_dtype(gate), gate.dtype
    gate, up = gate.to(work), up.to(work)
    s = _silu(gate)
    y_dot = torch.empty_like(s)
    if gate_dot is None:
        y_dot.zero_()
    else:  # the derivative of silu at gate, times gate_dot, is PyTorch's backward of silu
        _silu_bar.grad_input(gate_dot.to(work), gate, grad_input=y_dot).mul_(up)
    if up_dot is not None:
        y_dot.addcmul_(s, up_dot.to(work))
    return s.mul_(up).to(dtype), y_dot.to(dtype)


def _bwd(y_bar: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    work, dtype = work_dtype(gate), gate.dtype
    y_bar, gate, up = y_bar.to(work), gate.to(work), up.to(work)
    up_bar = _silu(gate).mul_(y_bar)
    gate_bar = torch.mul(y_bar, up, out=torch.empty_like(up_bar))
    _silu_bar.grad_input(gate_bar, gate, grad_input=gate_bar)
    return gate_bar.to(dtype), up_bar.to(dtype)


def _jvp_bwd(
    y_bar: Tensor, y_dot_bar: Tensor, gate: Tensor, up: Tensor, gate_dot: Any, up_dot: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work, dtype = work_dtype(gate), gate.dtype
    y_bar, y_dot_bar, gate, up = (t.to(work) for t in (y_bar, y_dot_bar, gate, up))
    gate_dot, up_dot = (0 if t is None else t.to(work) for t in (gate_dot, up_dot))
    sigma = gate.sigmoid()
    rest = gate * (1 - sigma)
    s, first = gate * sigma, sigma * (1 + rest)
    second = sigma * (1 - sigma) * (2 + rest - gate * sigma)
    gate_bar = y_bar * first * up + y_dot_bar * (second * gate_dot * up + first * up_dot)
    up_bar = y_bar * s + y_dot_bar * first * gate_dot
    bars = gate_bar, up_bar, y_dot_bar * first * up, y_dot_bar * s
    return tuple([bar.to(dtype) for bar in bars])  # type: ignore[return-value]


def _check(gate: Tensor, up: Tensor) -> None:
    check_tensors("swiglu", gate=gate, up=up)
    if not (gate.shape == up.shape and gate.dtype == up.dtype and gate.is_floating_point()):
        check(False, "swiglu", "gate and up of one shape and floating dtype", gate=gate, up=up)


_op = Op(
    "swiglu",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=swiglu_ref,
    takes=_native.floats,
    plain=precision.float16_by(swiglu_ref),
    streams=True,
    jvp_bwd=_jvp_bwd,
)


def swiglu(gate: Tensors, up: Tensors) -> Tensors:
    """Return the gated activation silu(gate) up, differentiable in both modes.

    Args:
        gate: Any shape and floating dtype; or a tuple of streams.
        up: The same shape and dtype.

    Returns:
        A tensor of the same shape and dtype; for a tuple of streams a tuple, in one launch.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    return _op(gate, up)
