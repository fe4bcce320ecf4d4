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

from mfmjt.kernels import _op, _tuning
from mfmjt.kernels._triton import cdiv, jit, rows, tl, wide

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


@jit
def _tile(n_rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows (BLOCK_ROWS, 1) and columns (1, BLOCK_COLS) of this program, and which exist."""
    # One axis: a grid's second holds no more than 65535 programs
    blocks = tl.cdiv(width, BLOCK_COLS)
    row_block = (tl.program_id(0) // blocks).to(tl.int64)
    col_block = (tl.program_id(0) % blocks).to(tl.int64)
    row = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    return row, col, (row < n_rows) & (col < width)


@jit
def _swiglu_fwd_kernel(
    gate,
    up,
    gate_dot,  # None where it is zero, and so is up_dot
    up_dot,
    y,
    y_dot,  # None where no tangent is wanted
    n_rows,
    width,
    gate_stride,
    up_stride,
    gate_dot_stride,
    up_dot_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col, inside = _tile(n_rows, width, BLOCK_ROWS, BLOCK_COLS)
    a = wide(tl.load(gate + row * gate_stride + col, inside, 0.0))
    b = wide(tl.load(up + row * up_stride + col, inside, 0.0))
    sigmoid = 1 / (1 + tl.exp(-a))
    s = a * sigmoid
    out = row * width + col
    tl.store(y + out, s * b, inside)
    if y_dot is not None:
        dot = tl.zeros_like(a)
        if gate_dot is not None:
            a_dot = wide(tl.load(gate_dot + row * gate_dot_stride + col, inside, 0.0))
            dot += (sigmoid + s * (1 - sigmoid)) * a_dot * b
        if up_dot is not None:
            dot += s * wide(tl.load(up_dot + row * up_dot_stride + col, inside, 0.0))
        tl.store(y_dot + out, dot, inside)


@jit
def _swiglu_bwd_kernel(
    y_bar,
    gate,
    up,
    gate_bar,
    up_bar,
    n_rows,
    width,
    y_bar_stride,
    gate_stride,
    up_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col, inside = _tile(n_rows, width, BLOCK_ROWS, BLOCK_COLS)
    bar = wide(tl.load(y_bar + row * y_bar_stride + col, inside, 0.0))
    a = wide(tl.load(gate + row * gate_stride + col, inside, 0.0))
    b = wide(tl.load(up + row * up_stride + col, inside, 0.0))
    sigmoid = 1 / (1 + tl.exp(-a))
    s = a * sigmoid
    out = row * width + col
    tl.store(gate_bar + out, bar * b * (sigmoid + s * (1 - sigmoid)), inside)
    tl.store(up_bar + out, bar * s, inside)


def _launch(kernel: Any, tensors: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    """Run an element-wise kernel over all rows."""
    if not tensors[0].numel():
        return
    flat = [None if t is None else rows(torch.atleast_1d(t)) for t in tensors]
    n_rows, width = flat[0].shape  # type: ignore[union-attr]
    block_rows, block_cols, num_warps = _tuning.elementwise(n_rows, width)
    strides = [0 if t is None else t.stride(0) for t in flat]
    kernel[(cdiv(n_rows, block_rows) * cdiv(width, block_cols),)](
        *flat,
        *outs,
        n_rows,
        width,
        *strides,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )


def _fwd_triton(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    _launch(_swiglu_fwd_kernel, (gate, up, None, None), (y, None))
    return y


def _jvp_triton(
    gate: Tensor, up: Tensor, gate_dot: Tensor | None, up_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, y_dot = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(_swiglu_fwd_kernel, (gate, up, gate_dot, up_dot), (y, y_dot))
    return y, y_dot


def _bwd_triton(y_bar: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate_bar, up_bar = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(_swiglu_bwd_kernel, (y_bar, gate, up), (gate_bar, up_bar))
    return gate_bar, up_bar


_fwd_op = _op.define("swiglu_fwd(Tensor gate, Tensor up) -> Tensor", _fwd, triton=_fwd_triton)
_jvp_op = _op.define(
    "swiglu_jvp(Tensor gate, Tensor up, Tensor? gate_dot, Tensor? up_dot) -> (Tensor, Tensor)",
    _jvp,
    triton=_jvp_triton,
)
_bwd_op = _op.define(
    "swiglu_bwd(Tensor y_bar, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _bwd,
    triton=_bwd_triton,
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
