"""SwiGLU: silu(gate) * up.

    value      s = gate sigmoid(gate),  y = s up
    tangent    s' = sigmoid(gate) + s (1 - sigmoid(gate)),  y_dot = s' gate_dot up + s up_dot
    cotangent  up_bar = y_bar s,  gate_bar = y_bar up s'

gate, up: any shape, the same. Stored in their dtype, computed in float32 (float64 for float64);
kept for backward: gate and up. A fused kernel moves 3 elements per element, 6 with tangents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _op, _triton

__all__ = ["swiglu", "swiglu_ref"]

_silu_bar = torch.ops.aten.silu_backward


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Plain PyTorch `swiglu`; the definition of correct."""
    return F.silu(gate) * up


def _silu(gate: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return torch.ops.aten.silu.out(gate, out=out)


def _fwd(gate: Tensor, up: Tensor) -> Tensor:
    work = _op.work_dtype(gate)
    return _silu(gate.to(work)).mul_(up).to(gate.dtype)


def _jvp(
    gate: Tensor, up: Tensor, gate_dot: Tensor | None, up_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    work, dtype = _op.work_dtype(gate), gate.dtype
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
    work, dtype = _op.work_dtype(gate), gate.dtype
    y_bar, gate, up = y_bar.to(work), gate.to(work), up.to(work)
    up_bar = _silu(gate).mul_(y_bar)
    gate_bar = torch.mul(y_bar, up, out=torch.empty_like(up_bar))
    _silu_bar.grad_input(gate_bar, gate, grad_input=gate_bar)
    return gate_bar.to(dtype), up_bar.to(dtype)


_fwd_op = _op.define(
    "swiglu_fwd(Tensor gate, Tensor up) -> Tensor",
    _fwd,
    triton=_triton.lazily("swiglu", "fwd", _fwd),
)
_jvp_op = _op.define(
    "swiglu_jvp(Tensor gate, Tensor up, Tensor? gate_dot, Tensor? up_dot) -> (Tensor, Tensor)",
    _jvp,
    triton=_triton.lazily("swiglu", "jvp", _jvp),
)
_bwd_op = _op.define(
    "swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _bwd,
    triton=_triton.lazily("swiglu", "bwd", _bwd),
)
_op.backward_of(
    _fwd_op,
    lambda ctx, y_bar: _bwd_op(y_bar, *ctx.saved_tensors),
    saves=lambda inputs, outputs: inputs,
    outputs=1,
)
_op.backward_of(
    _jvp_op,
    lambda ctx, y_bar, y_dot_bar: (
        *_bwd_op(_op.refuse_gradient(y_bar, y_dot_bar), *ctx.saved_tensors),
        None,
        None,
    ),
    saves=lambda inputs, outputs: inputs[:2],
    outputs=2,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation silu(gate) up, differentiable in both modes.

    Args:
        gate: Any shape and floating dtype.
        up: The same shape and dtype.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    if _op.use_reference():
        return swiglu_ref(gate, up)
    _op.check_tensors("swiglu", gate=gate, up=up)
    fits = gate.shape == up.shape and gate.dtype == up.dtype and gate.is_floating_point()
    _op.check(fits, "swiglu", "gate and up of one shape and floating dtype", gate=gate, up=up)

    def run(values: Any, dots: Any) -> Any:
        return (_fwd_op(*values),) if dots is None else _jvp_op(*values, *dots)

    return _op.dual(run, (gate, up))[0]
