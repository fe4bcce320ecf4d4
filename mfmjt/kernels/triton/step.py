"""Triton kernels of what a step of inference does once: pooled tokens, conditions, guidance.

Each is one launch in place of several of PyTorch's, which at batch 1 take longer to start than to
run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels.triton import cdiv, jit, power_of_2, tl, tuning
from mfmjt.kernels.triton.device import await_launches, wide
from mfmjt.kernels.triton.launching import launch

__all__ = ["guide", "pool", "silu_conditions"]


@jit
def _pool_kernel(
    xs,  # (B, N, C) each, in one piece
    y,  # (B, sum of C)
    tokens,
    widths,
    ends,  # where the channels of each stream end in y
    total,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    for s in tl.static_range(len(xs)):
        channel = column - (ends[s] - widths[s])
        exists = (channel >= 0) & (channel < widths[s])
        x = xs[s] + sample * tokens[s] * widths[s] + channel[None, :]
        sums = wide(tl.zeros((BLOCK_COLS,), y.dtype.element_ty))
        for start in range(0, tokens[s], BLOCK_ROWS):
            token = start + tl.arange(0, BLOCK_ROWS)[:, None]
            inside = (token < tokens[s]) & exists[None, :]
            sums += tl.sum(wide(tl.load(x + token * widths[s], inside, 0.0)), 0)
        tl.store(y + sample * total + column, sums / tokens[s], exists)


def pool(xs: list[Tensor]) -> Any:
    """Launch the means over tokens of streams (B, N, C), side by side."""
    xs = [x.contiguous() for x in xs]
    widths = [x.shape[2] for x in xs]
    y = xs[0].new_empty(xs[0].shape[0], 1, sum(widths))
    if y.numel():
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        options = tuning.sums(max(x.shape[1] for x in xs), y.shape[2])
        grid = cdiv(y.shape[2], options["BLOCK_COLS"]), y.shape[0]
        tokens = [x.shape[1] for x in xs]
        launch(_pool_kernel, grid, xs, y, tokens, widths, ends, sum(widths), **options)
    return y


@jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@jit
def _silu_conditions_kernel(
    shared, frames, y, of_frames, rows, width, step, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    await_launches(EARLY)
    row, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = wide(tl.load(shared + sample * width + column, inside, 0.0))
    tl.store(y + sample * width + column, _silu(x), inside & (row == 0))
    inside = inside & (row < rows)  # there may be none
    place = row * width + column
    x += wide(tl.load(frames + sample * step + place, inside, 0.0))
    tl.store(of_frames + sample * rows * width + place, _silu(x), inside)


def silu_conditions(shared: Tensor, frames: Tensor) -> Any:
    """Launch silu(shared) (B, 1, C) and silu(shared + frames) (B, S, C)."""
    shared, frames = shared.contiguous(), frames.contiguous()
    (samples, _, width), rows = shared.shape, frames.shape[1]
    y, of_frames = shared.new_empty(shared.shape), frames.new_empty(samples, rows, width)
    step = frames.stride(0) if frames.shape[0] > 1 else 0
    if y.numel():
        options: tuning.Options = {"BLOCK": power_of_2(width), "num_warps": 1}
        operands = shared, frames, y, of_frames, rows, width, step
        launch(_silu_conditions_kernel, (max(1, rows), samples), *operands, **options)
    return y, of_frames


@jit
def _guide_kernel(
    z,  # (B, N C)
    u,  # (2 B, N C), with conditions and then without
    w,  # a number, or a pointer to one or to one for each sample
    y,
    count,  # N C
    samples,
    w_step,  # from one sample's w to the next; None if w is a number
    step,
    SCALED: tl.constexpr,  # whether what is without conditions is projected
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    z += sample * count
    y += sample * count
    null = u + (samples + sample) * count
    u += sample * count
    if w_step is not None:
        w = tl.load(w + sample * w_step).to(tl.float32)
    of_null = 1 - w
    if SCALED:
        dot, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            inside = start + lane < count
            x = tl.load(u + start + lane, inside, 0.0).to(tl.float32)
            x_null = tl.load(null + start + lane, inside, 0.0).to(tl.float32)
            dot += x * x_null
            square += x_null * x_null
        of_null = of_null * (tl.sum(dot, 0) / (tl.sum(square, 0) + EPS))
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        x = tl.load(u + start + lane, inside, 0.0).to(tl.float32)
        x_null = tl.load(null + start + lane, inside, 0.0).to(tl.float32)
        begin = tl.load(z + start + lane, inside, 0.0).to(tl.float32)
        tl.store(y + start + lane, begin - step * (w * x + of_null * x_null), inside)


def guide(
    z: Tensor, u: Tensor, w: float, ws: Tensor | None, mode: str, step: float, eps: float
) -> Any:
    """Launch z - step guided u, in float32; `ws` takes the place of w."""
    if mode == "none" or not z.numel() or torch.float64 in (z.dtype, u.dtype):
        return NotImplemented
    z, u, y = z.contiguous(), u.contiguous(), z.new_empty(z.shape)
    launch(
        _guide_kernel,
        (z.shape[0],),
        *(z, u, float(w) if ws is None else ws.contiguous(), y, z[0].numel(), z.shape[0]),
        None if ws is None else int(ws.numel() > 1),
        float(step),
        SCALED=mode == "cfg_scaled",
        EPS=eps,
        BLOCK=2048,
        num_warps=8,
    )
    return y
