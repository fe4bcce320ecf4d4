"""Gated residual add, then adaptive layer norm of the sum: what lies between two sub-layers.

    value      s = x + gate h,  y = adaln(s)
    tangent    s_dot = x_dot + gate_dot h + gate h_dot,  y_dot as in adaln
    cotangent  x_bar = s_bar + (the cotangent of s in adaln),  h_bar = x_bar gate,
               gate_bar = sum(x_bar h) over the axes that were broadcast, or over the tokens
               that picked a row

x, h (B, N, C); gate, shift, scale (B, 1, C) or (B, N, C), or (B, S, C) where tokens pick their
rows. Stored in the dtype of x, computed in float32 (float64 for float64). Kept for backward: s, h,
gate, scale, and the mean and rstd of each token. The fused kernels move 4 B N C elements, 8 B N C
with tangents and 6 B N C backward, besides the modulations; x may have any rank, and modulations
any shape that broadcasts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _norm, precision
from mfmjt.kernels._op import MaybeTensors, Op, Tensors, work_dtype
from mfmjt.kernels._second_order import of_reference

__all__ = ["gated_residual_adaln", "gated_residual_adaln_ref"]


def gated_residual_adaln_ref(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `gated_residual_adaln` in plain PyTorch; the definition of correct."""
    gate, shift, scale = _norm.pick(rows, gate, shift, scale)
    total = (x + gate * h).to(x.dtype)
    y = F.layer_norm(total, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return total, y.to(x.dtype)


def _fwd(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = work_dtype(x)
    gate, shift, scale = _norm.pick(rows, gate, shift, scale)
    total = _norm.add(x.to(work), h.to(work), gate.to(work)).to(x.dtype)
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
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, dtype = work_dtype(x), x.dtype
    x, h, gate, shift, scale = (t.to(work) for t in (x, h, gate, shift, scale))
    gate, shift, scale = _norm.pick(rows, gate, shift, scale)
    gate_dot, shift_dot, scale_dot = _norm.pick(rows, gate_dot, shift_dot, scale_dot)
    total = _norm.add(x, h, gate).to(dtype)
    n, mean, rstd = _norm.normalise(total.to(work), eps)

    total_dot = torch.zeros_like(n) if x_dot is None else x_dot.to(work)
    if h_dot is not None:
        total_dot = _norm.add(total_dot, h_dot.to(work), gate)
    if gate_dot is not None:
        total_dot = _norm.add(total_dot, h, gate_dot.to(work))
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
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = work_dtype(total)
    if y_bar is None:
        x_bar = torch.zeros(total.shape, dtype=work, device=total.device)
        shift_bar, scale_bar = shift.new_zeros(shift.shape), scale.new_zeros(scale.shape)
    else:
        x_bar, shift_bar, scale_bar = _norm.modulate_bar(
            y_bar.to(work), total.to(work), scale.to(work), mean, rstd, shift.shape, rows
        )
    if total_bar is not None:
        x_bar.add_(total_bar)
    gate_bar = _norm.add_up(x_bar * h.to(work), gate.shape, rows)
    h_bar = x_bar * _norm.pick(rows, gate.to(work))[0]
    return (
        x_bar.to(total.dtype),
        h_bar.to(h.dtype),
        gate_bar.to(gate.dtype),
        shift_bar.to(shift.dtype),
        scale_bar.to(scale.dtype),
    )


def _in_float16(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = torch.addcmul(x, _norm.pick(rows, gate)[0], h).to(x.dtype)
    return total, _norm.normalised_and_modulated(total, shift, scale, eps, rows)


_op = Op(
    "gated_residual_adaln",
    _fwd,
    _jvp,
    _bwd,
    check=_norm.checked("gated_residual_adaln", "h", "gate", "shift", "scale"),
    reference=gated_residual_adaln_ref,
    takes=_norm.takes,
    plain=precision.float16_by(gated_residual_adaln_ref, _in_float16),
    passes={"shift": "y"},
    streams=True,
    jvp_bwd=of_reference(gated_residual_adaln_ref, _jvp, "total", "y"),
)


def gated_residual_adaln(
    x: Tensors,
    h: Tensors,
    gate: Tensors,
    shift: Tensors,
    scale: Tensors,
    eps: float = 1e-6,
    rows: MaybeTensors = None,
) -> tuple[Tensors, Tensors]:
    """Add a gated residual and apply adaptive layer norm; differentiable in both modes.

    Args:
        x: Residual stream `(B, N, C)`, any floating dtype; or a tuple of streams, and so are the
            other tensors.
        h: What a sub-layer adds to it, `(B, N, C)`.
        gate: `(B, 1, C)` or `(B, N, C)`.
        shift: `(B, 1, C)` or `(B, N, C)`.
        scale: `(B, 1, C)` or `(B, N, C)`.
        eps: Added to the variance.
        rows: `(N,)` int32 or int64, the row of gate, shift and scale `(B, S, C)` that modulates a
            token; None for that of its own number. An S of 1 is a row that all tokens share.
            Values are not verified on a GPU.

    Returns:
        The new residual stream x + gate h and its LN(.) (1 + scale) + shift, both `(B, N, C)` in
        the dtype of x; for a tuple of streams two tuples, in one launch.

    Raises:
        ValueError: The shapes do not fit.
    """
    if rows is not None:
        rows, gate, shift, scale = _norm.spread(
            "gated_residual_adaln", x, rows, h, gate=gate, shift=shift, scale=scale
        )
    total, y = _op(x, h, gate, shift, scale, eps, rows)
    return total, y
