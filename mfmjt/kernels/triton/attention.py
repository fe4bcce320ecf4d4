"""Triton kernels of attention over streams: value and tangent, and gradients.

**Value and tangent.** One launch computes both over all streams of queries; its programs walk along
the streams of keys where they lie, and a stream without a tangent costs no matmul. With
p = 2^(S - top) and w = p (S_dot - c) a program sums

    l = sum p,  r = sum w,  o~ = p v,  T~ = w v + p v_dot;    o = o~ / l,  o_dot = (T~ - r o) / l

The center c is the mean of S_dot so far, and l and r are sums of p and w as rounded for the
matmuls: without both, bfloat16 loses ten times the digits. `lse` is to the base 2. float32 goes
through three TF32 matmuls. 4 B H N M D operations, 12 with all tangents.

**Gradients**, in two launches without atomics. From q, k, v, o and the log of each row's sum P is
made again:

    S_bar = P (o_bar v^T - delta),  delta = rowsum(o_bar o),  q_bar = scale S_bar k
    v_bar = P^T o_bar,  k_bar = scale S_bar^T q

A program of the first kernel has a block of queries, walks along the keys, and leaves delta to the
second, whose programs have a block of keys and walk along the queries. 14 B H N M D operations.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mfmjt.kernels.triton import jit, tl
from mfmjt.kernels.triton.device import choose, choose_view, fma, locate

__all__ = ["Sizes", "attention_bwd_kv_kernel", "attention_bwd_q_kernel", "attention_fwd_kernel"]


class Sizes(NamedTuple):
    """What every kernel takes besides tensors.

    Attributes:
        queries: Tokens of each stream.
        keys: Likewise.
        lengths: For each stream of keys, how many of a sample count, (B,), or None.
        all_queries: Those of all streams.
        heads: H.
        scale: Factor of the scores.
        scale_2: The same for exp2, the exponential that GPUs have.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    lengths: tuple[Tensor | None, ...]
    all_queries: int
    heads: int
    scale: float
    scale_2: float


@jit
def at_head(stream, sample, head, WIDTH: tl.constexpr):
    """Return a pointer to the first token of a head, and elements from one token to the next.

    The strides of a stream are in units of 8 elements where heads are a multiple of 8 wide
    (`joint_attention._view`): so Triton, which is told of multiples of 16 only, loads 8 elements at
    a time.
    """
    UNIT: tl.constexpr = 8 if WIDTH % 8 == 0 else 1
    pointer, sample_stride, token_stride, head_stride = stream
    return pointer + (sample * sample_stride + head * head_stride) * UNIT, token_stride * UNIT


@jit
def load(rows, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile (BLOCK, COLUMNS) from a column on, zeros where there is nothing.

    `rows` are (view of a stream, sample, head, first token, one past the last that counts).
    """
    stream, sample, head, start, limit = rows
    token = tl.arange(0, BLOCK)[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    inside = token < limit - start
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)
    pointer, stride = at_head(stream, sample, head, WIDTH)
    pointer += start * stride
    return tl.load(pointer + (token * stride + column), inside, 0.0)


@jit
def store(pointer, tile, place, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile, from a column on, into a dense (B, count, H, WIDTH) result.

    `place` is (sample, head, H, first token, count).
    """
    sample, head, heads, start, count = place
    token = tl.arange(0, tile.shape[0])[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    inside = token < count - start
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)
    pointer += ((sample * count + start) * heads + head) * WIDTH
    tl.store(pointer + (token * (heads * WIDTH) + column), tile, inside)


@jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b, in the dtype of total."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def tile_of(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows for `load` and, where it is whole, their tile, for many `add_products`."""
    tile = 0  # nothing
    if COLUMNS >= WIDTH:
        tile = load(rows, 0, WIDTH, BLOCK, COLUMNS)
    return rows, tile


@jit
def add_products(total, a, b, WIDTH: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr):
    """Return total + a b^T of a `tile_of` and rows for `load`, some columns at a time."""
    rows, tile = a
    if COLUMNS >= WIDTH:
        y = load(b, 0, WIDTH, total.shape[1], COLUMNS)
        total = dot(tile, tl.trans(y), total, PRECISION)
    else:
        for column in range(0, WIDTH, COLUMNS):
            x = load(rows, column, WIDTH, total.shape[0], COLUMNS)
            y = load(b, column, WIDTH, total.shape[1], COLUMNS)
            total = dot(x, tl.trans(y), total, PRECISION)
    return total


@jit
def keys_of(sizes, stream, sample):
    """Return how many keys of a sample count; they are the first of the stream."""
    limit = sizes.keys[stream]
    if sizes.lengths[stream] is not None:
        limit = tl.minimum(tl.load(sizes.lengths[stream] + sample), limit).to(tl.int32)
    return limit


@jit
def block_of(tokens, heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return what this program computes: pair of sample and head, first column, stream, and place.

    `place` is (sample, head, H, first token, tokens of the stream).
    """
    tiles = 0
    for s in tl.static_range(len(tokens)):
        tiles += tl.cdiv(tokens[s], BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = pair // heads, pair % heads
    column = 0
    if COLUMNS < WIDTH:
        column = tl.program_id(1) * COLUMNS
    stream, first, count = locate(tokens, tl.program_id(0) % tiles, BLOCK)
    return pair, column, stream, (sample, head, heads, first, count)


@jit
def attention_fwd_kernel(
    q,  # views, one for each stream
    k,
    v,
    q_dot,  # None where no query moves, or pointers: strides are those of q
    k_dot,  # pointers, None for a stream that does not move
    v_dot,
    o,  # pointers, one for each stream of queries
    o_dot,  # None where no tangent is wanted
    lse,
    sizes,  # `Sizes`
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # columns of q and k at a time: all, or where those are too many, some
    BLOCK_OUT: tl.constexpr,  # columns of v and o in one program: likewise
):
    """Compute o, o_dot and lse of a block of queries."""
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(sizes.queries, sizes.heads, WIDTH, BLOCK_N, BLOCK_OUT)
    sample, head, _, first, count = place
    own = choose_view(q, stream)
    query = tile_of((own, sample, head, first, count), WIDTH, BLOCK_N, BLOCK_IN)
    if q_dot is not None:
        own_dot = (choose(q_dot, stream), own[1], own[2], own[3])
        query_dot = tile_of((own_dot, sample, head, first, count), WIDTH, BLOCK_N, BLOCK_IN)

    key = tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_N], float("-inf"), TYPE)
    total = tl.zeros([BLOCK_N], TYPE)  # sum of p; and of p as rounded for the matmul
    total_rounded = total
    total_w = total
    center = total
    out = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    out_dot = out
    for s in tl.static_range(len(k)):
        limit = keys_of(sizes, s, sample)
        own_k_dot = (k_dot[s], k[s][1], k[s][2], k[s][3])
        own_v_dot = (v_dot[s], v[s][1], v[s][2], v[s][3])
        if o_dot is not None and q_dot is None and k_dot[s] is None:
            # S_dot is zero, and so is W, if the center is
            out_dot += center[:, None] * out
            total_w += center * total_rounded
            center = tl.zeros([BLOCK_N], TYPE)
        for start in range(0, limit, BLOCK_M):
            score = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            score_dot = score
            rows = (k[s], sample, head, start, limit)
            score = add_products(score, query, rows, WIDTH, PRECISION, BLOCK_IN)
            if q_dot is not None:
                score_dot = add_products(score_dot, query_dot, rows, WIDTH, PRECISION, BLOCK_IN)
            if k_dot[s] is not None:
                rows = (own_k_dot, sample, head, start, limit)
                score_dot = add_products(score_dot, query, rows, WIDTH, PRECISION, BLOCK_IN)
            score = tl.where((key < limit - start)[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            # What rounds is the same for a whole row, and so leaves P as it is
            new_top_2 = new_top * sizes.scale_2
            p = tl.exp2(fma(score, sizes.scale_2, -new_top_2[:, None]))
            shrink = tl.exp2(fma(top, sizes.scale_2, -new_top_2))
            top = new_top
            sum_p = tl.sum(p, 1)
            p_rounded = p.to(STORED)
            total_rounded *= shrink
            total_w *= shrink
            rows = (v[s], sample, head, start, limit)
            b = load(rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
            if q_dot is not None or k_dot[s] is not None:
                # The center is the mean of S_dot so far: it takes a common offset off before W is
                # rounded. What was summed with another center moves along.
                score_dot *= sizes.scale
                new = total_w + center * total_rounded + tl.sum(p * score_dot, 1)
                new = new / (total_rounded + sum_p)
                shift = center - new
                center = new
                w = (p * (score_dot - center[:, None])).to(STORED)
                total_w += shift * total_rounded + tl.sum(w.to(TYPE), 1)
                out_dot = out_dot * shrink[:, None] + out * (shift * shrink)[:, None]
                out_dot = dot(w, b, out_dot, PRECISION)
            elif o_dot is not None:
                out_dot *= shrink[:, None]
            out *= shrink[:, None]
            out = dot(p_rounded, b, out, PRECISION)
            if v_dot[s] is not None:
                rows = (own_v_dot, sample, head, start, limit)
                b = load(rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
                out_dot = dot(p_rounded, b, out_dot, PRECISION)
            total = total * shrink + sum_p
            # The sums that divide are those of the very numbers that were multiplied
            if STORED != TYPE:
                sum_p = tl.sum(p_rounded.to(TYPE), 1)
            total_rounded += sum_p

    nothing = total == 0
    inverse = tl.where(nothing, 0.0, 1 / tl.where(nothing, 1.0, total_rounded))[:, None]
    out *= inverse
    store(choose(o, stream), out, place, column, WIDTH, BLOCK_OUT)
    if o_dot is not None:
        out_dot = (out_dot - total_w[:, None] * out) * inverse
        store(choose(o_dot, stream), out_dot, place, column, WIDTH, BLOCK_OUT)
    token = tl.arange(0, BLOCK_N)
    sums = top * sizes.scale_2 + tl.log2(tl.where(nothing, 1.0, total))
    row = choose(lse, stream) + pair * sizes.all_queries + first
    here = token < tl.where(tl.program_id(1) == 0, count - first, 0)  # once is enough
    tl.store(row + token, tl.where(nothing, 0.0, sums), here)


@jit
def attention_bwd_q_kernel(
    q,  # views, one for each stream
    k,
    v,
    o_bar,
    o,
    q_bar,  # pointers, one for each stream of queries
    delta,  # receives rowsum(o_bar o)
    lse,
    sizes,  # `Sizes`
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Compute q_bar and delta of a block of queries."""
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(sizes.queries, sizes.heads, WIDTH, BLOCK_N, BLOCK_OUT)
    sample, head, _, first, count = place
    o_rows = (choose_view(o, stream), sample, head, first, count)
    o_bar_rows = (choose_view(o_bar, stream), sample, head, first, count)
    center = tl.zeros([BLOCK_N], TYPE)
    for part in range(0, WIDTH, BLOCK_IN):
        a = load(o_rows, part, WIDTH, BLOCK_N, BLOCK_IN)
        b = load(o_bar_rows, part, WIDTH, BLOCK_N, BLOCK_IN)
        center += tl.sum(a.to(TYPE) * b.to(TYPE), 1)
    token = tl.arange(0, BLOCK_N)
    row = pair * sizes.all_queries + first
    here = token < count - first
    once = token < tl.where(tl.program_id(1) == 0, count - first, 0)
    tl.store(choose(delta, stream) + row + token, center, once)
    sums = tl.load(choose(lse, stream) + row + token, here, 0.0)
    query = tile_of((choose_view(q, stream), sample, head, first, count), WIDTH, BLOCK_N, BLOCK_IN)
    out_bar = tile_of(o_bar_rows, WIDTH, BLOCK_N, BLOCK_IN)

    key = tl.arange(0, BLOCK_M)
    query_bar = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    for s in tl.static_range(len(k)):
        limit = keys_of(sizes, s, sample)
        for start in range(0, limit, BLOCK_M):
            zeros = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            k_rows = (k[s], sample, head, start, limit)
            score = add_products(zeros, query, k_rows, WIDTH, PRECISION, BLOCK_IN)
            p_bar = add_products(
                zeros, out_bar, (v[s], sample, head, start, limit), WIDTH, PRECISION, BLOCK_IN
            )
            score = tl.where((key < limit - start)[None, :], score, float("-inf"))
            p = tl.exp2(fma(score, sizes.scale_2, -sums[:, None]))
            score_bar = (p * (p_bar - center[:, None])).to(STORED)
            a = load(k_rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
            query_bar = dot(score_bar, a, query_bar, PRECISION)
    query_bar *= sizes.scale
    store(choose(q_bar, stream), query_bar, place, column, WIDTH, BLOCK_OUT)


@jit
def attention_bwd_kv_kernel(
    q,  # views, one for each stream
    k,
    v,
    o_bar,
    k_bar,  # pointers, one for each stream of keys
    v_bar,
    delta,  # and of queries
    lse,
    sizes,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Compute k_bar and v_bar of a block of keys."""
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(sizes.keys, sizes.heads, WIDTH, BLOCK_M, BLOCK_OUT)
    sample, head, _, first, count = place
    limit = count
    for s in tl.static_range(len(k)):
        if sizes.lengths[s] is not None:
            limit = tl.where(stream == s, keys_of(sizes, s, sample), limit)
    key = tile_of((choose_view(k, stream), sample, head, first, limit), WIDTH, BLOCK_M, BLOCK_IN)
    value = tile_of((choose_view(v, stream), sample, head, first, limit), WIDTH, BLOCK_M, BLOCK_IN)

    key_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    value_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    token = tl.arange(0, BLOCK_N)
    for s in tl.static_range(len(q)):
        stop = tl.where(first < limit, sizes.queries[s], 0)  # padding alone: nothing to do
        for start in range(0, stop, BLOCK_N):
            zeros = tl.zeros([BLOCK_M, BLOCK_N], TYPE)
            q_rows = (q[s], sample, head, start, stop)
            o_bar_rows = (o_bar[s], sample, head, start, stop)
            score = add_products(zeros, key, q_rows, WIDTH, PRECISION, BLOCK_IN)
            p_bar = add_products(zeros, value, o_bar_rows, WIDTH, PRECISION, BLOCK_IN)
            row = pair * sizes.all_queries + start
            here = token < stop - start
            sums = tl.load(lse[s] + row + token, here, float("inf"))
            center = tl.load(delta[s] + row + token, here, 0.0)
            p = tl.exp2(fma(score, sizes.scale_2, -sums[None, :]))
            b = load(o_bar_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
            value_bar = dot(p.to(STORED), b, value_bar, PRECISION)
            score_bar = (p * (p_bar - center[None, :])).to(STORED)
            a = load(q_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
            key_bar = dot(score_bar, a, key_bar, PRECISION)
    counts = (tl.arange(0, BLOCK_M) < limit - first)[:, None]
    key_bar = tl.where(counts, key_bar * sizes.scale, 0.0)
    value_bar = tl.where(counts, value_bar, 0.0)
    store(choose(k_bar, stream), key_bar, place, column, WIDTH, BLOCK_OUT)
    store(choose(v_bar, stream), value_bar, place, column, WIDTH, BLOCK_OUT)
