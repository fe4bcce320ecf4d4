"""Triton kernels of products over windows of tokens: convolutions and projections of streams.

    y = act(windows(x) W^T + b)  or  silu(windows(x) W1^T) (windows(x) W2^T), with its tangent

A window is the K tokens around a token, K C numbers that lie one after the other in memory; zeros
stand for what it has beyond the ends of its sample. W is (O, K C). A launch has programs of several
streams, each with lengths and a weight of its own; a tangent is one more stream with the same
weight. What differs between streams is chosen by a number that only the running program knows, so
that the code, and its registers, are those of one stream.

What a gated unit's result is made of lies in one tile, 8 columns or rows apart: there the matrix
units of NVIDIA leave all of it to one thread. Columns are 8 of W1's, then 8 of W2's; rows are 8
tokens, then their tangents. So the product is one, as wide as a tile may be, and its epilogue needs
nothing from other threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, norm, target, tl, tuning
from mfmjt.kernels.triton.device import await_launches, choose, locate, put
from mfmjt.kernels.triton.launching import dense, launch, present, strides
from mfmjt.kernels.triton.qk_norm_rope import angles, rotated

__all__ = ["precision", "project", "project_gated", "project_norm", "project_qkv", "takes"]
__all__ += ["window", "windows"]

MAX_HEAD = 128  # width of a head that fits into registers, beside the products that make it


class Windows(NamedTuple):
    """The sequences whose windows are multiplied, every field for all streams.

    Attributes:
        xs: (B, N, C), channels dense; for more taps than one, tokens one after the other.
        tokens: N.
        channels: C, in units: elements of an aligned load.
        taps: K.
        samples: Units from one sample to the next.
        steps: Units from one token to the next.
    """

    xs: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    channels: tuple[int, ...]
    taps: tuple[int, ...]
    samples: tuple[int, ...]
    steps: tuple[int, ...]


@jit
def window(sources, stream, row, inside, UNIT: tl.constexpr):
    """Return where the windows of rows (R,) begin, and the places of their first numbers.

    Args:
        sources: `Windows`.
        stream: One of them.
        row: Numbers of tokens, counted over all samples.
        inside: Which there are.
        UNIT: Elements per aligned load.

    Returns:
        Pointers (R, 1), places (R, 1) counted from the sample's first number, how many numbers a
        sample has, and a window; sample and token of each row. All but the last two are multiples
        of UNIT: so are groups of a mask, and a group is one load.
    """
    tokens, channels = choose(sources.tokens, stream), choose(sources.channels, stream)
    taps = choose(sources.taps, stream)
    sample = row // tokens
    token = row - sample * tokens
    begin = token - taps // 2
    at = sample.to(tl.int64) * choose(sources.samples, stream)
    at += begin.to(tl.int64) * choose(sources.steps, stream)
    first = tl.where(inside, begin * channels, tokens * channels)  # a row that is not has nothing
    return (
        choose(sources.xs, stream) + at[:, None] * UNIT,
        first[:, None] * UNIT,
        tokens * channels * UNIT,
        taps * channels * UNIT,
        sample,
        token,
    )


@jit
def _products(
    operands,
    stream,
    row,  # (R,)
    inside,
    out,  # (1, O)
    exists,  # likewise
    away,  # (R,), units to what is multiplied in place of a row; None for the rows themselves
    part,  # of PARTS, along the windows; the first has the biases
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """Return products of windows and filters, (R, O), and tokens (R,)."""
    sources, weights, biases = operands
    STORED: tl.constexpr = weights[0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    x, first, count, depth, _, token = window(sources, stream, row, inside, UNIT)
    if away is not None:
        x += away[:, None] * UNIT
    filters = choose(weights, stream) + out.to(tl.int64) * depth
    total = tl.zeros((row.shape[0], out.shape[1]), TYPE)
    first_k, end = 0, depth
    if PARTS > 1:
        length = tl.cdiv(tl.cdiv(depth, BLOCK_DEPTH), PARTS) * BLOCK_DEPTH
        first_k = part * length
        end = tl.minimum(depth, first_k + length)
    for start in range(first_k, end, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        i = first + k[None, :]
        a = tl.load(x + k[None, :], (i >= 0) & (i < count) & (k < depth)[None, :], 0.0)
        b = tl.load(filters + k[:, None], (k < depth)[:, None] & exists, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=TYPE)
    if biases is not None:
        bias = choose(biases[0], stream) + out
        exists = exists & (choose(biases[1], stream) == 1)
        if PARTS > 1:
            exists = exists & (part == 0)
        if len(biases) > 2:
            bias += token[:, None].to(tl.int64) * choose(biases[2], stream)
            exists = exists & inside[:, None]
        total += tl.load(bias, exists, 0.0).to(TYPE)
    return total, token


@jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@jit
def _activated(x, act):
    """Return silu of x where `act` is 1, selu where it is 2, else x."""
    negative = 1.6732632423543772 * (tl.exp(tl.minimum(x, 0.0)) - 1)
    selu = 1.0507009873554805 * tl.where(x > 0, x, negative)
    return tl.where(act == 1, _silu(x), tl.where(act == 2, selu, x))


@jit
def _columns_apart(tile):
    """Return the first 8 of every 16 columns, and the others."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    pairs = tl.reshape(tile, (rows, columns // 16, 2, 8))
    first, second = tl.split(tl.trans(pairs, (0, 1, 3, 2)))
    return tl.reshape(first, (rows, columns // 2)), tl.reshape(second, (rows, columns // 2))


@jit
def _rows_apart(tile):
    """Return the first 8 of every 16 rows, and the others."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    pairs = tl.reshape(tile, (rows // 16, 2, 8, columns))
    first, second = tl.split(tl.trans(pairs, (0, 2, 3, 1)))
    return tl.reshape(first, (rows // 2, columns)), tl.reshape(second, (rows // 2, columns))


@jit
def _product_kernel(
    operands,  # `Windows`, weights, and biases as `_operands` returns them
    acts,  # 1 for silu, 2 for selu; None where no stream has an activation
    ys,  # (rows, outs); of (PARTS, rows, outs) what is to be added up
    tiles,  # programs of each stream
    rows,
    outs,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    stream, tile, _ = locate(tiles, tl.program_id(0), 1)
    part = 0
    if PARTS > 1:
        part = tile % PARTS
        tile //= PARTS
    count = choose(outs, stream)
    blocks = tl.cdiv(count, BLOCK_OUTS)  # neighbours, which read the same rows
    row = (tile // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < choose(rows, stream)
    out = ((tile % blocks) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS))[None, :]
    total, _ = _products(
        operands,
        stream,
        row,
        inside,
        out,
        out < count,
        None,
        part,
        UNIT,
        PRECISION,
        BLOCK_DEPTH,
        PARTS,
    )
    if acts is not None:
        total = _activated(total, choose(acts, stream))
    place = row[:, None].to(tl.int64) * count + out
    if PARTS > 1:
        place += part * choose(rows, stream) * count  # few: they do not fill a GPU otherwise
    put(ys, stream, place, total, inside[:, None] & (out < count))


@jit
def _finish_kernel(
    parts,  # (PARTS, rows, outs) of each stream
    acts,  # as `_product_kernel` takes them
    ys,
    counts,  # blocks of each stream
    sizes,  # rows times outs
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    stream, block, _ = locate(counts, tl.program_id(0), 1)
    size = choose(sizes, stream)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    pointer = choose(parts, stream) + place
    total = tl.load(pointer, inside, 0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(pointer + part * size, inside, 0.0)
    if acts is not None:
        total = _activated(total, choose(acts, stream))
    put(ys, stream, place, total, inside)


@jit
def _product_gated_kernel(
    operands,  # weights are those of W1's outputs and then W2's; there are no biases
    x_dots,  # tangents, which lie in memory as `xs` do; None where none are wanted
    hs,  # (rows, 2 outs), both products of each row; None where no gradient will be
    ys,
    y_dots,  # None where no tangent is wanted
    tiles,
    rows,
    outs,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    ROWS: tl.constexpr = BLOCK_ROWS if x_dots is None else BLOCK_ROWS // 2
    OUTS: tl.constexpr = BLOCK_OUTS // 2
    stream, tile, _ = locate(tiles, tl.program_id(0), 1)
    count = choose(outs, stream)
    blocks = tl.cdiv(count, OUTS)
    first_row, first_out = (tile // blocks) * ROWS, (tile % blocks) * OUTS
    lane = tl.arange(0, BLOCK_ROWS)
    away = None
    if x_dots is None:
        row = first_row + lane
    else:
        row = first_row + lane // 16 * 8 + lane % 8
        # By numbers: AMD's compiler knows no choice between pointers that differs from row to row
        SIZE: tl.constexpr = UNIT * ys[0].dtype.element_ty.primitive_bitwidth // 8
        begin = choose(operands[0].xs, stream).to(tl.int64)
        to_dot = (choose(x_dots, stream).to(tl.int64) - begin) // SIZE
        away = (lane // 8 % 2).to(tl.int64) * to_dot
    lane = tl.arange(0, BLOCK_OUTS)[None, :]
    out = first_out + lane // 16 * 8 + lane % 8
    exists = out < count
    out += lane // 8 % 2 * count
    inside = row < choose(rows, stream)
    total, _ = _products(
        operands, stream, row, inside, out, exists, away, 0, UNIT, PRECISION, BLOCK_DEPTH
    )
    gate, up = _columns_apart(total)
    if x_dots is not None:
        gate, gate_dot = _rows_apart(gate)
        up, up_dot = _rows_apart(up)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    out = first_out + tl.arange(0, OUTS)[None, :]
    inside = (row < choose(rows, stream)) & (out < count)
    place = row.to(tl.int64) * count + out
    sigmoid = 1 / (1 + tl.exp(-gate))
    s = gate * sigmoid
    put(ys, stream, place, s * up, inside)
    put(hs, stream, place + row.to(tl.int64) * count, gate, inside)
    put(hs, stream, place + (row.to(tl.int64) + 1) * count, up, inside)
    if x_dots is not None:
        y_dot = (sigmoid + s * (1 - sigmoid)) * gate_dot * up + s * up_dot
        put(y_dots, stream, place, y_dot, inside)


@jit
def _product_qkv_kernel(
    operands,
    norms,  # of queries, of keys
    ropes,  # as `angles` takes them, or None
    ys,  # queries, keys, values
    tiles,
    rows,
    heads,
    width,
    EPS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
    stream, tile, _ = locate(tiles, tl.program_id(0), 1)
    part = tile % (3 * heads)  # one head of q, k or v
    which = part // heads
    row = tile // (3 * heads) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < choose(rows, stream)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    exists = inside[:, None] & (column < width)
    out, none = part * width + column, None
    total, token = _products(
        operands, stream, row, inside, out, column < width, none, 0, UNIT, PRECISION, BLOCK_DEPTH
    )
    pointer = choose((choose(norms[0], stream), choose(norms[1], stream)), which)
    weight = tl.load(pointer + column, (column < width) & (which < 2), 0.0).to(total.dtype)
    square = tl.sum(total * total, 1)[:, None] / width
    total = tl.where(which == 2, total, total * tl.rsqrt(square + EPS) * weight)
    turns = exists & (which < 2)
    token = token[:, None].to(tl.int64)
    if ropes is not None:
        cos, sin = angles(ropes, stream, token, column, width, turns, total.dtype)
        total = rotated(total, cos, sin)
    y = choose((choose(ys[0], stream), choose(ys[1], stream), choose(ys[2], stream)), which)
    y += (row[:, None].to(tl.int64) * heads + (part - which * heads)) * width + column
    tl.store(y, total, exists)


def takes(xs: list[Tensor]) -> bool:
    """Return False for float64 on a GPU, which has no matrix units for it, and beyond 32 bits."""
    double = xs[0].dtype == torch.float64 and not INTERPRETED
    counts = [(x.shape[0] * x.shape[1], x.shape[1] * x.shape[2]) for x in xs]
    return not double and all(rows < 2**31 and numbers < 2**30 for rows, numbers in counts)


def precision() -> str:
    """Return how float32 is multiplied: in full on AMD, elsewhere by three products in tf32."""
    return "ieee" if target()[0] == "hip" else "tf32x3"


def windows(
    xs: list[Tensor], taps: list[int], *sizes: int, beside: list[Tensor]
) -> tuple[Windows, int]:
    """Return windows of streams, and the unit of their sizes and strides.

    A unit is what one load may take at most: 16 bytes, and fewer where some row is no multiple of
    it (the 20 channels of a latent are 8-byte units).

    Args:
        xs: Of each stream.
        taps: Of each stream.
        *sizes: What else is to be a multiple of the unit.
        beside: What else is loaded by units.
    """
    packed = [
        x if k == 1 or x.shape[1] <= 1 or x.stride(1) == x.shape[2] else x.contiguous()
        for x, k in zip(map(dense, xs), taps, strict=True)
    ]
    # A window of one token only may begin before it, by the tokens that are not there
    steps = [
        (strides(x)[0], x.shape[2] if k > 1 else strides(x)[1])
        for x, k in zip(packed, taps, strict=True)
    ]
    starts = [x.data_ptr() // x.element_size() for x in (*packed, *beside)]
    channels = [x.shape[2] for x in packed]
    unit = math.gcd(
        16 // xs[0].element_size(), *sizes, *channels, *starts, *(n for pair in steps for n in pair)
    )
    fields: tuple[list[Any], ...] = (
        packed,
        [x.shape[1] for x in packed],
        [n // unit for n in channels],
        taps,
        [sample // unit for sample, _ in steps],
        [token // unit for _, token in steps],
    )
    return Windows(*map(tuple, fields)), unit


def _operands(
    xs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], *beside: Tensor
) -> tuple[tuple[Any, ...], int]:
    """Return windows, weights and biases as kernels take them, and the unit.

    What lies `beside` is loaded by units, too.

    Biases are pointers, which are there and, where one is per token, elements from one token's to
    the next; or None.
    """
    packed = tuple([weight.contiguous() for weight in weights])
    taps = [weight.shape[1] for weight in weights]
    sources, unit = windows(xs, taps, beside=[*packed, *beside])
    bias = present(biases)
    if bias is not None:
        steps = tuple([0 if b is None or b.ndim == 1 else b.shape[1] for b in biases])
        bias = (*bias, steps) if any(steps) else bias
    return (sources, packed, bias), unit


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
    if glu:
        return project_gated(xs, weights)
    pairs = zip(xs, weights, strict=True)
    results = [x.new_empty(*x.shape[:2], w.shape[0]) for x, w in pairs]
    xs, weights, biases, acts, ys = _not_empty(results, xs, weights, biases, acts, results)
    if ys:
        options = _options(xs, weights, finished=True)
        parts = options["PARTS"]
        given = acts if any(acts) else None
        if parts == 1:
            _launch_products(xs, weights, biases, given, ys, options)
            return results
        partial = _empty_parts(ys, parts)
        _launch_products(xs, weights, biases, None, partial, options)
        sizes, block = [y.numel() for y in ys], 1024
        blocks = [cdiv(size, block) for size in sizes]
        operands = partial, given, ys, blocks, sizes
        launch(_finish_kernel, (sum(blocks),), *operands, PARTS=parts, BLOCK=block)
    return results


def _options(xs: list[Tensor], weights: list[Tensor], finished: bool) -> tuning.Options:
    """Return the options of products; `finished` if another launch has to add up their parts."""
    rows = [x.shape[0] * x.shape[1] for x in xs]
    outs, depths = [w.shape[0] for w in weights], [w[0].numel() for w in weights]
    return tuning.product_parts(rows, outs, depths, xs[0].element_size(), finished)


def _empty_parts(ys: list[Tensor], parts: int) -> list[Tensor]:
    """Return memory for parts of products of these shapes."""
    return [y.new_empty(parts, *y.shape, dtype=work_dtype(y)) for y in ys]


def _launch_products(
    xs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    acts: list[int] | None,
    ys: list[Tensor],
    options: tuning.Options,
) -> None:
    """Launch `_product_kernel` into `ys`, (B, N, O) or all parts of it."""
    rows, outs = [x.shape[0] * x.shape[1] for x in xs], [y.shape[-1] for y in ys]
    tiles = [n * options["PARTS"] for n in _tiles(rows, outs, options)]
    operands, unit = _operands(xs, weights, biases)
    launch(
        _product_kernel,
        (sum(tiles),),
        *(operands, acts, ys, tiles, rows, outs),
        UNIT=unit,
        PRECISION=precision(),
        **options,
    )


def project_norm(
    ins: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    xs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> Any:
    """Launch products, in parts where that is faster, and the norm that adds them up."""
    if not takes(ins) or not all(x.numel() for x in (*ins, *xs)):
        return NotImplemented
    if not norm.fits(xs, rows, gates, shifts, scales):
        return NotImplemented
    options = _options(ins, weights, finished=False)
    parts = options["PARTS"]
    hs = _empty_parts(xs, parts) if parts > 1 else [x.new_empty(x.shape) for x in xs]
    _launch_products(ins, weights, biases, None, hs, options)
    found = norm.forward((hs, gates), xs, shifts, scales, None, eps, rows)
    return found[0], found[1]


def project_gated(
    xs: list[Tensor],
    weights: list[Tensor],
    x_dots: list[Tensor] | None = None,
    keep: bool = False,
) -> Any:
    """Launch gated units of streams (B, N, C) with weights (2 O, K, C), first W1's outputs.

    Args:
        xs: What `takes` takes.
        weights: Of each stream.
        x_dots: The tangents of all streams, or None.
        keep: Return both products too.

    Returns:
        Results (B, N, O); or a tuple of these, their tangents and the products (B, N, 2 O), without
        what was not asked for.
    """
    dual, pairs = x_dots is not None, list(zip(xs, weights, strict=True))
    results = [x.new_empty(*x.shape[:2], w.shape[0] // 2) for x, w in pairs]
    dots = [y.new_empty(y.shape) for y in results] if dual else None
    both = [x.new_empty(*x.shape[:2], w.shape[0]) for x, w in pairs] if keep else None
    lists = (xs, weights, x_dots or xs, results, dots or xs, both or xs)
    xs, weights, x_dots, ys, y_dots, hs = _not_empty(results, *lists)
    if ys:
        if dual:
            together = map(_alike, xs, x_dots)
            xs, x_dots = map(list, zip(*together, strict=True))
        rows, outs = [y.shape[0] * y.shape[1] for y in ys], [y.shape[2] for y in ys]
        in_tiles = [n * (1 + dual) for n in rows], [2 * o for o in outs]
        options = tuning.product(*in_tiles, xs[0].element_size(), gated=True)
        tiles = _tiles(*in_tiles, options)
        operands, unit = _operands(xs, weights, [None] * len(xs), *(x_dots if dual else ()))
        launch(
            _product_gated_kernel,
            (sum(tiles),),
            *(operands, x_dots if dual else None, hs if keep else None),
            *(ys, y_dots if dual else None, tiles, rows, outs),
            UNIT=unit,
            PRECISION=precision(),
            **options,
        )
    asked = [given for given in (results, dots, both) if given is not None]
    return tuple(asked) if len(asked) > 1 else results


def _tiles(rows: list[int], outs: list[int], options: tuning.Options) -> list[int]:
    """Return the programs of each stream."""
    blocks = options["BLOCK_ROWS"], options["BLOCK_OUTS"]
    return [cdiv(n, blocks[0]) * cdiv(o, blocks[1]) for n, o in zip(rows, outs, strict=True)]


def _alike(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they lie in memory alike; on AMD in one piece, within 32 bits of an offset."""
    if target()[0] == "hip":
        x, x_dot = torch.stack((x, x_dot))
    return x.contiguous(), x_dot.contiguous()


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
    results = [[x.new_empty(s) for x, s in zip(xs, shapes, strict=True)] for _ in range(3)]
    xs, weights, biases, q_norms, k_norms, ropes, *ys = _not_empty(
        results[0], xs, weights, biases, q_norms, k_norms, ropes, *results
    )
    if xs:
        rows = [x.shape[0] * x.shape[1] for x in xs]
        options = tuning.product_heads(rows, 3 * num_heads, width, xs[0].element_size())
        operands, unit = _operands(xs, weights, biases)
        norms = present([*q_norms, *k_norms])[0]
        tiles = [3 * num_heads * cdiv(n, options["BLOCK_ROWS"]) for n in rows]
        launch(
            _product_qkv_kernel,
            (sum(tiles),),
            *(operands, (norms[: len(xs)], norms[len(xs) :]), present(ropes)),
            *(ys, tiles, rows, num_heads, width),
            EPS=eps,
            UNIT=unit,
            PRECISION=precision(),
            **options,
        )
    return tuple(results)
