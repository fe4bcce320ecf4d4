"""Triton kernels of `swiglu`: value with tangent, and gradient, over streams.

Streams of a launch share width and dtype; other tuples, and what is empty, go stream by stream or
run the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import at, locate, put, wide
from mfmjt.kernels.triton.launching import alike, empty, filled, launch, of_one, views

__all__ = ["bwd", "bwd_into", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


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
def _load(rows, stream, row, col, inside):
    return wide(tl.load(at(rows, stream, 0, row) + col, inside, 0.0))


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
    put(ys, stream, out, s * up, inside)
    if y_dots is not None:
        y_dot = tl.zeros_like(gate)
        if gate_dots is not None:
            gate_dot = _load(gate_dots, stream, row, col, inside)
            y_dot += (sigmoid + s * (1 - sigmoid)) * gate_dot * up
        if up_dots is not None:
            y_dot += s * _load(up_dots, stream, row, col, inside)
        put(y_dots, stream, out, y_dot, inside)


@jit
def _swiglu_bwd_kernel(
    y_bars,  # for each stream a `View` of rows, as for the next four
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
    gate_bar = y_bar * up * (sigmoid + s * (1 - sigmoid))
    tl.store(at(gate_bars, stream, 0, row) + col, gate_bar, inside)
    tl.store(at(up_bars, stream, 0, row) + col, y_bar * s, inside)


def _rows(x: Tensor) -> Tensor:
    """Return (..., F) as (rows, F)."""
    x = torch.atleast_1d(x)
    return x.reshape(-1, x.shape[-1])


def _launch(kernel: Any, inputs: Sequence[Any], results: Sequence[Any] = ()) -> bool:
    """Run an element-wise kernel over all rows of all streams; return False for what it leaves."""
    if not alike(*inputs):
        return False
    rows = [ts and [_rows(t) for t in ts] for ts in inputs]
    counts, widths = zip(*[x.shape for x in rows[0]], strict=True)
    if len(set(widths)) > 1:
        return False
    options = tuning.elementwise(max(counts), widths[0])
    blocks = sum(cdiv(n, options["BLOCK_ROWS"]) for n in counts)
    grid = (blocks * cdiv(widths[0], options["BLOCK_COLS"]),)
    launch(kernel, grid, *map(views, rows), *results, counts, widths[0], **options)
    return True


def fwd_streams(gates: list[Tensor], ups: list[Tensor]) -> Any:
    """Compute the values of all streams."""
    ys = empty(gates)
    launched = _launch(_swiglu_fwd_kernel, (gates, ups, None, None), (ys, None))
    return ys if launched else NotImplemented


def jvp_streams(
    gates: list[Tensor],
    ups: list[Tensor],
    gate_dots: list[Tensor | None],
    up_dots: list[Tensor | None],
) -> Any:
    """Compute values and tangents of all streams."""
    ys, y_dots = empty(gates), empty(gates)
    inputs = (gates, ups, filled(gate_dots, gates), filled(up_dots, ups))
    launched = _launch(_swiglu_fwd_kernel, inputs, (ys, y_dots))
    return (ys, y_dots) if launched else NotImplemented


def bwd_streams(y_bars: list[Tensor], gates: list[Tensor], ups: list[Tensor]) -> Any:
    """Compute the cotangents of all streams."""
    bars = empty(gates), empty(ups)
    launched = _launch(_swiglu_bwd_kernel, (y_bars, gates, ups, *bars))
    return bars if launched else NotImplemented


def bwd_into(y_bars: list[Tensor], both: list[Tensor], bars: list[Tensor]) -> None:
    """Write the cotangents of gate and up, halves of the last axis of `both`, into those of `bars`.

    One launch, or one for each stream that is not empty where widths differ.
    """
    halves = [x.chunk(2, -1) for x in both], [x.chunk(2, -1) for x in bars]
    inputs = y_bars, *([pair[i] for pair in pairs] for pairs in halves for i in (0, 1))
    if not _launch(_swiglu_bwd_kernel, inputs):
        for one in zip(*inputs, strict=True):
            _launch(_swiglu_bwd_kernel, [[x] for x in one])


fwd, jvp, bwd = of_one(fwd_streams, jvp_streams, bwd_streams)
