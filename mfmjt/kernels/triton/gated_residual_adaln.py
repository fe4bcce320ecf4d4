"""Triton kernels of `gated_residual_adaln`: value with tangent, and gradient."""

from __future__ import annotations

from torch import Tensor

from mfmjt.kernels.triton import cdiv, jit, norm, tl
from mfmjt.kernels.triton.norm import (
    backward_norm,
    columns,
    first_row,
    forward_norm,
    load_rows,
    store_sum,
)

__all__ = ["bwd", "fwd", "jvp"]


@jit
def _gated_residual_adaln_fwd_kernel(
    x,  # this and the next nine are `norm.Rows`
    h,
    gate,
    shift,
    scale,
    x_dot,
    h_dot,
    gate_dot,
    shift_dot,
    scale_dot,
    total,
    total_dot,  # this and y_dot None where no tangent is wanted
    y,
    y_dot,
    mean,
    rstd,
    tokens,
    width,
    EPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    work: tl.constexpr = mean.dtype.element_ty
    sample, first = first_row(tokens, BLOCK_ROWS)
    row = first + tl.arange(0, BLOCK_ROWS)
    col = columns(SEGMENTS, BLOCK_COLS)
    inside = (row[None, :, None] < tokens) & (col < width)
    out = (sample * tokens + row)[None, :, None] * width + col
    wide_h = load_rows(h, sample, row, col, tokens, width, work)
    wide_gate = load_rows(gate, sample, row, col, tokens, width, work)
    s = load_rows(x, sample, row, col, tokens, width, work) + wide_gate * wide_h
    s = s.to(total.dtype.element_ty)  # what is normalised is what is stored
    tl.store(total + out, s, inside)
    s_dot = None
    if total_dot is not None:
        s_dot = tl.zeros_like(wide_h)
        if x_dot.pointer is not None:
            s_dot += load_rows(x_dot, sample, row, col, tokens, width, work)
        if h_dot.pointer is not None:
            s_dot += wide_gate * load_rows(h_dot, sample, row, col, tokens, width, work)
        if gate_dot.pointer is not None:
            s_dot += wide_h * load_rows(gate_dot, sample, row, col, tokens, width, work)
        tl.store(total_dot + out, s_dot, inside)
    forward_norm(
        s.to(work),
        s_dot,
        shift,
        scale,
        shift_dot,
        scale_dot,
        None,
        None,
        None,
        None,
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
def _gated_residual_adaln_bwd_kernel(
    total_bar,  # this and the next five are `norm.Rows`; one of the first two may be zero
    y_bar,
    total,
    h,
    gate,
    scale,
    mean,
    rstd,
    x_bar,
    h_bar,
    gate_bar,  # (B, N, C), or
    gate_sum,  # (B, chunks, C); the other is None
    shift_bar,  # the same, or both None where it is y_bar
    shift_sum,
    scale_bar,  # the same as for gate; all four None where there is no y_bar
    scale_sum,
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
    if gate_sum is not None:
        gate_total = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
    if shift_sum is not None:
        shift_total = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
    if scale_sum is not None:
        scale_total = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
    for start in range(0, tl.minimum(chunk, tokens - first), BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        inside = (row[None, :, None] < tokens) & (col < width)
        out = (sample * tokens + row)[None, :, None] * width + col
        s_bar = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), work)
        if y_bar.pointer is not None:
            s = load_rows(total, sample, row, col, tokens, width, work)
            bar = load_rows(y_bar, sample, row, col, tokens, width, work)
            factor = 1 + load_rows(scale, sample, row, col, tokens, width, work)
            n, s_bar = backward_norm(bar, s, mean, rstd, factor, sample, row, col, tokens, width)
            if scale_bar is not None:
                tl.store(scale_bar + out, bar * n, inside)
            if scale_sum is not None:
                scale_total += bar * n
            if shift_bar is not None:
                tl.store(shift_bar + out, bar, inside)
            if shift_sum is not None:
                shift_total += bar
        if total_bar.pointer is not None:
            s_bar += load_rows(total_bar, sample, row, col, tokens, width, work)
        tl.store(x_bar + out, s_bar, inside)
        wide_gate = load_rows(gate, sample, row, col, tokens, width, work)
        tl.store(h_bar + out, s_bar * wide_gate, inside)
        bar_of_gate = s_bar * load_rows(h, sample, row, col, tokens, width, work)
        if gate_bar is not None:
            tl.store(gate_bar + out, bar_of_gate, inside)
        if gate_sum is not None:
            gate_total += bar_of_gate
    if gate_sum is not None:
        store_sum(gate_sum, gate_total, col, width)
    if shift_sum is not None:
        store_sum(shift_sum, shift_total, col, width)
    if scale_sum is not None:
        store_sum(scale_sum, scale_total, col, width)


def _launch_fwd(
    x: Tensor,
    h: Tensor,
    modulations: tuple[Tensor, ...],
    x_dot: Tensor | None,
    h_dot: Tensor | None,
    dots: tuple[Tensor | None, ...],
    total_dot: Tensor | None,
    y_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = norm.Layout(x, *modulations)
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    mean = x.new_empty((*x.shape[:-1], 1), dtype=layout.work)
    rstd = mean.new_empty(mean.shape)
    meta = layout.launch().meta
    blocks = cdiv(layout.tokens, meta["BLOCK_ROWS"])
    _gated_residual_adaln_fwd_kernel[(layout.samples * blocks,)](
        layout.rows(x),
        layout.rows(h),
        *map(layout.rows, modulations),
        layout.rows(x_dot),
        layout.rows(h_dot),
        *map(layout.rows, dots),
        total,
        total_dot,
        y,
        y_dot,
        mean,
        rstd,
        layout.tokens,
        layout.width,
        EPS=eps,
        **meta,
    )
    return total, y, mean, rstd


def fwd(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel for the value."""
    if not norm.fits_kernel(x):
        return NotImplemented
    still = (None, None, None)
    return _launch_fwd(x, h, (gate, shift, scale), None, None, still, None, None, eps)


def jvp(
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
    """Run the kernel for value and tangent."""
    dots = (gate_dot, shift_dot, scale_dot)
    if not norm.fits_kernel(x):
        return NotImplemented
    total_dot, y_dot = x.new_empty(x.shape), x.new_empty(x.shape)
    total, y, mean, rstd = _launch_fwd(
        x, h, (gate, shift, scale), x_dot, h_dot, dots, total_dot, y_dot, eps
    )
    return total, total_dot, y, y_dot, mean, rstd


def bwd(
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
    """Run the kernel for the gradient."""
    if not norm.fits_kernel(total):
        return NotImplemented
    layout = norm.Layout(total, gate, shift, scale)
    chunk, chunks, meta = layout.launch(backward=True)
    x_bar, h_bar = total.new_empty(total.shape), h.new_empty(h.shape)
    bars = [layout.cotangent(gate, chunks)]
    if y_bar is not None:
        bars += [layout.cotangent(shift, chunks, known=True), layout.cotangent(scale, chunks)]
    memory = [part for bar in bars for part in (bar.whole, bar.sums)]
    _gated_residual_adaln_bwd_kernel[(layout.samples * chunks,)](
        layout.rows(total_bar),
        layout.rows(y_bar),
        layout.rows(total),
        layout.rows(h),
        layout.rows(gate),
        layout.rows(scale),
        mean.contiguous(),
        rstd.contiguous(),
        x_bar,
        h_bar,
        *memory,
        *(None,) * (6 - len(memory)),
        layout.tokens,
        layout.width,
        chunk,
        **meta,
    )
    gate_bar, *rest = norm.finish(*bars)
    shift_bar, scale_bar = rest or (shift.new_zeros(shift.shape), scale.new_zeros(scale.shape))
    return x_bar, h_bar, gate_bar, shift_bar, scale_bar
