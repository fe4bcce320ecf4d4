"""Triton kernels of `swiglu`: value with tangent, and gradient, over streams.

Streams of a launch share width and dtype; other tuples, and what is empty, go stream by stream or
run the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels.triton import (
    View,
    cdiv,
    choose,
    choose_view,
    filled,
    jit,
    locate,
    one_stream,
    rows,
    tl,
    tuning,
    wide,
)

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


@jit
def _tile(counts, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return stream, rows (R, 1) and columns (1, C) of this program, and which exist."""
    # One axis: a grid's second holds no more than 65535 programs
    blocks = tl.cdiv(width, BLOCK_COLS)
    stream, start, count = locate(counts, tl.program_id(0) // blocks, BLOCK_ROWS)
    row = (start + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return stream, row, col, (row < count) & (col < width)


@jit
def _load(views, stream, row, col, inside):
    pointer, _, stride, _ = choose_view(views, stream)
    return wide(tl.load(pointer + row * stride + col, inside, 0.0))


@jit
def _swiglu_fwd_kernel(
    gates,  # for each stream a `View` of rows, as for the next three
    ups,
    gate_dots,  # None where it is zero, and so is up_dots
    up_dots,
    ys,
    y_dots,  # None where no tangent is wanted
    counts,  # rows of each stream
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    stream, row, col, inside = _tile(counts, width, BLOCK_ROWS, BLOCK_COLS)
    gate = _load(gates, stream, row, col, inside)
    up = _load(ups, stream, row, col, inside)
    sigmoid = 1 / (1 + tl.exp(-gate))
    s = gate * sigmoid
    out = row * width + col
    tl.store(choose(ys, stream) + out, s * up, inside)
    if y_dots is not None:
        y_dot = tl.zeros_like(gate)
        if gate_dots is not None:
            gate_dot = _load(gate_dots, stream, row, col, inside)
            y_dot += (sigmoid + s * (1 - sigmoid)) * gate_dot * up
        if up_dots is not None:
            y_dot += s * _load(up_dots, stream, row, col, inside)
        tl.store(choose(y_dots, stream) + out, y_dot, inside)


@jit
def _swiglu_bwd_kernel(
    y_bars,  # for each stream a `View` of rows, as for the next two
    gates,
    ups,
    gate_bars,
    up_bars,
    counts,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    stream, row, col, inside = _tile(counts, width, BLOCK_ROWS, BLOCK_COLS)
    y_bar = _load(y_bars, stream, row, col, inside)
    gate = _load(gates, stream, row, col, inside)
    up = _load(ups, stream, row, col, inside)
    sigmoid = 1 / (1 + tl.exp(-gate))
    s = gate * sigmoid
    out = row * width + col
    gate_bar = y_bar * up * (sigmoid + s * (1 - sigmoid))
    tl.store(choose(gate_bars, stream) + out, gate_bar, inside)
    tl.store(choose(up_bars, stream) + out, y_bar * s, inside)


def _launch(kernel: Any, inputs: Sequence[Any], results: Sequence[Any]) -> bool:
    """Run an element-wise kernel over all rows of all streams; return False for what it leaves."""
    first = inputs[0]
    width = first[0].shape[-1] if first[0].ndim else 1
    for tensors in filter(None, inputs):
        for x in tensors:
            alike = x.dtype == tensors[0].dtype and x.numel() > 0
            if not alike or (x.shape[-1] if x.ndim else 1) != width:
                return False
    counts = tuple([x.numel() // width for x in first])
    block_rows, block_cols, num_warps = tuning.elementwise(max(counts), width)
    kernel[(sum(cdiv(n, block_rows) for n in counts) * cdiv(width, block_cols),)](
        *(None if tensors is None else tuple(map(_view, tensors)) for tensors in inputs),
        *(None if tensors is None else tuple(tensors) for tensors in results),
        counts,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )
    return True


def _view(x: Tensor) -> View:
    flat = rows(torch.atleast_1d(x))
    return View(flat, token=flat.stride(0))


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def fwd_streams(gates: list[Tensor], ups: list[Tensor]) -> Any:
    """Compute the values of all streams."""
    ys = _alike(gates)
    launched = _launch(_swiglu_fwd_kernel, (gates, ups, None, None), (ys, None))
    return ys if launched else NotImplemented


def jvp_streams(
    gates: list[Tensor],
    ups: list[Tensor],
    gate_dots: list[Tensor | None],
    up_dots: list[Tensor | None],
) -> Any:
    """Compute values and tangents of all streams."""
    ys, y_dots = _alike(gates), _alike(gates)
    inputs = (gates, ups, filled(gate_dots, gates), filled(up_dots, ups))
    launched = _launch(_swiglu_fwd_kernel, inputs, (ys, y_dots))
    return (ys, y_dots) if launched else NotImplemented


def bwd_streams(y_bars: list[Tensor], gates: list[Tensor], ups: list[Tensor]) -> Any:
    """Compute the cotangents of all streams."""
    bars = _alike(gates), _alike(ups)
    launched = _launch(_swiglu_bwd_kernel, (y_bars, gates, ups), bars)
    return bars if launched else NotImplemented


fwd = functools.partial(one_stream, fwd_streams)
jvp = functools.partial(one_stream, jvp_streams)
bwd = functools.partial(one_stream, bwd_streams)
