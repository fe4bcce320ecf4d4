"""The boundary between two sub-layers: a gated residual add, then adaptive layer norm of the sum.

    value      s = x + gate h,  y = adaln(s)
    tangent    s_dot = x_dot + gate_dot h + gate h_dot,  y_dot as in adaln
    cotangent  x_bar = s_bar + (what adaln sends to s),  h_bar = x_bar gate,
               gate_bar = sum(x_bar h) over the axes that were broadcast

x, h (B, N, C); gate, shift, scale (B, 1, C) or (B, N, C). Stored in the dtype of x, computed in
float32 (float64 for float64). Kept for backward: s, h, gate, scale, and the mean and rstd of each
token. The fused kernels move 4 B N C elements, 8 B N C with tangents and 6 B N C backward, besides
the modulations; x may have any rank, and modulations any shape that broadcasts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _norm, _op, _triton

__all__ = ["gated_residual_adaln", "gated_residual_adaln_ref"]


def gated_residual_adaln_ref(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch `gated_residual_adaln`; the definition of correct."""
    total = (x + gate * h).to(x.dtype)
    y = F.layer_norm(total, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return total, y.to(x.dtype)


def _add(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.addcmul(x, gate, h, out=out)


def _fwd(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = _op.work_dtype(x)
    total = _add(x.to(work), h.to(work), gate.to(work)).to(x.dtype)
    n, mean, rstd = _norm.normalise(total.to(work), eps)
    return total, _norm.modulate(n, shift.to(work), scale.to(work)).to(x.dtype), mean, rstd


def _jvp(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    h_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, dtype = _op.work_dtype(x), x.dtype
    x, h, gate, shift, scale = (t.to(work) for t in (x, h, gate, shift, scale))
    total = _add(x, h, gate).to(dtype)
    wide = total.to(work)
    n, mean, rstd = _norm.normalise(wide, eps)

    total_dot = torch.zeros_like(n) if x_dot is None else x_dot.to(work)
    if h_dot is not None:
        total_dot = _add(total_dot, h_dot.to(work), gate)
    if gate_dot is not None:
        total_dot = _add(total_dot, h, gate_dot.to(work))
    if total_dot is x_dot:  # no result of a library op may be one of its inputs
        total_dot = total_dot.clone(memory_format=torch.contiguous_format)
    dots = (d if d is None else d.to(work) for d in (shift_dot, scale_dot))
    y_dot = _norm.modulate_dot(n, rstd, scale, total_dot, *dots)
    y = _norm.modulate(n, shift, scale).to(dtype)
    return total, total_dot.contiguous().to(dtype), y, y_dot.to(dtype), mean, rstd


def _bwd(
    total_bar: Tensor | None,
    y_bar: Tensor | None,
    total: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = _op.work_dtype(total)
    if y_bar is None:
        assert total_bar is not None
        x_bar = total_bar.to(work, copy=True, memory_format=torch.contiguous_format)
        shift_bar, scale_bar = shift.new_zeros(shift.shape), scale.new_zeros(scale.shape)
    else:
        x_bar, shift_bar, scale_bar = _norm.modulate_bar(
            y_bar.to(work), total.to(work), scale.to(work), mean, rstd, shift.shape
        )
        if total_bar is not None:
            x_bar.add_(total_bar)
    gate_bar = (x_bar * h.to(work)).sum_to_size(gate.shape)
    h_bar = x_bar * gate.to(work)
    return (
        x_bar.to(total.dtype),
        h_bar.to(h.dtype),
        gate_bar.to(gate.dtype),
        shift_bar.to(shift.dtype),
        scale_bar.to(scale.dtype),
    )


_fwd_op = _op.define(
    "gated_residual_adaln_fwd(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    triton=_triton.lazily("gated_residual_adaln", "fwd", _fwd),
)
_jvp_op = _op.define(
    "gated_residual_adaln_jvp(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
    "Tensor? x_dot, Tensor? h_dot, Tensor? gate_dot, Tensor? shift_dot, Tensor? scale_dot, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _jvp,
    triton=_triton.lazily("gated_residual_adaln", "jvp", _jvp),
)
_bwd_op = _op.define(
    "gated_residual_adaln_bwd(Tensor? total_bar, Tensor? y_bar, Tensor total, Tensor h, "
    "Tensor gate, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    triton=_triton.lazily("gated_residual_adaln", "bwd", _bwd),
)


def _saves(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0], *inputs[1:5], *outputs[-2:])


def _backward(ctx: Any, total_bar: Tensor | None, y_bar: Tensor | None) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
    *bars, shift_bar, scale_bar = _bwd_op(total_bar, y_bar, *saved)
    return *bars, _norm.whole_shift_bar(shift_bar, y_bar, saved[3]), scale_bar


def _jvp_backward(
    ctx: Any,
    total_bar: Tensor | None,
    total_dot_bar: Tensor | None,
    y_bar: Tensor | None,
    y_dot_bar: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    total_bar = _op.refuse_gradient(total_bar, total_dot_bar)
    y_bar = _op.refuse_gradient(y_bar, y_dot_bar)
    return (*_backward(ctx, total_bar, y_bar), *(None,) * 6)


_op.backward_of(
    _fwd_op,
    lambda ctx, total_bar, y_bar, *_: (*_backward(ctx, total_bar, y_bar), None),
    saves=_saves,
    outputs=2,
)
_op.backward_of(_jvp_op, _jvp_backward, saves=_saves, outputs=4)


def gated_residual_adaln(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gated residual add and adaptive layer norm of the sum, differentiable in both modes.

    Args:
        x: Residual stream `(B, N, C)`, any floating dtype.
        h: What a sub-layer adds to it, `(B, N, C)`.
        gate: `(B, 1, C)` or `(B, N, C)`.
        shift: `(B, 1, C)` or `(B, N, C)`.
        scale: `(B, 1, C)` or `(B, N, C)`.
        eps: Added to the variance.

    Returns:
        The new residual stream x + gate h and its LN(.) (1 + scale) + shift, both `(B, N, C)` in
        the dtype of x.

    Raises:
        ValueError: The shapes do not fit.
    """
    if _op.use_reference():
        return gated_residual_adaln_ref(x, h, gate, shift, scale, eps)
    _norm.check_modulation("gated_residual_adaln", x, gate=gate, shift=shift, scale=scale)
    _op.check_tensors("gated_residual_adaln", h=h)
    if h.shape != x.shape:
        _op.check(False, "gated_residual_adaln", "h of the shape of x", x=x, h=h)

    def run(values: Any, dots: Any) -> Any:
        if dots is None:
            return _fwd_op(*values, eps)[:2]
        return _jvp_op(*values, *dots, eps)[:4]

    total, y = _op.dual(run, (x, h, gate, shift, scale))
    return total, y
