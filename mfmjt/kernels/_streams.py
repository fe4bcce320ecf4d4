"""The Triton kernels of `streams` and how they are launched.

A program belongs to one stream, which it finds by its number; what differs between streams goes
through selections by a number that only the running program knows, so that the code, and its
registers, are those of one stream. Launchers write into results that are there already.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _triton, _tuning
from mfmjt.kernels._triton import cdiv, jit, tl

__all__ = [
    "MAX_HEAD",
    "MAX_WIDTH",
    "gated_residual_norm",
    "project",
    "project_qkv",
    "takes",
]

MAX_WIDTH = 8192  # channels of a row that fits into the registers of one program
MAX_HEAD = 128  # width of a head that does, beside the products that make it


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
def _biased(total, biases, stream, token, inside, column, columns, PER_TOKEN: tl.constexpr):
    """Add the bias of a stream: pointers, token strides and whether there is one."""
    if biases is not None:
        pointers, strides, present = biases
        bias = _pick(pointers, stream) + column
        here = columns & (_pick(present, stream) == 1)  # (1, O)
        if PER_TOKEN:
            bias += token[:, None].to(tl.int64) * _pick(strides, stream)
            here = here & inside[:, None]
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
        total = _biased(total, biases, stream, row % length, inside, out, out < count, PER_TOKEN)
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
    total = _biased(total, biases, stream, token, inside, out, column < width, PER_TOKEN)
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


# --- Launchers


def takes(xs: list[Tensor]) -> bool:
    """Not float64 on a GPU, where Triton knows no matrix units for it, nor more than 32 bits."""
    double = xs[0].dtype == torch.float64 and not _triton.INTERPRETED
    return not double and all(x.shape[1] * x.shape[2] < 2**30 for x in xs)


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
    weights = [weight.contiguous() for weight in weights]
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


def project(
    results: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    acts: list[int],
    glu: bool,
) -> None:
    """Run the kernel of `project`; an activation is its number in `ACTIVATIONS`."""
    xs, weights, biases, acts, ys = _streams_that_exist(results, xs, weights, biases, acts, results)
    if not ys:
        return
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


def project_qkv(
    results: tuple[list[Tensor], list[Tensor], list[Tensor]],
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> None:
    """Run the kernel of `project_qkv`."""
    width = weights[0].shape[0] // (3 * num_heads)
    qs, ks, vs = results
    xs, weights, biases, q_norms, k_norms, ropes, *ys = _streams_that_exist(
        qs, xs, weights, biases, q_norms, k_norms, ropes, qs, ks, vs
    )
    if not xs:
        return
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


def _row_arguments(given: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """(pointers, sample strides, token strides)."""
    tensors = tuple(map(_dense, given))
    strides = [_strides(x) for x in tensors]
    return tensors, tuple(s for s, _ in strides), tuple(t for _, t in strides)


def gated_residual_norm(
    totals: list[Tensor],
    ys: list[Tensor],
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> None:
    """Run the kernel of `gated_residual_norm`."""
    added = bool(hs)
    nothing = [None] * len(xs)
    xs, hs, gates, shifts, scales, rows, totals, ys = _streams_that_exist(
        ys, xs, hs or nothing, gates or nothing, shifts, scales, rows, totals or nothing, ys
    )
    if not ys:
        return
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
        **_tuning.registers(num_warps),
    )
