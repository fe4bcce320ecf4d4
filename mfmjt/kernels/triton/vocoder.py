"""Triton kernels of `vocoder`: convolutions of a stage's residual blocks, channels last.

    y_j = x_j * W_j + b_j (+ r_j)   or   y = (sum over j of x_j * W_j + b_j + r_j) / blocks

A product without an im2col: rows are samples, the contraction runs over taps and channels. The
blocks have kernels of different lengths, and their programs share a launch, the longest first. A
sum over blocks is one program's longer contraction. Channels are 3 times a power of two, so a
program has two sums side by side, of 128 and of 64 channels: no column is computed for nothing.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import choose
from mfmjt.kernels.triton.launching import launch
from mfmjt.kernels.triton.product import precision, takes

__all__ = ["convolve", "upsample"]


_FAR = tl.constexpr(1 << 29)  # tokens that no window reaches


@jit
def _contracted(
    total,  # (R, O)
    more,  # (R, P)
    x,  # pointers (R, 1) to each row's first channel
    token,  # (R, 1)
    length,
    weight,
    taps,
    begin,  # of the window: tokens from its row
    dilation,
    out,  # (1, O)
    other,  # (1, P)
    C: tl.constexpr,
    OUTS: tl.constexpr,
    TAP_STEP: tl.constexpr,  # elements from a tap's weights to the next tap's
    MORE: tl.constexpr,  # whether there is a second sum
    UNIT: tl.constexpr,  # elements of an aligned load
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add products of windows and filters to the sums."""
    depth = taps * C
    size = length.to(tl.uint32)
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        tap = k // C
        channel = tl.max_contiguous(tl.multiple_of(k - tap * C, UNIT), UNIT)
        here = k < depth
        at = begin + tap * dilation
        # Before the first token is far beyond the last one, unsigned
        place = (token + tl.where(here, at, _FAR)[None, :]).to(tl.uint32, bitcast=True)
        a = tl.load(x + (at * C + channel)[None, :], place < size, 0.0)
        column = (tap * TAP_STEP + channel)[:, None]
        b = tl.load(weight + (column + out * C), here[:, None] & (out < OUTS), 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
        if MORE:
            b = tl.load(weight + (column + other * C), here[:, None] & (other < OUTS), 0.0)
            more = tl.dot(a, b, more, input_precision=PRECISION, out_dtype=total.dtype)
    return total, more


@jit
def _finish(
    total,
    xs,
    y,
    biases,
    residuals,
    branch,
    at,  # of each row in y, (R, 1)
    inside,
    out,
    OUTS: tl.constexpr,
    BIASES: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Add biases and residuals, those of all branches and divide for a mean, and store."""
    exists = inside & (out < OUTS)
    if MEAN:
        for j in tl.static_range(len(xs)):
            if biases is not None:
                total += tl.load(biases[j] + out % BIASES, out < OUTS, 0.0).to(total.dtype)
            if residuals is not None:
                total += tl.load(residuals[j] + at + out, exists, 0.0).to(total.dtype)
        total /= len(xs)
    else:
        if biases is not None:
            b = tl.load(choose(biases, branch) + out % BIASES, out < OUTS, 0.0)
            total += b.to(total.dtype)
        if residuals is not None:
            r = tl.load(choose(residuals, branch) + at + out, exists, 0.0)
            total += r.to(total.dtype)
    tl.store(y + at + out, total, exists)


@jit
def _convolve_kernel(
    xs,
    weights,
    biases,
    residuals,  # or None
    ys,
    taps,
    begins,
    dilation,
    rows,
    length,
    C: tl.constexpr,
    OUTS: tl.constexpr,
    BIASES: tl.constexpr,  # outputs after which biases repeat
    TAP_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,  # elements from a row of y to the next
    MEAN: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_MORE: tl.constexpr,  # 0 for one sum
    BLOCK_DEPTH: tl.constexpr,
):
    STORED: tl.constexpr = ys[0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    BLOCKS: tl.constexpr = (OUTS + BLOCK_OUTS + BLOCK_MORE - 1) // (BLOCK_OUTS + BLOCK_MORE)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * BLOCKS  # neighbours read the same rows
    branch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = (tile // BLOCKS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    inside = row < rows
    token = tl.where(inside, row % length, _FAR)
    out = (tile % BLOCKS) * (BLOCK_OUTS + BLOCK_MORE) + tl.arange(0, BLOCK_OUTS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTS), TYPE)
    other, more = out, total
    if BLOCK_MORE:
        other = (tile % BLOCKS) * (BLOCK_OUTS + BLOCK_MORE) + BLOCK_OUTS
        other += tl.arange(0, BLOCK_MORE)[None, :]
        more = tl.zeros((BLOCK_ROWS, BLOCK_MORE), TYPE)
    at = row.to(tl.int64)
    if MEAN:
        for j in tl.static_range(len(xs)):
            total, more = _contracted(
                *(total, more, xs[j] + at * C, token, length, weights[j], taps[j], begins[j]),
                *(dilation, out, other, C, OUTS, TAP_STEP, BLOCK_MORE > 0),
                *(UNIT, BLOCK_DEPTH, PRECISION),
            )
    else:
        weight = choose(weights, branch)
        total, more = _contracted(
            *(total, more, choose(xs, branch) + at * C, token, length, weight),
            *(choose(taps, branch), choose(begins, branch), dilation, out, other),
            *(C, OUTS, TAP_STEP, BLOCK_MORE > 0, UNIT, BLOCK_DEPTH, PRECISION),
        )
    y, at = choose(ys, branch), at * Y_STEP
    _finish(total, xs, y, biases, residuals, branch, at, inside, out, OUTS, BIASES, MEAN)
    if BLOCK_MORE:
        _finish(more, xs, y, biases, residuals, branch, at, inside, other, OUTS, BIASES, MEAN)


def _run(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor] | None,
    residuals: list[Tensor] | None,
    ys: list[Tensor],
    taps: list[int],
    begins: list[int],
    outs: int,
    dilation: int = 1,
    tap_step: int | None = None,
    mean: bool = False,
) -> None:
    samples, length, channels = xs[0].shape
    options = tuning.vocoder(outs, xs[0].element_size())
    width = options["BLOCK_OUTS"] + options["BLOCK_MORE"]
    tiles = cdiv(samples * length, options["BLOCK_ROWS"]) * cdiv(outs, width)
    starts = [t.data_ptr() // t.element_size() for t in (*xs, *weights)]
    launch(
        _convolve_kernel,
        (tiles * len(ys),),
        *(xs, weights, biases, residuals, ys, taps, begins, dilation, samples * length, length),
        C=channels,
        OUTS=outs,
        BIASES=biases[0].shape[0] if biases else 1,
        TAP_STEP=outs * channels if tap_step is None else tap_step,
        Y_STEP=ys[0].stride(1),
        MEAN=mean,
        UNIT=math.gcd(16 // xs[0].element_size(), channels, *starts),
        PRECISION=precision(),
        **options,
    )


def convolve(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    dilation: int,
    residuals: list[Tensor],
    mean: bool,
) -> Any:
    """Launch convolutions of (B, N, C) with weights (O, C, K)."""
    if not takes(xs):
        return NotImplemented
    outs, taps = weights[0].shape[0], [weight.shape[2] for weight in weights]
    order = sorted(range(len(xs)), key=lambda j: -taps[j])  # the longest first
    taps = [taps[j] for j in order]
    packed, added, inputs = (
        [given[j].contiguous() for j in order] if given else None
        for given in (biases, residuals, xs)
    )
    filters = [weights[j].permute(2, 0, 1).contiguous() for j in order]
    ys = [xs[0].new_empty(*xs[0].shape[:2], outs) for _ in (xs[:1] if mean else xs)]
    begins = [-dilation * (n // 2) for n in taps]
    _run(inputs or [], filters, packed, added, ys, taps, begins, outs, dilation, mean=mean)
    return ys if mean else [ys[order.index(j)] for j in range(len(xs))]


def upsample(x: Tensor, weight: Tensor, bias: Tensor, rate: int) -> Any:
    """Launch both halves of a transposed convolution of (B, N, C) with a weight (C, O, 2 rate).

    With p of 0 .. rate/2 - 1, output rate n + p takes tap p + 3/2 rate from token n - 1 and
    p + rate/2 from n; output rate n + rate/2 + p takes p + rate from n and p from n + 1.
    """
    if not takes([x]):
        return NotImplemented
    x, filters, half = x.contiguous(), weight.permute(2, 1, 0).contiguous(), rate // 2
    batch, length, channels = x.shape
    outs = bias.shape[0]
    y = x.new_empty(batch, length, rate * outs)
    _run(
        *([x, x], [filters[half + rate :], filters[rate:]], [bias.contiguous()] * 2, None),
        *([y, y[..., half * outs :]], [2, 2], [-1, 0], half * outs),
        tap_step=-rate * outs * channels,
    )
    return y.view(batch, length * rate, outs)
