"""Triton kernel of `snake`: the value in one pass over memory.

In the two phases of the doubled rate, with f the taps and with x, even and odd continued beyond
their ends by the values there,

    even[i] = act(2 sum_j f[2j+1] x[i+2-j]),   odd[i] = act(2 sum_j f[2j] x[i+3-j]),     j = 0..5
    y[i]    = sum_j f[2j+1] even[i+j-2] + f[2j] odd[i+j-3].

The arithmetic, not memory, is its limit, and most of it is the sine. A lane therefore makes 8
outputs in a row from 13 activated samples of each phase (a sample of z is activated 1.6 times, not
6), all in registers: no exchange between lanes, which Triton has no cheap form of, and no matrix
unit, whose rounding of its operands would show in float32. It loads one sample at a time
(neighbours share cache lines, and no alignment is asked of a row) and joins its outputs, so that
they are stored together. Tangent and gradient, which making sound does not need, are PyTorch
formulas.
"""

from __future__ import annotations

from typing import Any  # noqa: F401 - for mypy, in comments that Triton does not read

from torch import Tensor

from mfmjt.kernels._filter import FILTER
from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import wide
from mfmjt.kernels.triton.launching import View, dense

__all__ = ["fwd"]


@jit
def _sine_squared(turns):
    """Return sin(pi turns)^2; in float32 by the minimax polynomial of sin(pi r) / r, to 2e-7."""
    if turns.dtype == tl.float64:
        s = tl.sin(turns * 3.141592653589793)
        return s * s
    else:
        # Adding 1.5 * 2^23 and taking it away rounds to an integer. Beyond 2^22 turns r is noise;
        # its square is kept bounded, and NaN a NaN.
        r = turns - ((turns + 12582912.0) - 12582912.0)
        z = tl.minimum(r * r, 0.25, propagate_nan=tl.PropagateNan.ALL)
        p = 0.07756034 * z - 0.5982421
        p = p * z + 2.5500698
        p = p * z - 5.1677097
        p = p * z + 3.1415927
        return z * (p * p)


@jit
def _activated(x, at: tl.constexpr, frequency, height, TAPS: tl.constexpr, PHASE: tl.constexpr):
    """Activate an even (PHASE 1) or odd (PHASE 0) sample of z, made of x[at : at + 6]."""
    z = x[at] * (2 * TAPS[10 + PHASE])
    for j in tl.static_range(1, 6):
        z += x[at + j] * (2 * TAPS[10 + PHASE - 2 * j])
    return z + height * _sine_squared(z * frequency)


@jit
def _filtered(
    x,  # pointers to each lane's row, or to that of all
    first,  # position of each lane's first output
    length,
    frequency,
    height,
    TAPS: tl.constexpr,
    EDGE: tl.constexpr,  # whether a lane may reach beyond the row
):
    """Compute 8 outputs of each lane, (lanes, 8)."""
    w = ()  # type: Any  # x from first - 5 on
    for i in tl.static_range(18):
        at = first + (i - 5)
        if EDGE:
            at = tl.minimum(tl.maximum(at, 0), length - 1)
        w += (wide(tl.load(x + at)),)
    if EDGE:  # the first and the last activated sample, which continue the signal
        one, two, last = tl.minimum(1, length - 1), tl.minimum(2, length - 1), x + (length - 1)
        a, b, c = wide(tl.load(x)), wide(tl.load(x + one)), wide(tl.load(x + two))
        left = _activated((a, a, a, a, b, c), 0, frequency, height, TAPS, 1)
        a, b, c = wide(tl.load(last)), wide(tl.load(last - one)), wide(tl.load(last - two))
        right = _activated((c, b, a, a, a, a), 0, frequency, height, TAPS, 0)
    even = ()  # type: Any  # from first - 2 on
    odd = ()  # type: Any  # from first - 3 on
    for i in tl.static_range(13):
        e = _activated(w, i, frequency, height, TAPS, 1)
        o = _activated(w, i, frequency, height, TAPS, 0)
        if EDGE:
            e = tl.where(first + (i - 2) < length, e, right)
            o = tl.where(first + (i - 3) < length, o, right)
            if i < 2:
                e = tl.where(first + (i - 2) < 0, left, e)
            if i < 3:
                o = tl.where(first + (i - 3) < 0, left, o)
        even += (e,)
        odd += (o,)
    y = ()  # type: Any
    for i in tl.static_range(8):
        total = even[i] * TAPS[1] + odd[i] * TAPS[0]
        for j in tl.static_range(1, 6):
            total += even[i + j] * TAPS[2 * j + 1]
            total += odd[i + j] * TAPS[2 * j]
        y += (total,)
    y_even = tl.join(tl.join(y[0], y[4]), tl.join(y[2], y[6]))
    y_odd = tl.join(tl.join(y[1], y[5]), tl.join(y[3], y[7]))
    return tl.reshape(tl.join(y_even, y_odd), (first.shape[0], 8))


@jit
def _row(x, alpha, beta, row, channels):
    """Return where a row of x begins, and the frequency, in half turns, and height of its sine."""
    work: tl.constexpr = tl.float64 if x.pointer.dtype.element_ty == tl.float64 else tl.float32
    channel = row % channels
    at = (row // channels).to(tl.int64) * x.sample + channel.to(tl.int64) * x.token
    frequency = tl.exp(tl.load(alpha + channel).to(work)) * 0.3183098861837907
    return x.pointer + at, frequency, 1 / (tl.exp(tl.load(beta + channel).to(work)) + 1e-9)


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
    LANES: tl.constexpr,
):
    lanes = tl.cdiv(length, 8)  # of a row
    begin = tl.program_id(0) * LANES  # lanes are counted over all rows
    row, start = begin // lanes, begin % lanes * 8
    eight = tl.arange(0, 8)[None, :]
    if (start >= 5) & (start + LANES * 8 + 5 <= length):  # all within one row
        samples, frequency, height = _row(x, alpha, beta, row, channels)
        first = start + tl.arange(0, LANES) * 8
        inner = _filtered(samples, first, length, frequency, height, TAPS, False)
        tl.store(y + row.to(tl.int64) * length + (first[:, None] + eight), inner)
    else:
        lane = begin + tl.arange(0, LANES)
        rows, at = tl.minimum(lane // lanes, n_rows - 1), lane % lanes * 8
        xs, frequencies, heights = _row(x, alpha, beta, rows, channels)
        outer = _filtered(xs, at, length, frequencies, heights, TAPS, True)
        out = at[:, None] + eight
        exists = (lane < n_rows * lanes)[:, None] & (out < length)
        tl.store(y + rows.to(tl.int64)[:, None] * length + out, outer, exists)


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
        LANES=lanes,
        num_warps=num_warps,
    )
    return y
