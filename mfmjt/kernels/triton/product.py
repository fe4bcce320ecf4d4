"""Triton kernels of products over windows of tokens: convolutions and projections of streams.

    y = act(windows(x) W^T + b)  or  silu(windows(x) W1^T) (windows(x) W2^T)

A window is the K tokens around a token, K C numbers that lie one after the other in memory; zeros
stand for what it has beyond the ends of its sample. W is (O, K C). A launch has programs of several
streams, each with lengths and a weight of its own; a tangent is one more stream with the same
weight. What differs between streams is chosen by a number that only the running program knows, so
that the code, and its registers, are those of one stream.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels.triton import cdiv, choose, jit, target, tl, tuning

__all__ = ["dense", "precision", "project", "project_qkv", "strides", "takes", "window"]

MAX_HEAD = 128  # width of a head that fits into registers, beside the products that make it


@jit
def _tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the stream of this program, and its blocks of rows and columns there.

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
def window(source, row, inside, UNIT: tl.constexpr):
    """Return where the windows of rows begin, and the places of their first numbers.

    Returns pointers (R, 1), places (R, 1) counted from the sample's first number, how many numbers
    a sample has, and a window. All are multiples of UNIT: so are groups of a mask, and a group is
    one load.
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
def _source(sources, stream):
    """Return pointer, tokens, channels, taps and strides of a stream."""
    xs, tokens, channels, taps, sample_strides, token_strides = sources
    return (
        choose(xs, stream),
        choose(tokens, stream),
        choose(channels, stream),
        choose(taps, stream),
        choose(sample_strides, stream),
        choose(token_strides, stream),
    )


@jit
def _products(
    windows,
    filters,  # pointers (1, O)
    more,  # likewise for the other half of a gated unit, or None
    out_inside,  # (1, O)
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Return products of windows and filters, (R, O), and those with `more`."""
    x, first, count, depth = windows
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
        pointers, token_strides, present = biases
        bias = choose(pointers, stream) + column
        here = columns & (choose(present, stream) == 1)  # (1, O)
        if PER_TOKEN:
            bias += token[:, None].to(tl.int64) * choose(token_strides, stream)
            here = here & inside[:, None]
        total += tl.load(bias, here, 0.0).to(total.dtype)
    return total


@jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@jit
def _product_kernel(
    sources,  # of streams: pointers, tokens, channels, taps, strides; the last two in units
    weights,
    biases,  # (pointers, token strides, 1 where there is one), or None
    acts,
    ys,
    rows,
    outs,
    GLU: tl.constexpr,
    ACTIVE: tl.constexpr,  # whether any stream has an activation
    PER_TOKEN: tl.constexpr,  # whether any has a bias for each token
    UNIT: tl.constexpr,  # elements per aligned load
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    STORED: tl.constexpr = ys[0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    stream, row_block, out_block = _tile(rows, outs, BLOCK_ROWS, BLOCK_OUTS)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < choose(rows, stream)
    out = (out_block * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS))[None, :]
    count = choose(outs, stream)
    source = _source(sources, stream)
    windows = window(source, row, inside, UNIT)
    filters = choose(weights, stream) + out.to(tl.int64) * windows[3]
    more = None
    if GLU:
        more = filters + count.to(tl.int64) * windows[3]
    total, other = _products(
        windows, filters, more, out < count, BLOCK_ROWS, BLOCK_OUTS, BLOCK_DEPTH, PRECISION, TYPE
    )
    if GLU:
        total = _silu(total) * other
    else:
        total = _biased(total, biases, stream, row % source[1], inside, out, out < count, PER_TOKEN)
        if ACTIVE:
            act = choose(acts, stream)
            selu = 1.0507009873554805 * tl.where(
                total > 0, total, 1.6732632423543772 * (tl.exp(tl.minimum(total, 0.0)) - 1)
            )
            total = tl.where(act == 1, _silu(total), tl.where(act == 2, selu, total))
    y = choose(ys, stream) + row[:, None].to(tl.int64) * count + out
    tl.store(y, total, inside[:, None] & (out < count))


@jit
def _product_qkv_kernel(
    sources,
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
    stream, row_block, part = _tile(rows, parts, BLOCK_ROWS, 1)  # one head of q, k or v
    heads = parts[0] // 3
    which = part // heads
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < choose(rows, stream)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    exists = inside[:, None] & (column < width)
    source = _source(sources, stream)
    windows = window(source, row, inside, UNIT)
    out = part * width + column
    filters = choose(weights, stream) + out.to(tl.int64) * windows[3]
    total, _ = _products(
        windows,
        filters,
        None,
        column < width,
        BLOCK_ROWS,
        BLOCK_WIDTH,
        BLOCK_DEPTH,
        PRECISION,
        TYPE,
    )
    token = row % source[1]
    total = _biased(total, biases, stream, token, inside, out, column < width, PER_TOKEN)
    norm = tl.where(which == 0, choose(norms[0], stream), choose(norms[1], stream))
    weight = tl.load(norm + column, (column < width) & (which < 2), 0.0).to(TYPE)
    square = tl.sum(total * total, 1)[:, None] / width
    total = tl.where(which == 2, total, total * tl.rsqrt(square + EPS) * weight)
    if ropes is not None:
        pointers, present = ropes
        here = exists & (which < 2) & (choose(present, stream) == 1)
        at = choose(pointers, stream) + token[:, None].to(tl.int64) * width + column
        rotation = tl.load(at, here, 0.0).to(TYPE)
        rotation = tl.where(here, rotation, tl.where(column % 2 == 0, 1.0, 0.0))  # or none at all
        cos, sin = _even_odd(rotation)
        even, odd = _even_odd(total)
        total = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        total = tl.reshape(total, (BLOCK_ROWS, BLOCK_WIDTH))
    y = choose(ys[0], stream)
    y = tl.where(which == 1, choose(ys[1], stream), y)
    y = tl.where(which == 2, choose(ys[2], stream), y)
    y += (row[:, None].to(tl.int64) * heads + (part - which * heads)) * width + column
    tl.store(y, total, exists)


@jit
def _even_odd(x):
    """Return the even and the odd columns of (R, D), each (R, D/2)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


def takes(xs: list[Tensor]) -> bool:
    """Return False for float64 on a GPU, which has no matrix units for it, and beyond 32 bits."""
    double = xs[0].dtype == torch.float64 and not INTERPRETED
    counts = [(x.shape[0] * x.shape[1], x.shape[1] * x.shape[2]) for x in xs]
    return not double and all(rows < 2**31 and numbers < 2**30 for rows, numbers in counts)


def strides(x: Tensor) -> tuple[int, int]:
    """Return those of samples and tokens; 0 where there is only one, which counts as aligned."""
    sample, token = (d if n > 1 else 0 for n, d in zip(x.shape[:2], x.stride()[:2], strict=True))
    return sample, token


def dense(x: Tensor, taps: int = 1) -> Tensor:
    """Return x with dense channels; for more taps than one, tokens one after the other."""
    in_order = taps == 1 or x.shape[1] <= 1 or x.stride(1) == x.shape[2]
    return x if in_order and (x.shape[2] <= 1 or x.stride(2) == 1) else x.contiguous()


def _sources(xs: list[Tensor], weights: list[Tensor]) -> tuple[tuple[Any, ...], Any, int]:
    """Return what both kernels take of x, the weights, and the unit of sizes and strides.

    A unit is what one load may take at most: 16 bytes, and fewer where some row is no multiple of
    it (the 20 channels of a latent are 8-byte units).
    """
    taps = [weight.shape[1] for weight in weights]
    weights = [weight.contiguous() for weight in weights]
    xs = [dense(x, k) for x, k in zip(xs, taps, strict=True)]
    # A window of one token only may begin before it, by the tokens that are not there
    steps = [
        (strides(x)[0], x.shape[2] if k > 1 else strides(x)[1])
        for x, k in zip(xs, taps, strict=True)
    ]
    unit = aligned(*(n for pair in steps for n in pair), *(x.shape[2] for x in xs), at=xs + weights)
    sources = (
        tuple(xs),
        tuple(x.shape[1] for x in xs),
        tuple(x.shape[2] // unit for x in xs),
        tuple(taps),
        tuple(sample // unit for sample, _ in steps),
        tuple(token // unit for _, token in steps),
    )
    return sources, tuple(weights), unit


def aligned(*sizes: int, at: list[Tensor]) -> int:
    """Return how many elements one load may take, at most 16 bytes, for sizes and memory."""
    starts = [x.data_ptr() // x.element_size() for x in at]
    return math.gcd(16 // at[0].element_size(), *sizes, *starts)


def _present(given: list[Tensor | None]) -> tuple[tuple[Tensor, ...], tuple[int, ...]] | None:
    """Return tensors of one dtype, another's for each that is absent, and which are there."""
    found = [t for t in given if t is not None]
    if not found:
        return None
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in found))
    tensors = tuple((found[0] if t is None else t).to(dtype).contiguous() for t in given)
    return tensors, tuple(int(t is not None) for t in given)


def _bias_arguments(biases: list[Tensor | None]) -> tuple[Any, bool]:
    """Return pointers, token strides and presence of biases; whether some are per token."""
    found = _present(biases)
    if found is None:
        return None, False
    steps = tuple(0 if b is None or b.ndim == 1 else b.shape[1] for b in biases)
    return (found[0], steps, found[1]), any(steps)


def precision() -> str:
    """Return how float32 is multiplied: in full on AMD, elsewhere by three products in tf32."""
    return "ieee" if target()[0] == "hip" else "tf32x3"


def _not_empty(results: list[Tensor], *lists: list[Any]) -> list[list[Any]]:
    """Return the streams whose results are not empty: a kernel has nothing to do for the others."""
    kept = [i for i, result in enumerate(results) if result.numel()]
    return [[given[i] for i in kept] for given in lists]


def project(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    acts: list[int],
    glu: bool,
) -> Any:
    """Launch products of streams (B, N, C) with weights (O, K, C); an activation by its number."""
    if not takes(xs):
        return NotImplemented
    pairs = zip(xs, weights, strict=True)
    results = [x.new_empty(*x.shape[:2], w.shape[0] // (2 if glu else 1)) for x, w in pairs]
    xs, weights, biases, acts, ys = _not_empty(results, xs, weights, biases, acts, results)
    if not ys:
        return results
    rows, outs = tuple(y.shape[0] * y.shape[1] for y in ys), tuple(y.shape[2] for y in ys)
    blocks, num_warps, num_stages = tuning.product(rows, outs, xs[0].element_size(), glu)
    block_rows, block_outs, block_depth = blocks
    sources, packed, unit = _sources(xs, weights)
    programs = sum(
        cdiv(n, block_rows) * cdiv(o, block_outs) for n, o in zip(rows, outs, strict=True)
    )
    bias, per_token = _bias_arguments(biases)
    _product_kernel[(programs,)](
        *(sources, packed, bias, tuple(acts), tuple(ys), rows, outs),
        GLU=glu,
        ACTIVE=any(acts),
        PER_TOKEN=per_token,
        UNIT=unit,
        PRECISION=precision(),
        BLOCK_ROWS=block_rows,
        BLOCK_OUTS=block_outs,
        BLOCK_DEPTH=block_depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return results


def project_qkv(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    q_norms: list[Tensor],
    k_norms: list[Tensor],
    ropes: list[Tensor | None],
    num_heads: int,
    eps: float,
) -> Any:
    """Launch products with weights (3 H D, K, C), and the norms and rotations of their heads."""
    width = weights[0].shape[0] // (3 * num_heads)
    if not takes(xs) or width > MAX_HEAD:
        return NotImplemented
    shapes = [(*x.shape[:2], num_heads, width) for x in xs]
    qs, ks, vs = ([x.new_empty(s) for x, s in zip(xs, shapes, strict=True)] for _ in range(3))
    xs, weights, biases, q_norms, k_norms, ropes, *ys = _not_empty(
        qs, xs, weights, biases, q_norms, k_norms, ropes, qs, ks, vs
    )
    if not xs:
        return qs, ks, vs
    rows = tuple(x.shape[0] * x.shape[1] for x in xs)
    parts = (3 * num_heads,) * len(xs)
    size = xs[0].element_size()
    blocks, num_warps, num_stages = tuning.product_heads(rows, parts[0], width, size)
    block_rows, block_width, block_depth = blocks
    sources, packed, unit = _sources(xs, weights)
    bias, per_token = _bias_arguments(biases)
    found = _present([*q_norms, *k_norms])
    assert found is not None
    norms = found[0]
    _product_qkv_kernel[(parts[0] * sum(cdiv(n, block_rows) for n in rows),)](
        *(sources, packed, bias, (norms[: len(xs)], norms[len(xs) :]), _present(ropes)),
        *(tuple(map(tuple, ys)), rows, parts, width),
        PER_TOKEN=per_token,
        UNIT=unit,
        EPS=eps,
        PRECISION=precision(),
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        BLOCK_DEPTH=block_depth,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return qs, ks, vs
