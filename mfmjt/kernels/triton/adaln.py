"""Triton kernels of `adaln`: value with tangent, and gradient."""

from __future__ import annotations

from torch import Tensor

from mfmjt.kernels.triton import jit, norm, tl
from mfmjt.kernels.triton.norm import (
    backward_norm,
    columns,
    first_row,
    forward_norm,
    load_rows,
    load_shared,
    store_sum,
)

__all__ = ["bwd", "fwd", "jvp"]


@jit
def _adaln_fwd_kernel(
    x,  # this and the next five are `norm.Rows`
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
    y_bar,  # this and the next two are `norm.Rows`
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
    layout = norm.Layout(x, *modulations)
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


def fwd(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel for the value."""
    if not norm.fits_kernel(x):
        return NotImplemented
    return _launch_fwd(x, (shift, scale), None, (None, None), eps, None)


def jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel for value and tangent."""
    if not norm.fits_kernel(x):
        return NotImplemented
    y_dot = x.new_empty(x.shape)
    y, mean, rstd = _launch_fwd(x, (shift, scale), x_dot, (shift_dot, scale_dot), eps, y_dot)
    return y, y_dot, mean, rstd


def bwd(
    y_bar: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel for the gradient."""
    if not norm.fits_kernel(x):
        return NotImplemented
    layout = norm.Layout(x, shift, scale)
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
    shift_bar, scale_bar = norm.finish(shift_memory, scale_memory)
    return x_bar, shift_bar, scale_bar
