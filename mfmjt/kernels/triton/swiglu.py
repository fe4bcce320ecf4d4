"""Triton kernels of `swiglu`: value with tangent, and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels.triton import View, cdiv, jit, rows, tl, tuning, wide

__all__ = ["bwd", "fwd", "jvp"]


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
def _load(rows, row, col, inside):
    return wide(tl.load(rows.pointer + row * rows.token + col, inside, 0.0))


@jit
def _swiglu_fwd_kernel(
    gate,  # this and the next three are `View`s of rows
    up,
    gate_dot,  # of no pointer where it is zero, and so is up_dot
    up_dot,
    y,
    y_dot,  # None where no tangent is wanted
    n_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col, inside = _tile(n_rows, width, BLOCK_ROWS, BLOCK_COLS)
    a = _load(gate, row, col, inside)
    b = _load(up, row, col, inside)
    sigmoid = 1 / (1 + tl.exp(-a))
    s = a * sigmoid
    out = row * width + col
    tl.store(y + out, s * b, inside)
    if y_dot is not None:
        dot = tl.zeros_like(a)
        if gate_dot.pointer is not None:
            a_dot = _load(gate_dot, row, col, inside)
            dot += (sigmoid + s * (1 - sigmoid)) * a_dot * b
        if up_dot.pointer is not None:
            dot += s * _load(up_dot, row, col, inside)
        tl.store(y_dot + out, dot, inside)


@jit
def _swiglu_bwd_kernel(
    y_bar,  # this and the next two are `View`s of rows
    gate,
    up,
    gate_bar,
    up_bar,
    n_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row, col, inside = _tile(n_rows, width, BLOCK_ROWS, BLOCK_COLS)
    bar = _load(y_bar, row, col, inside)
    a = _load(gate, row, col, inside)
    b = _load(up, row, col, inside)
    sigmoid = 1 / (1 + tl.exp(-a))
    s = a * sigmoid
    out = row * width + col
    tl.store(gate_bar + out, bar * b * (sigmoid + s * (1 - sigmoid)), inside)
    tl.store(up_bar + out, bar * s, inside)


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], results: tuple[Any, ...]) -> None:
    """Run an element-wise kernel over all rows."""
    first = results[0]
    if not first.numel():
        return
    width = first.shape[-1] if first.ndim else 1
    n_rows = first.numel() // width
    block_rows, block_cols, num_warps = tuning.elementwise(n_rows, width)
    kernel[(cdiv(n_rows, block_rows) * cdiv(width, block_cols),)](
        *map(_view, tensors),
        *results,
        n_rows,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )


def _view(x: Tensor | None) -> View:
    if x is None:
        return View(None)
    flat = rows(torch.atleast_1d(x))
    return View(flat, token=flat.stride(0))


def fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Run the kernel for the value."""
    y = gate.new_empty(gate.shape)
    _launch(_swiglu_fwd_kernel, (gate, up, None, None), (y, None))
    return y


def jvp(
    gate: Tensor, up: Tensor, gate_dot: Tensor | None, up_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel for value and tangent."""
    y, y_dot = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(_swiglu_fwd_kernel, (gate, up, gate_dot, up_dot), (y, y_dot))
    return y, y_dot


def bwd(y_bar: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel for the gradient."""
    gate_bar, up_bar = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(_swiglu_bwd_kernel, (y_bar, gate, up), (gate_bar, up_bar))
    return gate_bar, up_bar
