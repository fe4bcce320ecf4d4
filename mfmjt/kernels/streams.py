"""Inference over several streams at once: one launch where a network would need one per stream.

    project              y = act(x W^T + b), or silu(x W1^T) (x W3^T); W of a layer or a convolution
    project_qkv          q, k, v of a projection; q and k RMS-normalised per head and rotated
    gated_residual_norm  x' = x + gate h,  y = LN(x') (1 + scale) + shift
    pool                 means over tokens, side by side
    silu_conditions      silu(c) and silu(c + frames)
    guide                z - step u, with u guided, and out of the network's space

The streams of a joint block (latent, video, text) have weights and lengths of their own, and at
batch 1 their sub-layers are so short that launching them takes longer than running them. Here a
launch has programs of all streams. Nothing is kept for a gradient and no tangent is propagated:
what asks for either is refused.

A convolution is a product too: the K tokens around a token, (K C) numbers that lie one after the
other in memory, times a weight that is packed as (O, K C). Zeros stand for what a window has
beyond the ends of its sample. Stored in the dtype of x, summed in float32 (float64 for float64).
On the CPU the same windows are copied out and multiplied by oneDNN; next to its convolution, which
reads the same packed weight, this takes 0.74 to 1.02 times as long in bfloat16 for the network's
layers and 1.00 to 1.09 in float32 (one thread of a Zen 4 server, B = 2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _op, _triton, _tuning
from mfmjt.kernels._triton import cdiv, jit, tl

__all__ = [
    "ACTIVATIONS",
    "Packed",
    "gated_residual_norm",
    "guide",
    "pack",
    "pool",
    "project",
    "project_qkv",
    "silu_conditions",
]

ACTIVATIONS = ("none", "silu", "selu")
"""What `project` may apply."""
GUIDANCE = ("none", "cfg", "cfg_scaled")
_MAX_WIDTH = 8192  # channels of a row that fits into the registers of one program
_GUIDANCE_EPS = 1e-8  # as mfmjt.meanflow.guide

T = TypeVar("T")


class Packed(NamedTuple):
    """A weight as `project` reads it.

    Attributes:
        data: (O, K, C), or (2 O, K, C) for a gated unit, first those that go through silu.
        glu: Whether it is a gated unit.
    """

    data: Tensor
    glu: bool = False

    @property
    def out(self) -> int:
        """Channels of the result."""
        return self.data.shape[0] // (2 if self.glu else 1)


def pack(weight: Tensor, *more: Tensor) -> Packed:
    """Arrange a weight for `project`; once, when a network is loaded.

    Args:
        weight: `(O, C)` of a linear layer or `(O, C, K)` of a convolution with K odd.
        *more: For a gated unit, one more of the same shape: then `weight` goes through silu.

    Raises:
        ValueError: The shapes do not fit.
    """
    weights = (weight, *more)
    fits = weight.ndim in (2, 3) and weight.is_floating_point() and len(weights) <= 2
    fits = fits and all(w.shape == weight.shape and w.dtype == weight.dtype for w in weights)
    fits = fits and (weight.ndim == 2 or weight.shape[2] % 2 == 1)
    needs = "one weight, or two alike, (O, C) or (O, C, K) with K odd"
    _op.check(fits, "streams.pack", needs, **{f"weight {i}": w for i, w in enumerate(weights)})
    data = torch.cat([w.detach() for w in weights])
    data = data[:, None] if data.ndim == 2 else data.transpose(1, 2)
    return Packed(data.contiguous(), len(weights) == 2)


# --- References


def project_ref(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    acts: Sequence[str],
) -> list[Tensor]:
    """Plain PyTorch `project`; the definition of correct."""
    results = []
    for x, (data, glu), bias, act in zip(xs, weights, biases, acts, strict=True):
        y = x.new_empty(x.shape[0], 0, data.shape[0])
        if x.shape[1]:  # PyTorch convolves no sequence without tokens
            filters, padding = data.transpose(1, 2), data.shape[1] // 2
            y = F.conv1d(x.transpose(1, 2), filters, padding=padding).transpose(1, 2)
        y = y if bias is None else y + bias.to(y.dtype)
        if glu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        results.append(F.silu(y) if act == "silu" else F.selu(y) if act == "selu" else y)
    return results


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # (N, 1, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def project_qkv_ref(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    q_norms: Sequence[Tensor],
    k_norms: Sequence[Tensor],
    ropes: Sequence[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Plain PyTorch `project_qkv`; the definition of correct."""
    results = []
    projected = project_ref(xs, weights, biases, ["none"] * len(xs))
    for y, q_norm, k_norm, rope in zip(projected, q_norms, k_norms, ropes, strict=True):
        work = _op.work_dtype(y)
        *qk, v = y.unflatten(-1, (3, num_heads, -1)).unbind(2)
        for i, norm in enumerate((q_norm, k_norm)):
            x = qk[i].to(work)
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.to(work)
            qk[i] = (x if rope is None else _rotated(x, rope.to(work))).to(y.dtype)
        results.append((*qk, v))
    qs, ks, vs = zip(*results, strict=True)
    return list(qs), list(ks), list(vs)


def gated_residual_norm_ref(
    xs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    gates: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Plain PyTorch `gated_residual_norm`; the definition of correct."""
    totals, results = [], []
    for i, (x, row) in enumerate(zip(xs, rows, strict=True)):
        if hs is not None and gates is not None:
            x = x + _of_tokens(gates[i], row) * hs[i]
        n = F.layer_norm(x, x.shape[-1:], eps=eps)
        totals.append(x)
        results.append(n * (1 + _of_tokens(scales[i], row)) + _of_tokens(shifts[i], row))
    return totals, results


def guide_ref(
    z: Tensor,
    u: Tensor,
    w: float | Tensor,
    mode: str,
    step: float,
    std: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """Plain PyTorch `guide`; the definition of correct."""
    work = _op.work_dtype(z)
    u = u.to(work)
    if mode != "none":
        conditional, null = u.chunk(2)
        if mode == "cfg_scaled":
            dot = (conditional * null).sum((1, 2), keepdim=True)
            null = null * (dot / (null.square().sum((1, 2), keepdim=True) + _GUIDANCE_EPS))
        if isinstance(w, Tensor):
            w = w.to(work).reshape(-1, 1, 1)
        u = w * conditional + (1 - w) * null
    x = z.to(work) - step * u
    x = x if std is None else x * std.to(work).flatten()
    return (x if mean is None else x + mean.to(work).flatten()).to(z.dtype)


# --- Formulas: what runs where there is no Triton


def _of_tokens(m: Tensor, row: Tensor | None) -> Tensor:
    """The modulation of every token."""
    return m if row is None else m.index_select(1, row)


def _windows(x: Tensor, taps: int) -> Tensor:
    """(B, N, C) as (B, N, K C): the tokens around every token, zeros beyond the ends."""
    if taps == 1:
        return x
    batch, tokens, channels = x.shape
    padded = F.pad(x, (0, 0, taps // 2, taps // 2))
    sample, token, channel = padded.stride()
    size, stride = (batch, tokens, taps, channels), (sample, token, token, channel)
    return padded.as_strided(size, stride).reshape(batch, tokens, taps * channels)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = bias is not None and bias.ndim == 1 and bias.dtype == x.dtype
    # Rows of all samples in one matrix: matmul makes a product of each, and copies the weight.
    rows = _windows(x, weight.shape[1]).flatten(0, 1)
    y = F.linear(rows, weight.flatten(1), bias if flat else None).unflatten(0, x.shape[:2])
    return y if flat or bias is None else y.add_(bias)


def _project(
    xs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], acts: list[int], glu: bool
) -> list[Tensor]:
    results = []
    for x, weight, bias, act in zip(xs, weights, biases, acts, strict=True):
        y = _product(x, weight, bias)
        if glu:
            y = torch.ops.mfmjt.swiglu_fwd(*y.chunk(2, dim=-1))
        elif act:
            y = (F.silu if ACTIVATIONS[act] == "silu" else F.selu)(y, inplace=True)
        results.append(y)
    return results


def _project_qkv(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    qs, ks, vs = [], [], []
    for x, weight, bias, *of_heads in zip(
        xs, weights, biases, q_norms, k_norms, ropes, strict=True
    ):
        qkv = _product(x, weight, bias)
        qkv = qkv.view(*qkv.shape[:2], 3, num_heads, weight.shape[0] // (3 * num_heads))
        q, k, v, *_ = torch.ops.mfmjt.qk_norm_rope_fwd(qkv, *of_heads, eps)
        qs.append(q)
        ks.append(k)
        vs.append(v)
    return qs, ks, vs


def _gated_residual_norm(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    totals, results = [], []
    for i, (x, row) in enumerate(zip(xs, rows, strict=True)):
        shift, scale = (_spread(m[i], row, x) for m in (shifts, scales))
        if hs:
            gate = _spread(gates[i], row, x)
            total, y, *_ = torch.ops.mfmjt.gated_residual_adaln_fwd(
                x, hs[i], gate, shift, scale, eps
            )
            totals.append(total)
        else:
            y, *_ = torch.ops.mfmjt.adaln_fwd(x, shift, scale, eps)
        results.append(y)
    return totals, results


def _spread(m: Tensor, row: Tensor | None, x: Tensor) -> Tensor:
    """The modulation of every token, or one for all, of every sample."""
    return _of_tokens(m, row).expand(x.shape[0], -1, -1)


def _pool(xs: list[Tensor]) -> Tensor:
    means = [x.mean(1, keepdim=True, dtype=_op.work_dtype(x)).to(x.dtype) for x in xs]
    return torch.cat(means, dim=-1)


def _silu_conditions(shared: Tensor, frames: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    work = _op.work_dtype(shared)
    sums = shared.to(work) + _of_tokens(frames, rows)
    return F.silu(shared.to(work)).to(shared.dtype), F.silu(sums, inplace=True).to(shared.dtype)


def _guide(
    z: Tensor,
    u: Tensor,
    w: Tensor | None,
    w_number: float,
    mode: int,
    step: float,
    std: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    x = guide_ref(z, u, w_number if w is None else w, GUIDANCE[mode], step, std, mean)
    return x


# --- Fakes: shapes of the results


def _project_fake(
    xs: list[Tensor], weights: list[Tensor], biases: Any, acts: Any, glu: bool
) -> list[Tensor]:
    return [
        x.new_empty(*x.shape[:2], w.shape[0] // (2 if glu else 1))
        for x, w in zip(xs, weights, strict=True)
    ]


def _project_qkv_fake(
    xs: list[Tensor], weights: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    heads = others[-2]

    def part() -> list[Tensor]:
        return [
            x.new_empty(*x.shape[:2], heads, weight.shape[0] // (3 * heads))
            for x, weight in zip(xs, weights, strict=True)
        ]

    return part(), part(), part()


def _gated_residual_norm_fake(
    xs: list[Tensor], hs: list[Tensor], *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    return [h.new_empty(h.shape) for h in hs], [x.new_empty(x.shape) for x in xs]


def _pool_fake(xs: list[Tensor]) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0], 1, sum(x.shape[2] for x in xs))


def _silu_conditions_fake(
    shared: Tensor, frames: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens = frames.shape[1] if rows is None else rows.shape[0]
    shape = (shared.shape[0], tokens, shared.shape[2])
    return shared.new_empty(shared.shape), shared.new_empty(shape)


# --- Kernels. A stream is chosen by a number that only the running program knows; what differs
# between streams goes through selections, so that the code, and its registers, are those of one.


@jit
def _pick(values, stream):
    """One of a tuple of numbers or of pointers of one type."""
    value = values[0]
    for s in tl.static_range(1, len(values)):
        value = tl.where(stream == s, values[s], value)
    return value


@jit
def _stream(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The stream of this program, and its blocks of rows and columns there.

    Programs of one block of rows are neighbours: they read the same rows.
    """
    stream, local = 0, tl.program_id(0)
    blocks = tl.cdiv(columns[0], BLOCK_COLS)
    passed = tl.cdiv(rows[0], BLOCK_ROWS) * blocks
    for s in tl.static_range(1, len(rows)):
        here = tl.program_id(0) >= passed
        of_stream = tl.cdiv(columns[s], BLOCK_COLS)
        stream = tl.where(here, s, stream)
        local = tl.where(here, tl.program_id(0) - passed, local)
        blocks = tl.where(here, of_stream, blocks)
        passed += tl.cdiv(rows[s], BLOCK_ROWS) * of_stream
    return stream, local // blocks, local % blocks


@jit
def _window(source, row, inside, UNIT: tl.constexpr):
    """Where the windows of rows begin; their first numbers, counted from those of the sample.

    Returns pointers (R, 1), these numbers (R, 1), how many a sample has, and a window. All are
    multiples of UNIT: so are groups of a mask, and a group is one load.
    """
    x, tokens, channels, taps, sample_stride, token_stride = source
    sample = row // tokens
    token = row - sample * tokens
    begin = token - taps // 2
    at = sample.to(tl.int64) * sample_stride + begin.to(tl.int64) * token_stride
    first = tl.where(inside, begin * channels, tokens * channels)  # a row that is not has nothing
    return (
        x + at[:, None] * UNIT,
        first[:, None] * UNIT,
        tokens * channels * UNIT,
        taps * channels * UNIT,
    )


@jit
def _products(
    window,
    filters,  # pointers (1, O)
    more,  # likewise for the other half of a gated unit, or None
    out_inside,  # (1, O)
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Products of windows and filters, (R, O), and those with `more`."""
    x, first, count, depth = window
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTS), TYPE)
    other = total
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        i = first + k[None, :]
        a = tl.load(x + k[None, :], (i >= 0) & (i < count) & (k < depth)[None, :], 0.0)
        inside = (k < depth)[:, None] & out_inside
        b = tl.load(filters + k[:, None], inside, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=TYPE)
        if more is not None:
            c = tl.load(more + k[:, None], inside, 0.0)
            other = tl.dot(a, c, other, input_precision=PRECISION, out_dtype=TYPE)
    return total, other


@jit
def _biased(total, biases, stream, token, column, exists, PER_TOKEN: tl.constexpr):
    """Add the bias of a stream: pointers, token strides and whether there is one."""
    if biases is not None:
        pointers, strides, present = biases
        bias = _pick(pointers, stream) + column
        here = exists & (_pick(present, stream) == 1)
        if PER_TOKEN:
            bias += token[:, None].to(tl.int64) * _pick(strides, stream)
        else:  # a row that all tokens share
            here = tl.max(here.to(tl.int32), 0, keep_dims=True) == 1
        total += tl.load(bias, here, 0.0).to(total.dtype)
    return total


@jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@jit
def _streams_project_kernel(
    xs,
    tokens,
    channels,  # these and strides in units
    taps,
    sample_strides,
    token_strides,
    weights,
    biases,  # (pointers, token strides, 1 where there is one), or None
    acts,
    ys,
    rows,
    outs,
    GLU: tl.constexpr,
    ACTIVE: tl.constexpr,  # whether any stream has an activation
    PER_TOKEN: tl.constexpr,  # whether any has a bias for each token
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    STORED: tl.constexpr = ys[0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    stream, row_block, out_block = _stream(rows, outs, BLOCK_ROWS, BLOCK_OUTS)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < _pick(rows, stream)
    out = (out_block * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS))[None, :]
    count = _pick(outs, stream)
    length = _pick(tokens, stream)
    source = (
        _pick(xs, stream),
        length,
        _pick(channels, stream),
        _pick(taps, stream),
        _pick(sample_strides, stream),
        _pick(token_strides, stream),
    )
    window = _window(source, row, inside, UNIT)
    filters = _pick(weights, stream) + out.to(tl.int64) * window[3]
    more = None
    if GLU:
        more = filters + count.to(tl.int64) * window[3]
    total, other = _products(
        window, filters, more, out < count, BLOCK_ROWS, BLOCK_OUTS, BLOCK_DEPTH, PRECISION, TYPE
    )
    if GLU:
        total = _silu(total) * other
    else:
        exists = inside[:, None] & (out < count)
        total = _biased(total, biases, stream, row % length, out, exists, PER_TOKEN)
        if ACTIVE:
            act = _pick(acts, stream)
            selu = 1.0507009873554805 * tl.where(
                total > 0, total, 1.6732632423543772 * (tl.exp(tl.minimum(total, 0.0)) - 1)
            )
            total = tl.where(act == 1, _silu(total), tl.where(act == 2, selu, total))
    y = _pick(ys, stream) + row[:, None].to(tl.int64) * count + out
    tl.store(y, total, inside[:, None] & (out < count))


@jit
def _streams_project_qkv_kernel(
    xs,
    tokens,
    channels,
    taps,
    sample_strides,
    token_strides,
    weights,
    biases,
    norms,  # of queries, of keys
    ropes,  # (pointers, 1 where there is one), or None
    ys,  # queries, keys, values
    rows,
    parts,  # for each stream 3 H
    width,
    PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    STORED: tl.constexpr = ys[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    stream, row_block, part = _stream(rows, parts, BLOCK_ROWS, 1)  # one head of q, k or v
    heads = parts[0] // 3
    which = part // heads
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < _pick(rows, stream)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    exists = inside[:, None] & (column < width)
    length = _pick(tokens, stream)
    source = (
        _pick(xs, stream),
        length,
        _pick(channels, stream),
        _pick(taps, stream),
        _pick(sample_strides, stream),
        _pick(token_strides, stream),
    )
    window = _window(source, row, inside, UNIT)
    out = part * width + column
    filters = _pick(weights, stream) + out.to(tl.int64) * window[3]
    total, _ = _products(
        window, filters, None, column < width, BLOCK_ROWS, BLOCK_WIDTH, BLOCK_DEPTH, PRECISION, TYPE
    )
    token = row % length
    total = _biased(total, biases, stream, token, out, exists, PER_TOKEN)
    norm = tl.where(which == 0, _pick(norms[0], stream), _pick(norms[1], stream))
    weight = tl.load(norm + column, (column < width) & (which < 2), 0.0).to(TYPE)
    square = tl.sum(total * total, 1)[:, None] / width
    total = tl.where(which == 2, total, total * tl.rsqrt(square + EPS) * weight)
    if ropes is not None:
        pointers, present = ropes
        here = exists & (which < 2) & (_pick(present, stream) == 1)
        at = _pick(pointers, stream) + token[:, None].to(tl.int64) * width + column
        rotation = tl.load(at, here, 0.0).to(TYPE)
        rotation = tl.where(here, rotation, tl.where(column % 2 == 0, 1.0, 0.0))  # or none at all
        cos, sin = _pairs(rotation)
        even, odd = _pairs(total)
        total = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        total = tl.reshape(total, (BLOCK_ROWS, BLOCK_WIDTH))
    y = _pick(ys[0], stream)
    y = tl.where(which == 1, _pick(ys[1], stream), y)
    y = tl.where(which == 2, _pick(ys[2], stream), y)
    y += (row[:, None].to(tl.int64) * heads + (part - which * heads)) * width + column
    tl.store(y, total, exists)


@jit
def _pairs(x):
    """Even and odd columns of (R, D), each (R, D/2)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def _mean(x, width):
    """Of rows (K, R, V), zero outside, as (1, R, 1)."""
    return (tl.sum(tl.sum(x, 0), 1) / width)[None, :, None]


@jit
def _rows_of(given, stream, sample, row, column, inside, TYPE: tl.constexpr):
    """A block (K, R, V) of rows of (pointers, sample strides, token strides)."""
    pointers, sample_strides, token_strides = given
    at = sample * _pick(sample_strides, stream) + row * _pick(token_strides, stream)
    return tl.load(_pick(pointers, stream) + at + column, inside, 0.0).to(TYPE)


@jit
def _streams_norm_kernel(
    xs,  # this and the next four are (pointers, sample strides, token strides)
    hs,  # None where nothing is added, and so are gates
    gates,
    shifts,
    scales,
    picks,  # for each stream the row that modulates a token, or None for row n of token n
    totals,
    ys,
    tokens,
    rows,
    widths,
    EPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    STORED: tl.constexpr = ys[0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    stream, row_block, _ = _stream(rows, (1,) * len(rows), BLOCK_ROWS, 1)
    row = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[None, :, None]
    segment = tl.arange(0, SEGMENTS)[:, None, None] * BLOCK_COLS
    column = segment + tl.arange(0, BLOCK_COLS)[None, None, :]
    width = _pick(widths, stream)
    exists = row < _pick(rows, stream)
    inside = exists & (column < width)
    length = _pick(tokens, stream)
    sample = (row // length).to(tl.int64)
    token = (row - sample * length).to(tl.int64)
    pick = token
    for s in tl.static_range(len(ys)):
        if picks[s] is not None:
            found = tl.load(picks[s] + token, exists & (stream == s), 0).to(tl.int64)
            pick = tl.where(stream == s, found, pick)
    out = row.to(tl.int64) * width + column
    x = _rows_of(xs, stream, sample, token, column, inside, TYPE)
    if hs is not None:
        h = _rows_of(hs, stream, sample, token, column, inside, TYPE)
        x += _rows_of(gates, stream, sample, pick, column, inside, TYPE) * h
        tl.store(_pick(totals, stream) + out, x, inside)
    # Centred twice: what rounding left in the mean goes with the second
    x = tl.where(inside, x - _mean(x, width), 0.0)
    x = tl.where(inside, x - _mean(x, width), 0.0)
    n = x * tl.rsqrt(_mean(x * x, width) + EPS)
    factor = 1 + _rows_of(scales, stream, sample, pick, column, inside, TYPE)
    shift = _rows_of(shifts, stream, sample, pick, column, inside, TYPE)
    tl.store(_pick(ys, stream) + out, n * factor + shift, inside)


@jit
def _streams_pool_kernel(
    xs,  # (pointers, sample strides, token strides)
    y,  # (B, all columns)
    tokens,
    widths,
    firsts,  # columns of y where streams begin
    samples,
    all_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    stream, sample, block = _stream((samples,) * len(tokens), widths, 1, BLOCK_COLS)
    column = (block * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    width, length = _pick(widths, stream), _pick(tokens, stream)
    sample = sample.to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), TYPE)
    for start in range(0, length, BLOCK_ROWS):
        token = (start + tl.arange(0, BLOCK_ROWS))[:, None]
        inside = (token < length) & (column < width)
        total += _rows_of(xs, stream, sample, token.to(tl.int64), column, inside, TYPE)
    mean = tl.sum(total, 0, keep_dims=True) / length
    tl.store(y + sample * all_columns + _pick(firsts, stream) + column, mean, column < width)


@jit
def _streams_silu_kernel(
    shared,
    frames,
    picks,  # None for row n of token n
    whole,
    y,
    tokens,
    rows,  # of both results: a sample's first is that of `whole`
    width,
    shared_sample,
    frames_sample,
    frames_token,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(width, BLOCK_COLS)
    row = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    sample = row // (tokens + 1)
    token = row - sample * (tokens + 1) - 1
    inside = (row < rows) & (column < width)
    framed = token >= 0
    sample, token = sample.to(tl.int64), token.to(tl.int64)
    x = tl.load(shared + sample * shared_sample + column, inside, 0.0).to(TYPE)
    pick = token
    if picks is not None:
        pick = tl.load(picks + token, (row < rows) & framed, 0).to(tl.int64)
    at = sample * frames_sample + pick * frames_token + column
    x += tl.load(frames + at, inside & framed, 0.0).to(TYPE)
    # Two stores: on AMD a lane cannot choose between two tensors
    tl.store(whole + sample * width + column, _silu(x), inside & (token < 0))
    tl.store(y + (sample * tokens + token) * width + column, _silu(x), inside & framed)


@jit
def _streams_guide_kernel(
    z,
    u,  # contiguous, as z is
    w,  # None for the number
    w_number,
    step,
    std,  # None for 1
    mean,  # None for 0
    x,
    samples,
    units,  # of a sample
    channels,
    w_stride,
    MODE: tl.constexpr,
    UNIT: tl.constexpr,  # numbers that one load may take
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    sample, numbers = tl.program_id(0).to(tl.int64), units * UNIT
    own, null = u + sample * numbers, u + (samples + sample) * numbers
    lane = tl.arange(0, BLOCK)
    scale = tl.zeros((1,), TYPE)
    if w is not None:
        scale += tl.load(w + sample * w_stride).to(TYPE)
    else:
        scale += w_number
    share = 1 - scale
    if MODE == 2:
        dots, squares = tl.zeros((BLOCK,), TYPE), tl.zeros((BLOCK,), TYPE)
        for start in range(0, numbers, BLOCK):
            i = start + lane
            a = tl.load(own + i, i < numbers, 0.0).to(TYPE)
            b = tl.load(null + i, i < numbers, 0.0).to(TYPE)
            dots += a * b
            squares += b * b
        share *= tl.sum(dots, 0) / (tl.sum(squares, 0) + EPS)
    for start in range(0, numbers, BLOCK):
        i = start + lane
        v = tl.load(own + i, i < numbers, 0.0).to(TYPE)
        if MODE > 0:
            v = scale * v + share * tl.load(null + i, i < numbers, 0.0).to(TYPE)
        y = tl.load(z + sample * numbers + i, i < numbers, 0.0).to(TYPE) - step * v
        if std is not None:
            y *= tl.load(std + i % channels, i < numbers, 0.0).to(TYPE)
        if mean is not None:
            y += tl.load(mean + i % channels, i < numbers, 0.0).to(TYPE)
        tl.store(x + sample * numbers + i, y, i < numbers)


# --- Launchers


def _left_to_pytorch(xs: list[Tensor]) -> bool:
    """float64 on a GPU, whose matrix units Triton knows without it; and samples beyond 32 bits."""
    double = xs[0].dtype == torch.float64 and not _triton.INTERPRETED
    return double or any(x.shape[1] * x.shape[2] >= 2**30 for x in xs)


def _strides(x: Tensor) -> tuple[int, int]:
    """Of samples and tokens; 0 where there is only one, so that it counts as aligned."""
    sample, token = (d if n > 1 else 0 for n, d in zip(x.shape[:2], x.stride()[:2], strict=True))
    return sample, token


def _dense(x: Tensor) -> Tensor:
    """Dense along the channels."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def _in_one_piece(x: Tensor, taps: int) -> Tensor:
    """Rows that a kernel can read: of more taps than one, tokens one after the other."""
    x = _dense(x)
    return x if taps == 1 or x.shape[1] <= 1 or x.stride(1) == x.shape[2] else x.contiguous()


def _sources(xs: list[Tensor], weights: list[Tensor]) -> tuple[tuple[Any, ...], int]:
    """What both product kernels take of x and the weights, and the unit of its sizes and strides.

    A unit is what one load may take at most: 16 bytes, and fewer where some row is no multiple of
    it (the 20 channels of a latent are 8-byte units).
    """
    taps = [weight.shape[1] for weight in weights]
    xs = [_in_one_piece(x, k) for x, k in zip(xs, taps, strict=True)]
    # A window of one token only may begin before it, by the tokens that are not there
    strides = [
        (_strides(x)[0], x.shape[2] if k > 1 else _strides(x)[1])
        for x, k in zip(xs, taps, strict=True)
    ]
    channels = [x.shape[2] for x in xs]
    numbers = [n for pair in strides for n in pair] + channels
    numbers += [n for x in (*xs, *weights) for n in [x.data_ptr() // x.element_size()] if n]
    unit = math.gcd(16 // xs[0].element_size(), *numbers)
    by_stream = (
        tuple(xs),
        tuple(x.shape[1] for x in xs),
        tuple(c // unit for c in channels),
        tuple(taps),
        tuple(sample // unit for sample, _ in strides),
        tuple(token // unit for _, token in strides),
        tuple(weights),
    )
    return by_stream, unit


def _present(given: list[Tensor | None]) -> tuple[tuple[Tensor, ...], tuple[int, ...]] | None:
    """Tensors of one dtype and where there is one; another's pointer stands for what is absent."""
    found = [t for t in given if t is not None]
    if not found:
        return None
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in found))
    tensors = tuple((found[0] if t is None else t).to(dtype).contiguous() for t in given)
    return tensors, tuple(int(t is not None) for t in given)


def _bias_arguments(biases: list[Tensor | None]) -> tuple[Any, bool]:
    """Pointers, token strides and presence of biases, or None; whether some are per token."""
    found = _present(biases)
    if found is None:
        return None, False
    strides = tuple(0 if b is None or b.ndim == 1 else b.shape[1] for b in biases)
    return (found[0], strides, found[1]), any(strides)


def _precision() -> str:
    """How float32 is multiplied: in full on AMD, by three products in tf32, as exact, elsewhere."""
    return "ieee" if _triton.target()[0] == "hip" else "tf32x3"


def _streams_that_exist(results: list[Tensor], *lists: list[Any]) -> list[list[Any]]:
    """Without the streams whose results are empty: a kernel has nothing to do there."""
    kept = [i for i, result in enumerate(results) if result.numel()]
    return [[given[i] for i in kept] for given in lists]


def _project_triton(
    xs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], acts: list[int], glu: bool
) -> list[Tensor]:
    if _left_to_pytorch(xs):
        return _project(xs, weights, biases, acts, glu)
    results = _project_fake(xs, weights, biases, acts, glu)
    xs, weights, biases, acts, ys = _streams_that_exist(results, xs, weights, biases, acts, results)
    if not ys:
        return results
    rows, outs = tuple(y.shape[0] * y.shape[1] for y in ys), tuple(y.shape[2] for y in ys)
    blocks, num_warps, num_stages = _tuning.streams(rows, outs, xs[0].element_size(), glu)
    block_rows, block_outs, block_depth = blocks
    sources, unit = _sources(xs, weights)
    programs = sum(
        cdiv(n, block_rows) * cdiv(o, block_outs) for n, o in zip(rows, outs, strict=True)
    )
    bias, per_token = _bias_arguments(biases)
    _streams_project_kernel[(programs,)](
        *(*sources, bias, tuple(acts), tuple(ys), rows, outs),
        GLU=glu,
        ACTIVE=any(acts),
        PER_TOKEN=per_token,
        UNIT=unit,
        PRECISION=_precision(),
        BLOCK_ROWS=block_rows,
        BLOCK_OUTS=block_outs,
        BLOCK_DEPTH=block_depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return results


def _project_qkv_triton(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    width = weights[0].shape[0] // (3 * num_heads)
    if _left_to_pytorch(xs) or width > 256:
        return _project_qkv(xs, weights, biases, q_norms, k_norms, ropes, num_heads, eps)
    qs, ks, vs = results = _project_qkv_fake(xs, weights, num_heads, eps)
    xs, weights, biases, q_norms, k_norms, ropes, *ys = _streams_that_exist(
        qs, xs, weights, biases, q_norms, k_norms, ropes, qs, ks, vs
    )
    if not xs:
        return results
    rows = tuple(x.shape[0] * x.shape[1] for x in xs)
    parts = (3 * num_heads,) * len(xs)
    blocks, num_warps, num_stages = _tuning.streams_qkv(rows, parts[0], width, xs[0].element_size())
    block_rows, block_width, block_depth = blocks
    sources, unit = _sources(xs, weights)
    bias, per_token = _bias_arguments(biases)
    found = _present([*q_norms, *k_norms])
    assert found is not None
    norms = found[0]
    _streams_project_qkv_kernel[(parts[0] * sum(cdiv(n, block_rows) for n in rows),)](
        *(*sources, bias, (norms[: len(xs)], norms[len(xs) :]), _present(ropes)),
        *(tuple(map(tuple, ys)), rows, parts, width),
        PER_TOKEN=per_token,
        UNIT=unit,
        EPS=eps,
        PRECISION=_precision(),
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        BLOCK_DEPTH=block_depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return results


def _row_arguments(given: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """(pointers, sample strides, token strides)."""
    tensors = tuple(map(_dense, given))
    strides = [_strides(x) for x in tensors]
    return tensors, tuple(s for s, _ in strides), tuple(t for _, t in strides)


def _gated_residual_norm_triton(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    if max(x.shape[2] for x in xs) > _MAX_WIDTH:
        return _gated_residual_norm(xs, hs, gates, shifts, scales, rows, eps)
    results = totals, ys = _gated_residual_norm_fake(xs, hs)
    added = bool(hs)
    nothing = [None] * len(xs)
    xs, hs, gates, shifts, scales, rows, totals, ys = _streams_that_exist(
        ys, xs, hs or nothing, gates or nothing, shifts, scales, rows, totals or nothing, ys
    )
    if not ys:
        return results
    counts = tuple(x.shape[0] * x.shape[1] for x in xs)
    widths = tuple(x.shape[2] for x in xs)
    segments, block_rows, block_cols, num_warps = _tuning.norm(
        max(widths), max(counts), xs[0].element_size(), 4
    )
    _streams_norm_kernel[(sum(cdiv(n, block_rows) for n in counts),)](
        _row_arguments(xs),
        _row_arguments(hs) if added else None,
        _row_arguments(gates) if added else None,
        _row_arguments(shifts),
        _row_arguments(scales),
        tuple(None if row is None else row.contiguous() for row in rows),
        tuple(totals) if added else None,
        tuple(ys),
        tuple(x.shape[1] for x in xs),
        *(counts, widths),
        EPS=eps,
        SEGMENTS=segments,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
        **_tuning.registers(),
    )
    return results


def _pool_triton(xs: list[Tensor]) -> Tensor:
    y = _pool_fake(xs)
    if not y.numel():
        return y
    widths = [x.shape[2] for x in xs]
    block_rows, block_cols, num_warps = _tuning.streams_pool()
    programs = xs[0].shape[0] * sum(cdiv(width, block_cols) for width in widths)
    _streams_pool_kernel[(programs,)](
        *(_row_arguments(xs), y, tuple(x.shape[1] for x in xs), tuple(widths)),
        *(tuple(sum(widths[:i]) for i in range(len(xs))), xs[0].shape[0], sum(widths)),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )
    return y


def _silu_conditions_triton(
    shared: Tensor, frames: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    whole, y = results = _silu_conditions_fake(shared, frames, rows)
    if not whole.numel():
        return results
    shared, frames = _dense(shared), _dense(frames)
    samples, tokens, width = y.shape
    count = samples * (tokens + 1)
    block_rows, block_cols, num_warps = _tuning.elementwise(count, width)
    _streams_silu_kernel[(cdiv(count, block_rows) * cdiv(width, block_cols),)](
        *(shared, frames, None if rows is None else rows.contiguous(), whole, y),
        *(tokens, count, width, _strides(shared)[0], *_strides(frames)),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )
    return results


def _guide_triton(
    z: Tensor,
    u: Tensor,
    w: Tensor | None,
    w_number: float,
    mode: int,
    step: float,
    std: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    x = z.new_empty(z.shape)
    if not z.numel():
        return x
    block, num_warps = _tuning.streams_guide()
    numbers = z.shape[1] * z.shape[2]
    unit = math.gcd(8, numbers)
    std, mean = (None if t is None else t.contiguous() for t in (std, mean))
    _streams_guide_kernel[(z.shape[0],)](
        *(z.contiguous(), u.contiguous(), None if w is None else w.contiguous()),
        *(w_number, step, std, mean, x, z.shape[0], numbers // unit, z.shape[2]),
        0 if w is None or w.numel() == 1 else 1,
        MODE=mode,
        UNIT=unit,
        EPS=_GUIDANCE_EPS,
        BLOCK=block,
        num_warps=num_warps,
    )
    return x


# --- Library ops


_project_op = _op.define(
    "streams_project(Tensor[] xs, Tensor[] weights, Tensor?[] biases, int[] acts, bool glu) "
    "-> Tensor[]",
    _project,
    _project_fake,
    triton=_project_triton,
)
_project_qkv_op = _op.define(
    "streams_project_qkv(Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] q_norms, "
    "Tensor[] k_norms, Tensor?[] ropes, SymInt num_heads, float eps) "
    "-> (Tensor[], Tensor[], Tensor[])",
    _project_qkv,
    _project_qkv_fake,
    triton=_project_qkv_triton,
)
_gated_residual_norm_op = _op.define(
    "streams_gated_residual_norm(Tensor[] xs, Tensor[] hs, Tensor[] gates, Tensor[] shifts, "
    "Tensor[] scales, Tensor?[] rows, float eps) -> (Tensor[], Tensor[])",
    _gated_residual_norm,
    _gated_residual_norm_fake,
    triton=_gated_residual_norm_triton,
)
_pool_op = _op.define("streams_pool(Tensor[] xs) -> Tensor", _pool, _pool_fake, triton=_pool_triton)
_silu_conditions_op = _op.define(
    "streams_silu_conditions(Tensor shared, Tensor frames, Tensor? rows) -> (Tensor, Tensor)",
    _silu_conditions,
    _silu_conditions_fake,
    triton=_silu_conditions_triton,
)
_guide_op = _op.define(
    "streams_guide(Tensor z, Tensor u, Tensor? w, float w_number, int mode, float step, "
    "Tensor? std, Tensor? mean) -> Tensor",
    _guide,
    lambda z, *_: z.new_empty(z.shape),
    triton=_guide_triton,
)


# --- Front doors


def _inference_only(op: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise if a gradient or a tangent is wanted of any of these.

    Raises:
        NotImplementedError: Names the ops to use instead.
    """
    wanted = [t for t in tensors if t is not None]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
    if gradient or any(_op.split(t)[1] is not None for t in wanted):
        raise NotImplementedError(
            f"mfmjt.kernels.streams.{op} is for inference and has no derivatives; an input "
            f"{'requires a gradient' if gradient else 'carries a tangent'}. Use "
            f"mfmjt.kernels.{instead} for each stream, or torch.no_grad() where no gradient is "
            "wanted."
        )


def _named(**groups: Sequence[Tensor | None] | None) -> dict[str, Tensor | None]:
    """Tensors of lists by their places, for messages."""
    return {f"{name}[{i}]": t for name, group in groups.items() for i, t in enumerate(group or ())}


def _each(given: Sequence[T] | None, count: int) -> list[T | None]:
    """One for each stream; None for none."""
    return [None] * count if given is None else list(given)


def _fits_product(x: Tensor, weight: Packed, bias: Tensor | None) -> bool:
    fits = x.ndim == 3 and weight.data.ndim == 3 and x.shape[2] == weight.data.shape[2]
    fits = fits and x.dtype == weight.data.dtype and x.is_floating_point()
    if bias is None:
        return fits
    fits = fits and not weight.glu and bias.is_floating_point() and 1 <= bias.ndim <= 2
    return fits and tuple(bias.shape) in ((weight.out,), (x.shape[1], weight.out))


def project(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None] | None = None,
    act: str | Sequence[str] = "none",
) -> list[Tensor]:
    """A linear layer, convolution of same padding or gated unit of every stream, in one launch.

    Args:
        xs: `(B_i, N_i, C_i)` each; sizes may differ.
        weights: What `pack` made for each stream; all gated units, or none of them.
        biases: For each stream `(O_i,)`, `(N_i, O_i)` for a bias of every token, or None. A gated
            unit has none.
        act: One of `ACTIVATIONS`, or one for each stream; "none" for a gated unit.

    Returns:
        `(B_i, N_i, O_i)` each, in the dtype of x.

    Raises:
        ValueError: The shapes or dtypes do not fit, or there is no such activation.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, weights = len(xs), list(xs), list(weights)
    of_streams, acts = _each(biases, count), [act] * count if isinstance(act, str) else list(act)
    glu = any(weight.glu for weight in weights)
    fits = count == len(weights) == len(of_streams) == len(acts) and count > 0
    fits = fits and all(map(_fits_product, xs, weights, of_streams))
    fits = fits and all(weight.glu == glu for weight in weights)
    fits = fits and all(x.dtype == xs[0].dtype for x in xs)
    fits = fits and all(a in ACTIVATIONS[: 1 if glu else None] for a in acts)
    packed = [weight.data for weight in weights]
    if not fits:
        needs = (
            "for each stream x (B, N, C), a packed weight (O, K, C) of its dtype, a bias (O,) or "
            f"(N, O) or None, and an activation of {', '.join(ACTIVATIONS)}; gated units have "
            f"neither bias nor activation and come alone (got {', '.join(acts)}, "
            f"glu {', '.join(str(weight.glu) for weight in weights)})"
        )
        _op.check(False, "streams.project", needs, **_named(x=xs, weight=packed, bias=of_streams))
    if _op.use_reference():
        return project_ref(xs, weights, of_streams, acts)
    _inference_only("project", "linear or conv1d", *xs, *packed, *of_streams)
    numbers = [ACTIVATIONS.index(a) for a in acts]
    results: list[Tensor] = _project_op(xs, packed, of_streams, numbers, glu)
    return results


def project_qkv(
    xs: Sequence[Tensor],
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None] | None,
    q_norms: Sequence[Tensor],
    k_norms: Sequence[Tensor],
    ropes: Sequence[Tensor | None] | None,
    num_heads: int,
    eps: float = 2**-23,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values of every stream in one launch; `linear`, then `qk_norm_rope`.

    Args:
        xs: `(B_i, N_i, C_i)` each.
        weights: What `pack` made of planar rows, (3, H, D), for each stream.
        biases: `(3 H D,)` or None for each stream.
        q_norms: `(D,)` each.
        k_norms: `(D,)` each.
        ropes: `(N_i, D/2, 2)` cosines and sines, or None for no rotation; D must be even.
        num_heads: H.
        eps: Added to the mean square.

    Returns:
        q, k and v of every stream, `(B_i, N_i, H, D)` each.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, weights = len(xs), list(xs), list(weights)
    q_norms, k_norms = list(q_norms), list(k_norms)
    of_streams, angles = _each(biases, count), _each(ropes, count)
    lists = (weights, of_streams, q_norms, k_norms, angles)
    fits = count > 0 and all(len(given) == count for given in lists)
    if fits:
        for x, weight, bias, q_norm, k_norm, rope in zip(xs, *lists, strict=True):
            width, rest = divmod(weight.data.shape[0], 3 * num_heads)
            fits = fits and _fits_product(x, weight, bias) and rest == 0 and not weight.glu
            fits = fits and q_norm.shape == k_norm.shape == (width,) and x.dtype == xs[0].dtype
            fits = fits and width == weights[0].data.shape[0] // (3 * num_heads)
            if rope is not None:
                fits = fits and width % 2 == 0 and rope.shape == (x.shape[1], width // 2, 2)
    packed = [weight.data for weight in weights]
    if not fits:
        needs = (
            f"for each stream x (B, N, C), a packed weight (3 H D, K, C) of its dtype with H = "
            f"{num_heads}, a bias or None, norms (D,) and rope (N, D/2, 2) or None"
        )
        norms = _named(q_norm=q_norms, k_norm=k_norms, rope=angles)
        named = _named(x=xs, weight=packed, bias=of_streams) | norms
        _op.check(False, "streams.project_qkv", needs, **named)
    if _op.use_reference():
        return project_qkv_ref(xs, weights, of_streams, q_norms, k_norms, angles, num_heads, eps)
    everything = (*xs, *packed, *of_streams, *q_norms, *k_norms, *angles)
    _inference_only("project_qkv", "linear and qk_norm_rope", *everything)
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = _project_qkv_op(
        xs, packed, of_streams, q_norms, k_norms, angles, num_heads, eps
    )
    return results


def _fits_norm(
    x: Tensor, h: Tensor | None, row: Tensor | None, modulations: Sequence[Tensor | None]
) -> bool:
    fits = x.ndim == 3 and (h is None or (h.shape == x.shape and h.dtype == x.dtype))
    fits = fits and x.is_floating_point()
    if row is not None:
        fits = fits and row.shape == x.shape[1:2] and row.dtype in (torch.int32, torch.int64)
    for m in modulations:
        if fits and m is not None:
            fits = m.ndim == 3 and m.shape[2] == x.shape[2] and m.dtype == x.dtype
            fits = fits and m.shape[0] in (1, x.shape[0])
            fits = fits and (row is not None or m.shape[1] in (1, x.shape[1]))
    return fits


def gated_residual_norm(
    xs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    gates: Sequence[Tensor] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[Tensor | None] | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gated residual add and adaptive layer norm of the sum, of every stream, in one launch.

    Args:
        xs: `(B_i, N_i, D_i)` each.
        hs: The same shapes; None where nothing is added, and then `gates` is None too.
        gates: `(B_i or 1, S_i, D_i)` each, any view whose channels are dense.
        shifts: Likewise.
        scales: Likewise.
        rows: For each stream `(N_i,)` int64 or int32, which of the S_i rows modulates a token, or
            None: then S_i is N_i, or 1 for a row that all tokens share.
        eps: Added to the variance.

    Returns:
        The new residual streams x + gate h (`xs` themselves without `hs`) and their
        LN(.) (1 + scale) + shift.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    count, xs, shifts, scales = len(xs), list(xs), list(shifts), list(scales)
    added, gated, of_tokens = _each(hs, count), _each(gates, count), _each(rows, count)
    lists = (added, of_tokens, gated, shifts, scales)
    fits = count > 0 and all(len(given) == count for given in lists)
    fits = fits and (hs is None) == (gates is None) and all(x.dtype == xs[0].dtype for x in xs)
    fits = fits and all(
        _fits_norm(x, h, row, modulations)
        for x, h, row, *modulations in zip(xs, *lists, strict=True)
    )
    if not fits:
        needs = (
            "for each stream x and h (B, N, D), gate, shift and scale (B or 1, S, D) of its dtype, "
            "with rows (N,) of integers below S, or None for an S of N or 1; h and gate, or neither"
        )
        modulations = _named(gate=gated, shift=shifts, scale=scales, rows=of_tokens)
        named = _named(x=xs, h=added) | modulations
        _op.check(False, "streams.gated_residual_norm", needs, **named)
    if _op.use_reference():
        return gated_residual_norm_ref(xs, hs, gates, shifts, scales, of_tokens, eps)
    everything = (*xs, *added, *gated, *shifts, *scales)
    _inference_only("gated_residual_norm", "adaln or gated_residual_adaln", *everything)
    totals, results = _gated_residual_norm_op(
        xs, list(hs or ()), list(gates or ()), shifts, scales, of_tokens, eps
    )
    return totals or xs, results


def pool(xs: Sequence[Tensor]) -> Tensor:
    """Means over the tokens of every stream, side by side, in one launch.

    A sum of linear layers of these means is one layer of the result, with the weights side by side.

    Args:
        xs: `(B, N_i, D_i)` each, N_i at least 1.

    Returns:
        `(B, 1, sum of D_i)`.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    xs = list(xs)
    fits = len(xs) > 0 and all(
        x.ndim == 3 and x.shape[1] > 0 and x.shape[0] == xs[0].shape[0] and x.is_floating_point()
        for x in xs
    )
    fits = fits and all(x.dtype == xs[0].dtype for x in xs)
    _op.check(fits, "streams.pool", "streams (B, N, D), N > 0, of one dtype", **_named(x=xs))
    if _op.use_reference():
        return torch.cat([x.mean(1, keepdim=True) for x in xs], dim=-1)
    _inference_only("pool", "linear after torch.mean", *xs)
    means: Tensor = _pool_op(xs)
    return means


def silu_conditions(
    shared: Tensor, frames: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The conditions that modulate: silu(shared) and silu(shared + frames), in one launch.

    Args:
        shared: `(B, 1, D)`, what all tokens of a sample share.
        frames: `(B or 1, S, D)`, of the same dtype.
        rows: `(N,)` int64 or int32, rows of `frames` to pick; None for all.

    Returns:
        `(B, 1, D)` and `(B, N, D)`, N = S without `rows`.

    Raises:
        ValueError: The shapes or dtypes do not fit.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    fits = shared.ndim == frames.ndim == 3 and shared.shape[1] == 1
    fits = fits and frames.shape[0] in (1, shared.shape[0]) and shared.shape[2] == frames.shape[2]
    fits = fits and shared.dtype == frames.dtype and shared.is_floating_point()
    fits = fits and (rows is None or (rows.ndim == 1 and rows.dtype in (torch.int32, torch.int64)))
    needs = "shared (B, 1, D), frames (B or 1, S, D) of its dtype and rows (N,) of integers or None"
    given = {"shared": shared, "frames": frames, "rows": rows}
    _op.check(fits, "streams.silu_conditions", needs, **given)
    if _op.use_reference():
        return F.silu(shared), F.silu(shared + _of_tokens(frames, rows))
    _inference_only("silu_conditions", "the PyTorch functions", shared, frames)
    whole, of_frames = _silu_conditions_op(shared, frames, rows)
    return whole, of_frames


def guide(
    z: Tensor,
    u: Tensor,
    w: float | Tensor = 1.0,
    mode: str = "cfg_scaled",
    step: float = 1.0,
    std: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """The end of a step, in one launch: (z - step guided u) std + mean.

    Args:
        z: `(B, N, C)`, noise.
        u: `(2 B, N, C)`, the conditional velocities and then the unconditional ones; for mode
            "none" `(B, N, C)`. Its dtype may differ.
        w: Guidance scale, a number or `(B,)` or a tensor of one element.
        mode: "cfg_scaled", "cfg" or "none": see `mfmjt.meanflow.guide`.
        step: The part of the interval that is gone, t - r.
        std: Factor of every channel, C elements, or None.
        mean: What is added to every channel, C elements, or None.

    Returns:
        `(B, N, C)` in the dtype of z; computed in float32 or wider.

    Raises:
        ValueError: The shapes do not fit, or there is no such mode.
        NotImplementedError: A gradient or a tangent is wanted.
    """
    number = 1.0 if isinstance(w, Tensor) else float(w)
    scale = w.reshape(-1) if isinstance(w, Tensor) else None
    fits = mode in GUIDANCE and z.ndim == 3 and z.is_floating_point() and u.is_floating_point()
    fits = fits and u.shape == ((1 if mode == "none" else 2) * z.shape[0], *z.shape[1:])
    fits = fits and (scale is None or scale.shape[0] in (1, z.shape[0]))
    fits = fits and all(t is None or t.numel() == z.shape[2] for t in (std, mean))
    if not fits:
        needs = (
            f"z (B, N, C), u (2 B, N, C), or (B, N, C) for mode 'none', w one or (B,), std and "
            f"mean of C elements, and a mode of {', '.join(GUIDANCE)} (got {mode!r})"
        )
        _op.check(False, "streams.guide", needs, z=z, u=u, w=scale, std=std, mean=mean)
    if _op.use_reference():
        return guide_ref(z, u, number if scale is None else scale, mode, step, std, mean)
    _inference_only("guide", "reference() with mfmjt.meanflow.guide", z, u, scale, std, mean)
    x: Tensor = _guide_op(z, u, scale, number, GUIDANCE.index(mode), step, std, mean)
    return x
