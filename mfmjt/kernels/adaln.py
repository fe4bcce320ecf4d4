"""Layer norm without learned affine, then a shift and a scale that depend on the sample.

    value      n = (x - mean) rstd,  y = n (1 + scale) + shift
    tangent    n_dot = rstd (x_dot - mean(x_dot) - n mean(n x_dot))
               y_dot = n_dot (1 + scale) + n scale_dot + shift_dot
    cotangent  n_bar = y_bar (1 + scale),  x_bar = rstd (n_bar - mean(n_bar) - n mean(n n_bar))
               scale_bar = sum(y_bar n),  shift_bar = sum(y_bar), over the axes that were broadcast

Means run over the C channels. x (B, N, C); shift and scale (B, 1, C) or (B, N, C). Stored in the
dtype of x, computed in float32 (float64 for float64). Kept for backward: x, scale, and the mean and
rstd of each token. The fused kernels move 2 B N C elements, 4 B N C with a tangent and 3 B N C
backward, besides the modulations; x may have any rank, and modulations any shape that broadcasts.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _norm, _op
from mfmjt.kernels._norm import (
    backward_norm,
    columns,
    first_row,
    forward_norm,
    load_rows,
    load_shared,
    store_sum,
)
from mfmjt.kernels._triton import jit, tl

__all__ = ["adaln", "adaln_ref"]


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch `adaln`; the definition of correct."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return y.to(x.dtype)


def _fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    work = _op.work_dtype(x)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work, dtype = _op.work_dtype(x), x.dtype
    x, shift, scale = x.to(work), shift.to(work), scale.to(work)
    n, mean, rstd = _norm.normalise(x, eps)
    dots = (d if d is None else d.to(work) for d in (x_dot, shift_dot, scale_dot))
    y_dot = _norm.modulate_dot(n, rstd, scale, *dots)
    return _norm.modulate(n, shift, scale).to(dtype), y_dot.to(dtype), mean, rstd


def _bwd(
    y_bar: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    work = _op.work_dtype(x)
    x_bar, shift_bar, scale_bar = _norm.modulate_bar(
        y_bar.to(work), x.to(work), scale.to(work), mean, rstd, shift.shape
    )
    return x_bar.to(x.dtype), shift_bar.to(shift.dtype), scale_bar.to(scale.dtype)


@jit
def _adaln_fwd_kernel(
    x,  # this and the next five are `_norm.Rows`
    shift,
    scale,
    x_dot,
    shift_dot,
    scale_dot,
    y,
    y_dot,  # None where no tangent is wanted
    mean,
    rstd,
    tokens,
    width,
    chunk,  # rows of one program
    EPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    work: tl.constexpr = mean.dtype.element_ty
    sample, first = first_row(tokens, chunk)
    row = first + tl.arange(0, BLOCK_ROWS)
    col = columns(SEGMENTS, BLOCK_COLS)
    shared_shift = load_shared(shift, sample, row, col, tokens, width, work)
    shared_scale = load_shared(scale, sample, row, col, tokens, width, work)
    shared_shift_dot = load_shared(shift_dot, sample, row, col, tokens, width, work)
    shared_scale_dot = load_shared(scale_dot, sample, row, col, tokens, width, work)
    for start in range(0, tl.minimum(chunk, tokens - first), BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        wide_x = load_rows(x, sample, row, col, tokens, width, work)
        wide_dot = None
        if x_dot.pointer is not None:
            wide_dot = load_rows(x_dot, sample, row, col, tokens, width, work)
        forward_norm(
            wide_x,
            wide_dot,
            shift,
            scale,
            shift_dot,
            scale_dot,
            shared_shift,
            shared_scale,
            shared_shift_dot,
            shared_scale_dot,
            y,
            y_dot,
            mean,
            rstd,
            sample,
            row,
            col,
            tokens,
            width,
            EPS,
        )


@jit
def _adaln_bwd_kernel(
    y_bar,  # this and the next two are `_norm.Rows`
    x,
    scale,
    mean,
    rstd,
    x_bar,
    scale_bar,  # (B, N, C), or
    scale_sum,  # (B, chunks, C); the other is None
    shift_bar,  # the same, or both None where it is y_bar
    shift_sum,
    tokens,
    width,
    chunk,  # rows of one program
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    work: tl.constexpr = mean.dtype.element_ty
    sample, first = first_row(tokens, chunk)
    col = columns(SEGMENTS, BLOCK_COLS)
    if scale_sum is not None:
        scale_total = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
    if shift_sum is not None:
        shift_total = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
    for start in range(0, tl.minimum(chunk, tokens - first), BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        inside = (row[None, :, None] < tokens) & (col < width)
        wide_x = load_rows(x, sample, row, col, tokens, width, work)
        bar = load_rows(y_bar, sample, row, col, tokens, width, work)
        factor = 1 + load_rows(scale, sample, row, col, tokens, width, work)
        n, bar_of_x = backward_norm(
            bar, wide_x, mean, rstd, factor, sample, row, col, tokens, width
        )
        out = (sample * tokens + row)[None, :, None] * width + col
        tl.store(x_bar + out, bar_of_x, inside)
        if scale_bar is not None:
            tl.store(scale_bar + out, bar * n, inside)
        if scale_sum is not None:
            scale_total += bar * n
        if shift_bar is not None:
            tl.store(shift_bar + out, bar, inside)
        if shift_sum is not None:
            shift_total += bar
    if scale_sum is not None:
        store_sum(scale_sum, scale_total, col, width)
    if shift_sum is not None:
        store_sum(shift_sum, shift_total, col, width)


def _launch_fwd(
    x: Tensor,
    modulations: tuple[Tensor, Tensor],
    x_dot: Tensor | None,
    dots: tuple[Tensor | None, Tensor | None],
    eps: float,
    y_dot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _norm.Layout(x, *modulations)
    y = x.new_empty(x.shape)
    mean = x.new_empty((*x.shape[:-1], 1), dtype=layout.work)
    rstd = mean.new_empty(mean.shape)
    chunk, chunks, meta = layout.launch()
    _adaln_fwd_kernel[(layout.samples * chunks,)](
        layout.rows(x),
        *map(layout.rows, modulations),
        layout.rows(x_dot),
        *map(layout.rows, dots),
        y,
        y_dot,
        mean,
        rstd,
        layout.tokens,
        layout.width,
        chunk,
        EPS=eps,
        **meta,
    )
    return y, mean, rstd


def _fwd_triton(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _norm.fits_kernel(x):
        return _fwd(x, shift, scale, eps)
    return _launch_fwd(x, (shift, scale), None, (None, None), eps, None)


def _jvp_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _norm.fits_kernel(x):
        return _jvp(x, shift, scale, x_dot, shift_dot, scale_dot, eps)
    y_dot = x.new_empty(x.shape)
    y, mean, rstd = _launch_fwd(x, (shift, scale), x_dot, (shift_dot, scale_dot), eps, y_dot)
    return y, y_dot, mean, rstd


def _bwd_triton(
    y_bar: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not _norm.fits_kernel(x):
        return _bwd(y_bar, x, shift, scale, mean, rstd)
    layout = _norm.Layout(x, shift, scale)
    chunk, chunks, meta = layout.launch(backward=True)
    x_bar = x.new_empty(x.shape)
    shift_memory = layout.cotangent(shift, chunks, known=True)
    scale_memory = layout.cotangent(scale, chunks)
    _adaln_bwd_kernel[(layout.samples * chunks,)](
        layout.rows(y_bar),
        layout.rows(x),
        layout.rows(scale),
        mean.contiguous(),
        rstd.contiguous(),
        x_bar,
        scale_memory.whole,
        scale_memory.sums,
        shift_memory.whole,
        shift_memory.sums,
        layout.tokens,
        layout.width,
        chunk,
        **meta,
    )
    shift_bar, scale_bar = _norm.finish(shift_memory, scale_memory)
    return x_bar, shift_bar, scale_bar


_fwd_op = _op.define(
    "adaln_fwd(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd,
    triton=_fwd_triton,
)
_jvp_op = _op.define(
    "adaln_jvp(Tensor x, Tensor shift, Tensor scale, Tensor? x_dot, Tensor? shift_dot, "
    "Tensor? scale_dot, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _jvp,
    triton=_jvp_triton,
)
_bwd_op = _op.define(
    "adaln_bwd(Tensor y_bar, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd,
    triton=_bwd_triton,
)


def _backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
    x_bar, shift_bar, scale_bar = _bwd_op(y_bar, *saved)
    return x_bar, _norm.whole_shift_bar(shift_bar, y_bar, saved[1]), scale_bar


def _saves(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*inputs[:3], *outputs[-2:])


_op.backward_of(
    _fwd_op, lambda ctx, y_bar, *_: (*_backward(ctx, y_bar), None), saves=_saves, outputs=1
)
_op.backward_of(
    _jvp_op,
    lambda ctx, y_bar, y_dot_bar, *_: (
        *_backward(ctx, _op.refuse_gradient(y_bar, y_dot_bar)),
        *(None,) * 4,
    ),
    saves=_saves,
    outputs=2,
)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm: LN(x) (1 + scale) + shift, differentiable in both modes.

    Args:
        x: Activations `(B, N, C)`, any floating dtype; statistics are taken in float32 at least.
        shift: `(B, 1, C)` or `(B, N, C)`.
        scale: `(B, 1, C)` or `(B, N, C)`.
        eps: Added to the variance.

    Returns:
        `(B, N, C)` in the dtype of x.

    Raises:
        ValueError: shift or scale does not broadcast to x.
    """
    if _op.use_reference():
        return adaln_ref(x, shift, scale, eps)
    _norm.check_modulation("adaln", x, shift=shift, scale=scale)

    def run(values: Any, dots: Any) -> Any:
        if dots is None:
            return _fwd_op(*values, eps)[:1]
        return _jvp_op(*values, *dots, eps)[:2]

    return _op.dual(run, (x, shift, scale))[0]
