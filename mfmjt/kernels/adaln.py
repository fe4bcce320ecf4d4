"""Layer norm without learned affine, then a shift and a scale that depend on the sample.

    value      n = (x - mean) rstd,  y = n (1 + scale) + shift
    tangent    n_dot = rstd (x_dot - mean(x_dot) - n mean(n x_dot))
               y_dot = n_dot (1 + scale) + n scale_dot + shift_dot
    cotangent  n_bar = y_bar (1 + scale),  x_bar = rstd (n_bar - mean(n_bar) - n mean(n n_bar))
               scale_bar = sum(y_bar n),  shift_bar = sum(y_bar), over the axes that were broadcast
               or over the tokens that picked a row

Means run over the C channels. x (B, N, C); shift and scale (B, 1, C) or (B, N, C), or (B, S, C)
where tokens pick their rows. Stored in the dtype of x, computed in float32 (float64 for float64).
Kept for backward: x, scale, and the mean and rstd of each token. The fused kernels move 2 B N C
elements, 4 B N C with a tangent and 3 B N C backward, besides the modulations; x may have any rank,
and modulations any shape that broadcasts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _norm, precision
from mfmjt.kernels._op import MaybeTensors, Op, Tensors, work_dtype
from mfmjt.kernels._second_order import of_reference

__all__ = ["adaln", "adaln_ref"]


def adaln_ref(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, rows: Tensor | None = None
) -> Tensor:
    """Compute `adaln` in plain PyTorch; the definition of correct."""
    shift, scale = _norm.pick(rows, shift, scale)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return y.to(x.dtype)


def _fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    work = work_dtype(x)
    shift, scale = _norm.pick(rows, shift, scale)
    n, mean, rstd = _norm.normalise(x.to(work), eps)
    return _norm.modulate(n, shift.to(work), scale.to(work)).to(x.dtype), mean, rstd


def _jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work, dtype = work_dtype(x), x.dtype
    shift, scale = _norm.pick(rows, shift.to(work), scale.to(work))
    n, mean, rstd = _norm.normalise(x.to(work), eps)
    shift_dot, scale_dot = _norm.pick(rows, shift_dot, scale_dot)
    dots = (d if d is None else d.to(work) for d in (x_dot, shift_dot, scale_dot))
    y_dot = _norm.modulate_dot(n, rstd, scale, *dots)
    return _norm.modulate(n, shift, scale).to(dtype), y_dot.to(dtype), mean, rstd


def _bwd(
    y_bar: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    work = work_dtype(x)
    x_bar, shift_bar, scale_bar = _norm.modulate_bar(
        y_bar.to(work), x.to(work), scale.to(work), mean, rstd, shift.shape, rows
    )
    return x_bar.to(x.dtype), shift_bar.to(shift.dtype), scale_bar.to(scale.dtype)


_op = Op(
    "adaln",
    _fwd,
    _jvp,
    _bwd,
    check=_norm.checked("adaln", "shift", "scale"),
    reference=adaln_ref,
    takes=_norm.takes,
    plain=precision.float16_by(adaln_ref, _norm.normalised_and_modulated),
    passes={"shift": "y"},
    streams=True,
    jvp_bwd=of_reference(adaln_ref, _jvp, "y"),
)


def adaln(
    x: Tensors, shift: Tensors, scale: Tensors, eps: float = 1e-6, rows: MaybeTensors = None
) -> Tensors:
    """Apply adaptive layer norm, LN(x) (1 + scale) + shift; differentiable in both modes.

    Args:
        x: Activations `(B, N, C)`, any floating dtype; statistics are taken in float32 at least.
            Or a tuple of streams, and so are the other tensors.
        shift: `(B, 1, C)` or `(B, N, C)`.
        scale: `(B, 1, C)` or `(B, N, C)`.
        eps: Added to the variance.
        rows: `(N,)` int32 or int64, the row of shift and scale `(B, S, C)` that modulates a token;
            None for that of its own number. An S of 1 is a row that all tokens share. Values are
            not verified on a GPU.

    Returns:
        `(B, N, C)` in the dtype of x; for a tuple of streams a tuple, in one launch.

    Raises:
        ValueError: shift or scale does not broadcast to x.
    """
    if rows is not None:
        rows, shift, scale = _norm.spread("adaln", x, rows, shift=shift, scale=scale)
    return _op(x, shift, scale, eps, rows)
