"""Triton kernels of `snake`: the value in one pass over memory, of rows or of channels-last blocks.

In the two phases of the doubled rate, with f the taps and with x, even and odd continued beyond
their ends by the values there,

    even[i] = act(2 sum_j f[2j+1] x[i+2-j]),   odd[i] = act(2 sum_j f[2j] x[i+3-j]),     j = 0..5
    y[i]    = sum_j f[2j+1] even[i+j-2] + f[2j] odd[i+j-3].

The arithmetic, not memory, is its limit. A lane therefore makes a run of outputs in registers, from
5 more activated samples of each phase than that: no exchange between lanes, which Triton has no
cheap form of, and no matrix unit, whose rounding of its operands would show in float32.

Of a row a lane has 8 outputs (a sample of z is activated 1.6 times, not 6). It loads one sample at
a time (neighbours share cache lines, and no alignment is asked of a row) and joins its outputs, so
that they are stored together. Channels last, neighbours have the next channels, and a run is 8 to
64 outputs, 8 at a time: what the next 8 share with these stays in registers.

In bfloat16 and float16 NVIDIA's unit for cosines does the activation in 7 instructions instead of
13; in float32 its error would show. An output takes 49 instructions on sm_90 channels last, 74 of a
row, and about 100 in float32. Tangent and gradient, which making sound does not need, are PyTorch
formulas.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._filter import FILTER
from mfmjt.kernels.triton import cdiv, jit, target, tl, tuning
from mfmjt.kernels.triton.device import choose, fma, wide
from mfmjt.kernels.triton.launching import View, dense, launch
from mfmjt.kernels.triton.product import takes

__all__ = ["activate", "fwd"]

_INTERPRETED = tl.constexpr(INTERPRETED)


@jit
def _cosine(x):
    """Return cos x by NVIDIA's unit, to 2^-20 for |x| <= pi; there is no such one to interpret."""
    if _INTERPRETED:
        return tl.cos(x)
    else:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def _wave(z, frequency, height, FAST: tl.constexpr):
    """Return z + height sin(pi frequency z)^2; where FAST, less height / 2.

    FAST is by sin(x)^2 = (1 - cos 2x) / 2, with an absolute error of 2^-21 height. In float32 the
    minimax polynomial of sin(pi r) / r errs by 2e-7.
    """
    # Adding 1.5 * 2^23 and taking it away rounds to an integer. Beyond 2^22 turns r is noise.
    if FAST:
        r = fma(z, frequency, 12582912.0 - fma(z, frequency, 12582912.0))
        return fma(_cosine(r * 6.283185307179586), -0.5 * height, z)
    elif z.dtype == tl.float64:
        s = tl.sin(z * frequency * 3.141592653589793)
        return z + height * (s * s)
    else:
        turns = z * frequency
        r = turns - ((turns + 12582912.0) - 12582912.0)
        # Noise or not, its square is kept bounded, and NaN a NaN.
        u = tl.minimum(r * r, 0.25, propagate_nan=tl.PropagateNan.ALL)
        p = 0.07756034 * u - 0.5982421
        p = p * u + 2.5500698
        p = p * u - 5.1677097
        p = p * u + 3.1415927
        return z + height * (u * (p * p))


@jit
def _activated(
    x, at: tl.constexpr, frequency, height, TAPS: tl.constexpr, PHASE: tl.constexpr, FAST
):
    """Activate an even (PHASE 1) or odd (PHASE 0) sample of z, made of x[at : at + 6]."""
    z = x[at] * (2 * TAPS[10 + PHASE])
    for j in tl.static_range(1, 6):
        z += x[at + j] * (2 * TAPS[10 + PHASE - 2 * j])
    return _wave(z, frequency, height, FAST)


@jit
def _loaded(x, step, at, length, COUNT: tl.constexpr, EDGE: tl.constexpr):
    """Return samples at, at + 1, ... of each lane; the nearest one beyond the ends."""
    w = ()  # type: Any
    begin = x + at * step
    for i in tl.static_range(COUNT):
        if EDGE:
            w += (wide(tl.load(x + tl.minimum(tl.maximum(at + i, 0), length - 1) * step)),)
        else:
            w += (wide(tl.load(begin + i * step)),)
    return w


@jit
def _ends(x, step, length, frequency, height, TAPS: tl.constexpr, FAST: tl.constexpr):
    """Return the first and the last activated sample, which continue the signal."""
    one, two = tl.minimum(1, length - 1) * step, tl.minimum(2, length - 1) * step
    last = x + (length - 1) * step
    a, b, c = wide(tl.load(x)), wide(tl.load(x + one)), wide(tl.load(x + two))
    left = _activated((a, a, a, a, b, c), 0, frequency, height, TAPS, 1, FAST)
    a, b, c = wide(tl.load(last)), wide(tl.load(last - one)), wide(tl.load(last - two))
    return left, _activated((c, b, a, a, a, a), 0, frequency, height, TAPS, 0, FAST)


@jit
def _phases(
    w,  # samples from position at - 3 on, 5 more than COUNT
    at,
    length,
    ends,  # of `_ends`, or None where no lane reaches beyond them
    frequency,
    height,
    TAPS: tl.constexpr,
    COUNT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Return even samples at, at + 1, ... of each lane, and odd ones at - 1, at, ..."""
    even = ()  # type: Any
    odd = ()  # type: Any
    for i in tl.static_range(COUNT):
        e = _activated(w, i, frequency, height, TAPS, 1, FAST)
        o = _activated(w, i, frequency, height, TAPS, 0, FAST)
        if ends is not None:
            e = tl.where(at + i < 0, ends[0], tl.where(at + i < length, e, ends[1]))
            o = tl.where(at + i < 1, ends[0], tl.where(at + i - 1 < length, o, ends[1]))
        even += (e,)
        odd += (o,)
    return even, odd


@jit
def _down(even, odd, height, TAPS: tl.constexpr, FAST: tl.constexpr):
    """Return outputs, 5 fewer than samples of either phase."""
    y = ()  # type: Any
    for i in tl.static_range(len(even) - 5):
        if FAST:  # what `_wave` leaves out; the taps add up to one
            total = even[i] * TAPS[1] + 0.5 * height
            total += odd[i] * TAPS[0]
        else:
            total = even[i] * TAPS[1] + odd[i] * TAPS[0]
        for j in tl.static_range(1, 6):
            total += even[i + j] * TAPS[2 * j + 1]
            total += odd[i + j] * TAPS[2 * j]
        y += (total,)
    return y


@jit
def _filtered(
    x,  # pointers to each lane's row, or to that of all
    first,  # position of each lane's first output
    length,
    frequency,
    height,
    TAPS: tl.constexpr,
    EDGE: tl.constexpr,  # whether a lane may reach beyond the row
    FAST: tl.constexpr,
):
    """Compute 8 outputs of each lane, (lanes, 8)."""
    ends = None
    if EDGE:
        ends = _ends(x, 1, length, frequency, height, TAPS, FAST)
    w = _loaded(x, 1, first - 5, length, 18, EDGE)
    even, odd = _phases(w, first - 2, length, ends, frequency, height, TAPS, 13, FAST)
    y = _down(even, odd, height, TAPS, FAST)
    y_even = tl.join(tl.join(y[0], y[4]), tl.join(y[2], y[6]))
    y_odd = tl.join(tl.join(y[1], y[5]), tl.join(y[3], y[7]))
    return tl.reshape(tl.join(y_even, y_odd), (first.shape[0], 8))


@jit
def _parameters(alpha, beta, channel, work: tl.constexpr):
    """Return the frequency, in half turns, and the height of a channel's sine."""
    frequency = tl.exp(tl.load(alpha + channel).to(work)) * 0.3183098861837907
    return frequency, 1 / (tl.exp(tl.load(beta + channel).to(work)) + 1e-9)


@jit
def _row(x, alpha, beta, row, channels):
    """Return where a row of x begins, and its sine."""
    work: tl.constexpr = tl.float64 if x.pointer.dtype.element_ty == tl.float64 else tl.float32
    channel = row % channels
    at = (row // channels).to(tl.int64) * x.sample + channel.to(tl.int64) * x.token
    frequency, height = _parameters(alpha, beta, channel, work)
    return x.pointer + at, frequency, height


@jit
def _snake_fwd_kernel(
    x,  # a `View` with channels for tokens
    alpha,
    beta,
    y,
    n_rows,
    channels,
    length,
    TAPS: tl.constexpr,
    FAST: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes = tl.cdiv(length, 8)  # of a row
    begin = tl.program_id(0) * LANES  # lanes are counted over all rows
    row, start = begin // lanes, begin % lanes * 8
    eight = tl.arange(0, 8)[None, :]
    if (start >= 5) & (start + LANES * 8 + 5 <= length):  # all within one row
        samples, frequency, height = _row(x, alpha, beta, row, channels)
        first = start + tl.arange(0, LANES) * 8
        inner = _filtered(samples, first, length, frequency, height, TAPS, False, FAST)
        tl.store(y + row.to(tl.int64) * length + (first[:, None] + eight), inner)
    else:
        lane = begin + tl.arange(0, LANES)
        rows, at = tl.minimum(lane // lanes, n_rows - 1), lane % lanes * 8
        xs, frequencies, heights = _row(x, alpha, beta, rows, channels)
        outer = _filtered(xs, at, length, frequencies, heights, TAPS, True, FAST)
        out = at[:, None] + eight
        exists = (lane < n_rows * lanes)[:, None] & (out < length)
        tl.store(y + rows.to(tl.int64)[:, None] * length + out, outer, exists)


@jit
def _run(
    x,  # pointers to each lane's channel
    y,
    first,  # position of each lane's first output
    exists,
    length,
    channels,
    frequency,
    height,
    TAPS: tl.constexpr,
    RUN: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Compute and store a run of outputs of each lane, STEP at a time."""
    ends = None
    if EDGE:
        ends = _ends(x, channels, length, frequency, height, TAPS, FAST)
    w = _loaded(x, channels, first - 5, length, 10, EDGE)
    even, odd = _phases(w, first - 2, length, ends, frequency, height, TAPS, 5, FAST)
    w = w[5:]
    for start in range(0, RUN, STEP):
        at = first + start
        w += _loaded(x, channels, at + 5, length, STEP, EDGE)
        e, o = _phases(w, at + 3, length, ends, frequency, height, TAPS, STEP, FAST)
        even += e
        odd += o
        outs = _down(even, odd, height, TAPS, FAST)
        out = y + at * channels
        for i in tl.static_range(STEP):
            if EDGE:
                tl.store(out + i * channels, outs[i], exists & (at + i < length))
            else:
                tl.store(out + i * channels, outs[i])
        w, even, odd = w[STEP:], even[STEP:], odd[STEP:]


@jit
def _snake_last_kernel(
    xs,
    alphas,
    betas,
    ys,
    samples,
    length,
    units,  # of channels
    TAPS: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,  # channels of an aligned load
    RUN: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    block = tl.program_id(1)
    x, y = choose(xs, block), choose(ys, block)
    work: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels, runs = units * UNIT, tl.cdiv(length, RUN)
    begin = tl.program_id(0) * LANES  # lanes are counted over channels, runs and samples
    lane = begin + tl.arange(0, LANES)
    channel, run = lane % channels, lane // channels
    channel = tl.max_contiguous(tl.multiple_of(channel, UNIT), UNIT)
    alpha, beta = choose(alphas, block), choose(betas, block)
    frequency, height = _parameters(alpha, beta, channel, work)
    exists = run < samples * runs
    sample, first = tl.minimum(run // runs, samples - 1), run % runs * RUN
    at = (sample.to(tl.int64) * length) * channels + channel
    a, b = begin // channels, (begin + LANES - 1) // channels  # the program's first run, its last
    inner = (a // runs == b // runs) & (a % runs > 0) & (b < samples * runs)
    if inner & ((b % runs + 1) * RUN + 5 <= length):
        _run(
            *(x + at, y + at, first, exists, length, channels, frequency, height),
            *(TAPS, RUN, STEP, False, FAST),
        )
    else:
        _run(
            *(x + at, y + at, first, exists, length, channels, frequency, height),
            *(TAPS, RUN, STEP, True, FAST),
        )


def _fast(x: Tensor) -> bool:
    """Return True if the unit for cosines is there, and exact enough."""
    return target()[0] == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def fwd(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Run the kernel for the value."""
    y = x.new_empty(x.shape)
    x = dense(x)
    batch, channels, length = x.shape
    n_rows = batch * channels
    lanes, num_warps = tuning.snake()
    _snake_fwd_kernel[(cdiv(n_rows * cdiv(length, 8), lanes),)](
        View(x, x.stride(0), x.stride(1)),
        alpha.contiguous(),
        beta.contiguous(),
        y,
        n_rows,
        channels,
        length,
        TAPS=FILTER,
        FAST=_fast(x),
        LANES=lanes,
        num_warps=num_warps,
    )
    return y


def activate(xs: list[Tensor], alphas: list[Tensor], betas: list[Tensor]) -> Any:
    """Run the channels-last kernel for the values of all (B, N, C) of one shape."""
    if not takes(xs):
        return NotImplemented
    packed = [[t.contiguous() for t in given] for given in (xs, alphas, betas)]
    ys = [x.new_empty(x.shape) for x in packed[0]]
    samples, length, channels = xs[0].shape
    options = tuning.snake_last(length, len(xs) * xs[0].numel())
    lanes = samples * cdiv(length, options["RUN"]) * channels
    unit = math.gcd(2, channels, *(x.data_ptr() // x.element_size() for x in packed[0]))
    launch(
        _snake_last_kernel,
        (cdiv(lanes, options["LANES"]), len(xs)),
        *(*packed, ys, samples, length, channels // unit),
        TAPS=FILTER,
        FAST=_fast(xs[0]),
        UNIT=unit,
        **options,
    )
    return ys
