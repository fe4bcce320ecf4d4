"""Anti-aliased SnakeBeta of BigVGAN: up to twice the rate, a periodic activation, back down.

    value      z = U x,  a = e^alpha,  c = 1 / (e^beta + 1e-9),  y = D (z + c sin^2(a z))
    tangent    y_dot = D (s (U x_dot)),  s = 1 + a c sin(2 a z)
    cotangent  g = D^T y_bar,  x_bar = U^T (s g),  alpha_bar = sum(g a c z sin(2 a z)),
               beta_bar = -sum(g sin^2(a z)) c^2 e^beta

x (B, C, N) as vocoders have it, alpha and beta (C) on a log scale. U and D are the 12-tap
Kaiser-sinc filters of Alias-Free GAN with edges repeated; the taps are symmetric, so without its
edges U^T is 2 D. Stored in the dtype of x, computed in float32 (float64 for float64). Kept for
backward: x, alpha, beta.

The Triton kernel computes the value in one pass over memory. In the two phases of the doubled rate,
with f the taps and x, even, odd continued by what their ends are repeated with,

    even[i] = act(2 sum_j f[2j+1] x[i+2-j]),   odd[i] = act(2 sum_j f[2j] x[i+3-j]),     j = 0..5
    y[i]    = sum_j f[2j+1] even[i+j-2] + f[2j] odd[i+j-3].

The arithmetic, not memory, is its limit, and most of it is the sine. A lane therefore makes 8
outputs in a row from 13 activated samples of each phase (a sample of z is activated 1.6 times, not
6), all in registers: no exchange between lanes, which Triton has no cheap form of, and no matrix
unit, whose rounding of its operands would show in float32. It loads one sample at a time
(neighbours share cache lines, and no alignment is asked of a row) and joins its outputs, so that
they are stored together. Tangent and gradient, which making sound does not need, are the PyTorch
formulas below.

Away from the fused kernels the filters are products of blocks of the signal with small banded
matrices: 36 ms against 68 ms for grouped convolutions and 297 ms for single-channel ones, for
(1, 96, 32000) in float32 on one thread of a Zen 4 server.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _op, _tuning
from mfmjt.kernels._triton import cdiv, jit, tl, wide

__all__ = ["snake", "snake_ref", "taps"]

_TAPS = 12
_BLOCK = 16  # tokens of x a row of the banded product makes; 8 and 32 are slower
_CHUNK = 2**18  # elements of z worked on at a time, so that they stay in a core's cache


def _filter() -> tuple[float, ...]:
    """Kaiser-windowed sinc low-pass at half the doubled rate's Nyquist frequency, sum one."""
    half_width, cutoff, half = 0.3, 0.25, _TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB; this is 51
    window = torch.kaiser_window(_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(-half, half, dtype=torch.float64) + 0.5
    taps = window * torch.sinc(2 * cutoff * time)
    return tuple((taps / taps.sum()).tolist())


_FILTER = _filter()


def taps(x: Tensor) -> Tensor:
    """Return the filter (12,) in the dtype and on the device of x.

    Kept, because numbers come to a GPU by a copy that the host waits for: a CUDA graph refuses it.
    What is made for a compiler, a mode or a subclass must not outlive it, and is not kept.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return x.new_tensor(_FILTER)
    if torch._C._len_torch_dispatch_stack():
        return x.new_tensor(_FILTER)
    return _kept_taps(x.dtype, x.device)


@functools.lru_cache
def _kept_taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor of no functorch level, and one that may be saved for backward
    with torch._C._DisableFuncTorch(), torch.inference_mode(False):
        return torch.tensor(_FILTER, dtype=dtype, device=device)


def snake_ref(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Plain PyTorch `snake`; the definition of correct."""
    channels = x.shape[1]
    filters = taps(x).expand(channels, 1, -1)
    up = F.conv_transpose1d(
        F.pad(x, (5, 5), mode="replicate"), 2 * filters, stride=2, groups=channels
    )[..., 15:-15]
    frequency, height = alpha.exp()[:, None], 1 / (beta.exp()[:, None] + 1e-9)
    up = (up + height * torch.sin(up * frequency).square()).to(x.dtype)
    return F.conv1d(F.pad(up, (5, 6), mode="replicate"), filters, stride=2, groups=channels)


@functools.lru_cache
def _bands(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """U for one block, (_BLOCK + 6, 2 _BLOCK), and D, (2 _BLOCK + 10, _BLOCK)."""
    taps = _FILTER
    up, down = torch.zeros(_BLOCK + 6, 2 * _BLOCK), torch.zeros(2 * _BLOCK + 10, _BLOCK)
    up, down = up.double(), down.double()
    for n in range(_BLOCK):
        for k in range(_TAPS):
            down[2 * n + k, n] = taps[k]
            # Sample m of z takes tap k from sample (m + 5 - k) / 2 of x.
            m = 2 * n + (k + 1) % 2
            up[(m + 5 - k) // 2 + 3, m] = 2 * taps[k]
    return up.to(device, dtype), down.to(device, dtype)


def _blocks(x: Tensor, count: int, step: int, width: int) -> Tensor:
    """Overlapping windows of each row as the rows of one matrix; what lies beyond x is zero."""
    x = F.pad(x, (0, (count - 1) * step + width - x.shape[1]))
    return x.unfold(1, width, step).reshape(-1, width)


def _up(x: Tensor) -> Tensor:
    """Rows of 3 + n + 3 samples to rows of 2 n."""
    n = x.shape[1] - 6
    count = -(-n // _BLOCK)
    band = _bands(x.dtype, x.device)[0]
    z = _blocks(x, count, _BLOCK, _BLOCK + 6) @ band
    return z.view(x.shape[0], 2 * _BLOCK * count)[:, : 2 * n]


def _down(z: Tensor) -> Tensor:
    """Rows of 5 + 2 n + 5 samples to rows of n."""
    n = (z.shape[1] - 10) // 2
    count = -(-n // _BLOCK)
    band = _bands(z.dtype, z.device)[1]
    y = _blocks(z, count, 2 * _BLOCK, 2 * _BLOCK + 10) @ band
    return y.view(z.shape[0], _BLOCK * count)[:, :n]


def _repeat_edges(x: Tensor, width: int) -> Tensor:
    return F.pad(x[None], (width, width), mode="replicate")[0]


def _fold_edges(x: Tensor, width: int) -> Tensor:
    """The adjoint of `_repeat_edges`."""
    inner = x[:, width:-width]
    inner[:, 0] += x[:, :width].sum(1)
    inner[:, -1] += x[:, -width:].sum(1)
    return inner


def _rows(
    x: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], list[slice]]:
    """X as rows, the frequency, height and e^beta of each, and the chunks to work in."""
    work = _op.work_dtype(x)
    frequency, grown = alpha.to(work).exp(), beta.to(work).exp()
    height = 1 / (grown + 1e-9)
    batch, _, n = x.shape

    def column(t: Tensor) -> Tensor:
        return t.repeat(batch)[:, None]

    step = max(1, _CHUNK // (2 * n))
    rows = x.to(work).reshape(-1, n)
    chunks = [slice(a, a + step) for a in range(0, rows.shape[0], step)]
    return rows, (column(frequency), column(height), column(grown)), chunks


def _activate(z: Tensor, frequency: Tensor, height: Tensor) -> Tensor:
    return torch.mul(z, frequency).sin_().square_().mul_(height).add_(z)


def _fwd(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    out = y.view(-1, x.shape[2])
    rows, (frequency, height, _), chunks = _rows(x, alpha, beta)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        out[c] = _down(_repeat_edges(_activate(z, frequency[c], height[c]), 5))
    return y


def _jvp(x: Tensor, x_dot: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    y, y_dot = x.new_empty(x.shape), x.new_empty(x.shape)
    out, out_dot = y.view(-1, x.shape[2]), y_dot.view(-1, x.shape[2])
    rows, (frequency, height, _), chunks = _rows(x, alpha, beta)
    rows_dot = x_dot.to(rows.dtype).reshape(rows.shape)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        out[c] = _down(_repeat_edges(_activate(z, frequency[c], height[c]), 5))
        slope = (z * (2 * frequency[c])).sin_().mul_(frequency[c] * height[c]).add_(1)
        slope.mul_(_up(_repeat_edges(rows_dot[c], 3)))
        out_dot[c] = _down(_repeat_edges(slope, 5))
    return y, y_dot


def _bwd(y_bar: Tensor, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_bar = x.new_empty(x.shape)
    out = x_bar.view(-1, x.shape[2])
    rows, (frequency, height, grown), chunks = _rows(x, alpha, beta)
    rows_bar = y_bar.to(rows.dtype).reshape(rows.shape)
    alpha_bar, beta_bar = torch.empty_like(frequency), torch.empty_like(frequency)
    for c in chunks:
        z = _up(_repeat_edges(rows[c], 3))
        # D^T is U / 2 without its edges; the first sample of what comes out belongs to none.
        g = _up(F.pad(rows_bar[c], (6, 6))).mul_(0.5)[:, 1:-1]
        g = _fold_edges(g, 5)
        wave = (z * (2 * frequency[c])).sin_().mul_(frequency[c] * height[c])
        alpha_bar[c] = (wave * g).mul_(z).sum(1, keepdim=True)
        beta_bar[c] = (z * frequency[c]).sin_().square_().mul_(g).sum(1, keepdim=True)
        g = wave.add_(1).mul_(g)
        out[c] = _fold_edges(_down(F.pad(g, (11, 11))).mul_(2), 3)
    beta_bar.mul_(-height.square() * grown)
    channels = x.shape[1]
    return (
        x_bar,
        alpha_bar.view(-1, channels).sum(0).to(alpha.dtype),
        beta_bar.view(-1, channels).sum(0).to(beta.dtype),
    )


@jit
def _sine_squared(turns):
    """sin(pi turns)^2; in float32 by the minimax polynomial of sin(pi r) / r, to 2e-7 of it."""
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
    """The activation of an even (PHASE 1) or odd (PHASE 0) sample of z, from x[at : at + 6]."""
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
    """8 outputs of each lane, (lanes, 8)."""
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
def _row(x, alpha, beta, row, channels, sample_stride, channel_stride):
    """Where a row of x begins, and the frequency in half turns and the height of its sine."""
    work: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channel = row % channels
    x += (row // channels).to(tl.int64) * sample_stride + channel.to(tl.int64) * channel_stride
    frequency = tl.exp(tl.load(alpha + channel).to(work)) * 0.3183098861837907
    return x, frequency, 1 / (tl.exp(tl.load(beta + channel).to(work)) + 1e-9)


@jit
def _snake_fwd_kernel(
    x,
    alpha,
    beta,
    y,
    n_rows,
    channels,
    length,
    sample_stride,
    channel_stride,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes = tl.cdiv(length, 8)  # of a row
    begin = tl.program_id(0) * LANES  # lanes are counted over all rows
    row, start = begin // lanes, begin % lanes * 8
    eight = tl.arange(0, 8)[None, :]
    if (start >= 5) & (start + LANES * 8 + 5 <= length):  # all within one row
        x, frequency, height = _row(x, alpha, beta, row, channels, sample_stride, channel_stride)
        first = start + tl.arange(0, LANES) * 8
        inner = _filtered(x, first, length, frequency, height, TAPS, False)
        tl.store(y + row.to(tl.int64) * length + (first[:, None] + eight), inner)
    else:
        lane = begin + tl.arange(0, LANES)
        rows, at = tl.minimum(lane // lanes, n_rows - 1), lane % lanes * 8
        xs, frequencies, heights = _row(
            x, alpha, beta, rows, channels, sample_stride, channel_stride
        )
        outer = _filtered(xs, at, length, frequencies, heights, TAPS, True)
        out = at[:, None] + eight
        exists = (lane < n_rows * lanes)[:, None] & (out < length)
        tl.store(y + rows.to(tl.int64)[:, None] * length + out, outer, exists)


def _fwd_triton(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    x = x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
    batch, channels, length = x.shape
    n_rows = batch * channels
    lanes, num_warps = _tuning.snake()
    _snake_fwd_kernel[(cdiv(n_rows * cdiv(length, 8), lanes),)](
        x,
        alpha.contiguous(),
        beta.contiguous(),
        y,
        n_rows,
        channels,
        length,
        x.stride(0),
        x.stride(1),
        TAPS=_FILTER,
        LANES=lanes,
        num_warps=num_warps,
    )
    return y


_fwd_op = _op.define(
    "snake_fwd(Tensor x, Tensor alpha, Tensor beta) -> Tensor",
    _fwd,
    lambda x, *_: x.new_empty(x.shape),
    triton=_fwd_triton,
)
_jvp_op = _op.define(
    "snake_jvp(Tensor x, Tensor x_dot, Tensor alpha, Tensor beta) -> (Tensor, Tensor)",
    _jvp,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_bwd_op = _op.define(
    "snake_bwd(Tensor y_bar, Tensor x, Tensor alpha, Tensor beta) -> (Tensor, Tensor, Tensor)",
    _bwd,
    lambda y_bar, *inputs: tuple(t.new_empty(t.shape) for t in inputs),
)


def _jvp_backward(ctx: Any, y_bar: Tensor | None, y_dot_bar: Tensor | None) -> tuple[Any, ...]:
    y_bar = _op.refuse_gradient(y_bar, y_dot_bar)
    x_bar, alpha_bar, beta_bar = _bwd_op(y_bar, *ctx.saved_tensors)
    return x_bar, None, alpha_bar, beta_bar


_op.backward_of(
    _fwd_op,
    lambda ctx, y_bar: _bwd_op(y_bar, *ctx.saved_tensors),
    saves=lambda inputs, outputs: inputs,
    outputs=1,
)
_op.backward_of(
    _jvp_op,
    _jvp_backward,
    saves=lambda inputs, outputs: (inputs[0], *inputs[2:]),
    outputs=2,
)


def snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Anti-aliased SnakeBeta activation of BigVGAN, differentiable in both modes.

    Args:
        x: `(B, C, N)`, any floating dtype, N at least 1.
        alpha: `(C,)`, log of the frequency; must not carry a tangent.
        beta: `(C,)`, log of the inverse height; must not carry a tangent.

    Returns:
        `(B, C, N)` in the dtype of x.

    Raises:
        ValueError: The shapes do not fit.
        NotImplementedError: alpha or beta carries a tangent.
    """
    _op.check_tensors("snake", x=x, alpha=alpha, beta=beta)
    fits = x.ndim == 3 and x.shape[2] > 0 and alpha.shape == beta.shape == x.shape[1:2]
    if not (fits and x.is_floating_point()):
        needs = "x (B, C, N) with N > 0, alpha and beta (C,)"
        _op.check(False, "snake", needs, x=x, alpha=alpha, beta=beta)
    if _op.use_reference():
        return snake_ref(x, alpha, beta)

    def run(values: Any, dots: Any) -> Any:
        if dots is None:
            return (_fwd_op(*values),)
        x, *others = values
        return _jvp_op(x, *dots, *others)

    return _op.dual(run, (x,), "snake", {"alpha": alpha, "beta": beta})[0]
