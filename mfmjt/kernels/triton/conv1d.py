"""Triton kernels of `conv1d`: products over windows of tokens, and the weight's gradient.

Value, tangent and x_bar are `product.project`: a tangent is one more stream with the same weight,
x_bar a convolution of y_bar with the weight turned. W_bar is a product over tokens of y_bar and the
windows of x, cut into parts that are added up in a fixed order. Dilations above 1 and float64 are
left to the formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.launching import launch, of_one
from mfmjt.kernels.triton.product import precision, project, takes

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams", "weight_sums"]


@jit
def _conv1d_bwd_weight_kernel(
    x,  # (rows, channels), contiguous: the tokens of all samples
    y_bar,  # (rows, outs), contiguous
    parts,  # (splits, outs, taps * channels), contiguous, in the dtype of sums
    rows,
    tokens,  # of a sample
    channels,  # in units
    taps,
    outs,  # in units
    steps,  # blocks of rows that one split adds up
    UNIT: tl.constexpr,  # elements per aligned load
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    depth, count = taps * channels * UNIT, tokens * channels * UNIT
    depth_blocks = tl.cdiv(depth, BLOCK_DEPTH)
    out = (tl.program_id(0) // depth_blocks) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)[:, None]
    k = (tl.program_id(0) % depth_blocks) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)[None, :]
    split = tl.program_id(1)
    start = split * steps * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_ROWS)
    # Where the window of a row begins, counted from its sample's first number. No step divides by
    # the tokens of a sample: what is past the end of one begins in the next
    first = (((start + lane) % tokens - taps // 2) * channels * UNIT)[:, None]
    end, step = (tokens - taps // 2) * channels * UNIT, BLOCK_ROWS % tokens * channels * UNIT
    x += ((start + lane)[:, None].to(tl.int64) - taps // 2) * channels * UNIT + k
    y_bar += (start + lane)[None, :].to(tl.int64) * outs * UNIT + out
    total = tl.zeros((BLOCK_OUTS, BLOCK_DEPTH), parts.dtype.element_ty)
    last = tl.minimum(start + steps * BLOCK_ROWS, rows)
    for row in range(start, last, BLOCK_ROWS):
        inside = lane < rows - row
        i = tl.where(inside[:, None], first, count) + k
        b = tl.load(x, (i >= 0) & (i < count) & (k < depth), 0.0)
        a = tl.load(y_bar, (out < outs * UNIT) & inside[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
        x += channels * (BLOCK_ROWS * UNIT)
        y_bar += outs * (BLOCK_ROWS * UNIT)
        first += step
        first -= tl.where(first < end, 0, count)
    part = (split.to(tl.int64) * outs * UNIT + out) * depth + k
    tl.store(parts + part, total, (out < outs * UNIT) & (k < depth))


def weight_sums(y_bar: Tensor, x: Tensor, taps: int) -> Tensor:
    """Return the gradient of a weight over windows of x, (O, C, K), in the dtype of sums."""
    outs, channels = y_bar.shape[2], x.shape[2]
    if x.numel() == 0 or y_bar.numel() == 0:
        return x.new_zeros(outs, channels, taps, dtype=work_dtype(x))
    x, y_bar = x.contiguous(), y_bar.contiguous()
    starts = [t.data_ptr() // t.element_size() for t in (x, y_bar)]
    unit = math.gcd(16 // x.element_size(), channels, outs, *starts)
    rows, depth = x.shape[0] * x.shape[1], taps * channels
    options, splits = tuning.conv1d_weight(rows, outs, depth, x.element_size())
    parts = x.new_empty(splits, outs, taps, channels, dtype=work_dtype(x))
    blocks = cdiv(outs, options["BLOCK_OUTS"]) * cdiv(depth, options["BLOCK_DEPTH"])
    launch(
        _conv1d_bwd_weight_kernel,
        (blocks, splits),
        *(x, y_bar, parts, rows, x.shape[1], channels // unit, taps, outs // unit),
        cdiv(cdiv(rows, options["BLOCK_ROWS"]), splits),
        UNIT=unit,
        PRECISION=precision(),
        **options,
    )
    return (parts.sum(0) if splits > 1 else parts[0]).transpose(1, 2)


def fwd_streams(
    x: list[Tensor], weight: list[Tensor], bias: list[Tensor | None], dilation: int
) -> Any:
    """Launch the values."""
    if dilation > 1:
        return NotImplemented
    return project(x, [w.transpose(1, 2) for w in weight], bias, [0] * len(x), False)


def jvp_streams(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor | None],
    x_dot: list[Tensor | None],
    dilation: int,
) -> Any:
    """Launch values and tangents."""
    if dilation > 1 or not takes(x):
        return NotImplemented
    packed = [w.transpose(1, 2).contiguous() for w in weight]
    moving = [i for i, dot in enumerate(x_dot) if dot is not None]
    results = project(
        [*x, *(dot for dot in x_dot if dot is not None)],
        [*packed, *(packed[i] for i in moving)],
        [*bias, *(None for _ in moving)],
        [0] * (len(x) + len(moving)),
        False,
    )
    ys, dots = results[: len(x)], iter(results[len(x) :])
    return ys, [
        torch.zeros_like(y) if dot is None else next(dots) for y, dot in zip(ys, x_dot, strict=True)
    ]


def bwd_streams(
    y_bar: list[Tensor], x: list[Tensor], weight: list[Tensor], dilation: int, needs: list[bool]
) -> Any:
    """Launch the gradients that are needed; those of weights one after the other."""
    if dilation > 1 or not takes(x) or not takes(y_bar):
        return NotImplemented
    x_bar, weight_bar, bias_bar = ([t.new_empty(0) for t in x] for _ in needs)
    if needs[0]:
        turned = [w.flip(2).permute(1, 2, 0) for w in weight]
        x_bar = project(y_bar, turned, [None] * len(x), [0] * len(x), False)
    if needs[1]:
        triples = zip(y_bar, x, weight, strict=True)
        sums = [weight_sums(bar, t, w.shape[2]) for bar, t, w in triples]
        weight_bar = [w.new_empty(w.shape).copy_(one) for w, one in zip(weight, sums, strict=True)]
    if needs[2]:
        bias_bar = [bar.sum((0, 1), dtype=work_dtype(bar)).to(bar.dtype) for bar in y_bar]
    return x_bar, weight_bar, bias_bar


fwd, jvp, bwd = of_one(fwd_streams, jvp_streams, bwd_streams)
