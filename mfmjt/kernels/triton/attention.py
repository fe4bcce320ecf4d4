"""Triton kernels of attention over streams: value and tangent, and gradients.

**Value and tangent.** One launch computes both over all streams of queries. A program takes a block
of queries through one loop over the tiles of all streams of keys, where they lie, so that loads run
ahead across their ends. Streams of which the same moves share a loop; what does not move costs no
matmul. With p = 2^(S - top) and w = p (S_dot - c) a program sums

    l = sum p,  r = sum w,  o~ = p v,  T~ = w v + p v_dot;    o = o~ / l,  o_dot = (T~ - r o) / l

The center c is the mean of S_dot, anew every 128 keys of a stream or fewer, and l and r are sums of
p and w as rounded for the matmuls: without both, bfloat16 loses ten times the digits. Tensor cores
add them up, as matmuls with ones: on sm_90 the compiler converts one number at a time, and slowly,
for a sum of rounded numbers. `lse` is to the base 2. float32 goes through three TF32 matmuls.
4 B H N M D operations, 12 with all tangents.

Masks and causal order hide keys: their S is -inf. All tokens are one stream then. A first launch
lists for each block the tiles in which anybody sees anything; the others are not visited. Causal
order alone needs no list. The center moves with every tile, as any of them may be the first.

A branch that rescales only when the maximum grows by much needs the maximum of all warps before any
exponential, and P waits for S_dot then: more cycles than the multiplications that it spares.

**Gradients**, in two launches without atomics. From q, k, v, o and the log of each row's sum P is
made again:

    S_bar = P (o_bar v^T - delta),  delta = rowsum(o_bar o),  q_bar = scale S_bar k
    v_bar = P^T o_bar,  k_bar = scale S_bar^T q

A program of the first kernel has a block of queries, loops over the keys, and leaves delta to the
second, whose programs have a block of keys and loop over the queries. 14 B H N M D operations.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mfmjt.kernels.triton import jit, tl
from mfmjt.kernels.triton.device import (
    await_launches,
    choose,
    choose_field,
    choose_view,
    fma,
    locate,
)

__all__ = [
    "Mask",
    "Sizes",
    "attention_bwd_kv_kernel",
    "attention_bwd_q_kernel",
    "attention_fwd_kernel",
    "attention_visits_kernel",
]


class Sizes(NamedTuple):
    """What every kernel takes besides tensors.

    Attributes:
        queries: Tokens of each stream.
        lengths: For each group of streams of keys, and each stream, how many of a sample count,
            (B,), or None.
        all_queries: Those of all streams.
        heads: Of what is cut into blocks: H of queries, or of keys.
        scale: Factor of the scores.
        scale_2: The same for exp2, the exponential that GPUs have.
    """

    queries: tuple[int, ...]
    lengths: tuple[tuple[Tensor | None, ...], ...]
    all_queries: int
    heads: int
    scale: float
    scale_2: float


class Mask(NamedTuple):
    """Which keys a query sees, or what is added to its scores.

    Attributes:
        tensor: Bytes, 0 for what is hidden, or numbers to add, -inf for it.
        strides: From one sample, head, query and key to the next; 0 where they share what is there.
        visits: What `attention_visits_kernel` found for the blocks of this launch.
        visit_strides: From one sample, head and block to the next, likewise.
    """

    tensor: Tensor
    strides: tuple[int, ...]
    visits: Tensor
    visit_strides: tuple[int, ...]


@jit
def at_head(view, sample, head, WIDTH: tl.constexpr):
    """Return a pointer to the first token of a head, and elements from one token to the next.

    The strides of a view are in units of 8 elements where heads are a multiple of 8 wide
    (`joint_attention._view`): so Triton, which is told of multiples of 16 only, loads 8 elements at
    a time.
    """
    UNIT: tl.constexpr = 8 if WIDTH % 8 == 0 else 1
    pointer, sample_stride, token_stride, head_stride = view
    return pointer + (sample * sample_stride + head * head_stride) * UNIT, token_stride * UNIT


@jit
def at_heads(views, others, dots, other_dots, sample, head, WIDTH: tl.constexpr):
    """Return for each stream `at_head`, and the same place in three tensors of its strides.

    Args:
        views: Of all streams.
        others: Pointers, one for each stream.
        dots: Likewise, or None: then the place is one that is never read.
        other_dots: Likewise.
        sample: The sample's number.
        head: The head's.
        WIDTH: D.
    """
    found = ()
    for s in tl.static_range(len(views)):
        view = views[s]
        first, stride = at_head(view, sample, head, WIDTH)
        second = at_head((others[s], view[1], view[2], view[3]), sample, head, WIDTH)[0]
        third = first
        if dots is not None:
            third = at_head((dots[s], view[1], view[2], view[3]), sample, head, WIDTH)[0]
        fourth = first
        if other_dots is not None:
            fourth = at_head((other_dots[s], view[1], view[2], view[3]), sample, head, WIDTH)[0]
        found += ((first, stride, second, third, fourth),)  # type: ignore[assignment]
    return found


@jit
def load(rows, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile (BLOCK, COLUMNS) from a column on, zeros beyond the last.

    `rows` are (pointer to a head's first token, elements from one token to the next, first token of
    the tile, one past the last that counts). Beyond that comes the last one again, which takes
    fewer instructions than a mask, and is left out by its P, which is 0.
    """
    pointer, stride, start, limit = rows
    token = tl.minimum(start + tl.arange(0, BLOCK), tl.maximum(limit, 1) - 1)[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    pointers = pointer + (token * stride + column)
    whole: tl.constexpr = WIDTH % COLUMNS == 0
    return tl.load(pointers) if whole else tl.load(pointers, column < WIDTH, 0.0)


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
def limits_of(counts, sizes, group: tl.constexpr, sample, BLOCK: tl.constexpr):
    """Return how many tokens of each stream count, the first ones, and the tiles of all streams.

    `group` is None for streams of queries, all of which count.
    """
    limits = ()
    tiles = 0
    for s in tl.static_range(len(counts)):
        limit = tl.cast(counts[s], tl.int32)
        if group is not None and sizes.lengths[group][s] is not None:
            limit = tl.minimum(tl.load(sizes.lengths[group][s] + sample), limit).to(tl.int32)
        limits += (limit,)  # type: ignore[assignment]
        tiles += tl.cdiv(limit, BLOCK)
    return limits, tiles


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
def enter(streams, limits, tile, BLOCK: tl.constexpr):
    """Return what a stream's tiles share: its fields, its tokens, its first tile and the next's.

    Args:
        streams: For each stream a tuple of pointers and strides.
        limits: Its tokens that count.
        tile: The number of its first tile among those of all streams.
        BLOCK: Tokens of a tile.
    """
    stream, _, limit = locate(limits, tile, BLOCK)
    fields = ()
    for i in tl.static_range(len(streams[0])):
        fields += (choose_field(streams, i, stream),)  # type: ignore[assignment]
    return fields, limit, tile, tile + tl.cdiv(limit, BLOCK)


@jit
def at_mask(mask, sample, head):
    """Return a pointer to what a mask says of a sample and head; 0 without a mask."""
    found = 0
    if mask is not None:
        found = mask.tensor + (sample * mask.strides[0] + head * mask.strides[1])
    return found


@jit
def visited(mask, sample, head, block):
    """Return where the tiles are listed that a block visits, and how many these are."""
    by_sample, by_head, by_block = mask.visit_strides
    row = mask.visits + (sample * by_sample + head * by_head + block * by_block)
    return row + 1, tl.load(row)


@jit
def said_of(mask, pointer, first, query, start, key):
    """Load what a mask says of the pairs of a tile; 0 without a mask.

    Args:
        mask: `Mask` or None.
        pointer: `at_mask`.
        first: The tile's first query.
        query: Numbers of its queries from there on, as rows or columns.
        start: The tile's first key.
        key: Numbers of its keys from there on, the other way.
    """
    said = 0
    if mask is not None:
        by_query, by_key = mask.strides[2], mask.strides[3]
        pointer += tl.cast(first, tl.int64) * by_query + tl.cast(start, tl.int64) * by_key
        said = tl.load(pointer + (query * by_query + key * by_key))
    return said


@jit
def hide(score, mask, said, first, query, start, key, scale, CAUSAL: tl.constexpr):
    """Return S / scale with what a mask adds, -inf for what is hidden.

    Args:
        score: S / scale of a tile.
        mask: `Mask` or None.
        said: `said_of` of the tile.
        first: The tile's first query.
        query: Numbers of its queries from there on, as rows or columns.
        start: The tile's first key.
        key: Numbers of its keys from there on, the other way.
        scale: Factor of S.
        CAUSAL: Later keys are hidden.
    """
    if mask is not None:
        if said.dtype == tl.uint8:
            score = tl.where(said == 0, float("-inf"), score)
        else:
            added = fma(said.to(score.dtype), 1 / scale, score)
            score = tl.where(said == float("-inf"), float("-inf"), added)
    if CAUSAL:
        score = tl.where(key + (start - first) > query, float("-inf"), score)
    return score


@jit
def attention_visits_kernel(
    mask,  # as `Mask` has it
    strides,  # from one sample, head, row and column to the next
    visits,  # (samples, heads, blocks, 1 + tiles): receives how many, and then which
    lengths,  # columns of each sample that count, or None
    sizes,  # (heads, rows, columns)
    MEMBERS: tl.constexpr,  # heads of the mask for each of the result
    CAUSAL: tl.constexpr,
    BY_KEYS: tl.constexpr,  # rows are keys, and columns queries
    BLOCK: tl.constexpr,  # rows
    TILE: tl.constexpr,  # columns
):
    """List for a block of rows the tiles of columns with anything that is not hidden."""
    heads, rows, columns = sizes
    blocks = tl.cdiv(rows, BLOCK)
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    mask += sample * strides[0] + head * MEMBERS * strides[1]
    visits += tl.program_id(0).to(tl.int64) * (1 + tl.cdiv(columns, TILE))
    row = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), rows - 1).to(tl.int64)
    mask += row[:, None] * strides[2]
    begin, end = 0, columns
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + sample), end).to(tl.int32)
    if CAUSAL:
        if BY_KEYS:
            begin = block * BLOCK // TILE
        else:
            end = tl.minimum(end, block * BLOCK + BLOCK)
    count = 0
    for tile in range(begin, tl.cdiv(end, TILE)):
        column = tl.minimum(tile * TILE + tl.arange(0, TILE), end - 1)[None, :]
        seen = 0
        for member in range(0, MEMBERS):
            said = tl.load(mask + (member * strides[1] + column * strides[3]))
            hidden: tl.constexpr = 0 if said.dtype == tl.uint8 else float("-inf")
            shown = (said != hidden).to(tl.int32)
            seen = tl.maximum(seen, tl.max(tl.max(shown, 1), 0))
        tl.store(visits + 1 + count, tile, seen > 0)
        count += seen
    tl.store(visits, count)


@jit
def attention_fwd_kernel(
    q,  # views, one for each stream
    q_dot,  # None where no query moves, or pointers: strides are those of q
    k,  # views, for each group of streams of which the same moves
    v,  # pointers likewise: strides are those of k
    k_dot,  # likewise, None for a group that does not move
    v_dot,
    counts,  # tokens of each stream, by groups
    o,  # pointers, one for each stream of queries
    o_dot,  # None where no tangent is wanted
    lse,
    mask,  # `Mask` or None
    sizes,  # `Sizes`
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for each of keys
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # columns of q and k at a time: all, or where those are too many, some
    BLOCK_OUT: tl.constexpr,  # columns of v and o in one program: likewise
    EVERY: tl.constexpr,  # keys of a stream after which the center moves
    EARLY: tl.constexpr,
):
    """Compute o, o_dot and lse of a block of queries."""
    await_launches(EARLY)
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    SUMS: tl.constexpr = 8  # columns, all alike, of a matmul with ones
    HIDES: tl.constexpr = CAUSAL or mask is not None
    pair, column, stream, place = block_of(sizes.queries, sizes.heads, WIDTH, BLOCK_N, BLOCK_OUT)
    sample, head, _, first, count = place
    own = choose_view(q, stream)
    pointer, stride = at_head(own, sample, head, WIDTH)
    query = tile_of((pointer, stride, first, count), WIDTH, BLOCK_N, BLOCK_IN)
    if q_dot is not None:
        own_dot = (choose(q_dot, stream), own[1], own[2], own[3])
        pointer, stride = at_head(own_dot, sample, head, WIDTH)
        query_dot = tile_of((pointer, stride, first, count), WIDTH, BLOCK_N, BLOCK_IN)
    own_row = tl.minimum(tl.arange(0, BLOCK_N), count - first - 1)[:, None]
    own_mask = at_mask(mask, sample, head)
    key = tl.arange(0, BLOCK_M)
    ones = tl.full([BLOCK_M, SUMS], 1.0, STORED)
    top = tl.full([BLOCK_N], float("-inf"), TYPE)
    center = tl.zeros([BLOCK_N], TYPE)
    sum_p = tl.zeros([BLOCK_N, SUMS], TYPE)
    sum_w = sum_p
    out = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    out_dot = out
    for g in tl.static_range(len(k)):
        if o_dot is not None and q_dot is None and k_dot[g] is None:
            # S_dot is zero, and so is W, if the center is
            out_dot += center[:, None] * out
            sum_w += center[:, None] * sum_p
            center = tl.zeros([BLOCK_N], TYPE)
        streams = at_heads(k[g], v[g], k_dot[g], v_dot[g], sample, head // GROUP, WIDTH)
        limits, tiles = limits_of(counts[g], sizes, g, sample, BLOCK_M)
        if CAUSAL:
            limits = (tl.minimum(limits[0], first + BLOCK_N),)
            tiles = tl.cdiv(limits[0], BLOCK_M)
        if mask is not None:
            visits, tiles = visited(mask, sample, head, first // BLOCK_N)
        fields, limit, since, until = enter(streams, limits, 0, BLOCK_M)
        for step in range(0, tiles):
            tile = step
            if mask is not None:
                tile = tl.load(visits + step)
            if len(k[g]) > 1 and tile == until:
                fields, limit, since, until = enter(streams, limits, tile, BLOCK_M)
            own_k, stride, own_v, own_k_dot, own_v_dot = fields
            start = (tile - since) * BLOCK_M
            other = tl.minimum(key, limit - start - 1)[None, :]
            said = said_of(mask, own_mask, first, own_row, start, other)
            zeros = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            rows = (own_k, stride, start, limit)
            score = add_products(zeros, query, rows, WIDTH, PRECISION, BLOCK_IN)
            score_dot = zeros
            if q_dot is not None:
                score_dot = add_products(score_dot, query_dot, rows, WIDTH, PRECISION, BLOCK_IN)
            if k_dot[g] is not None:
                rows = (own_k_dot, stride, start, limit)
                score_dot = add_products(score_dot, query, rows, WIDTH, PRECISION, BLOCK_IN)
            if HIDES:
                score = hide(score, mask, said, first, own_row, start, other, sizes.scale, CAUSAL)
                score_dot = tl.where(score == float("-inf"), 0.0, score_dot)
            new_top = tl.maximum(top, tl.max(score, 1))
            # What rounds is the same for a whole row, and so leaves P as it is
            new_top_2 = new_top * sizes.scale_2
            if HIDES:  # no key so far
                new_top_2 = tl.where(new_top == float("-inf"), 0.0, new_top_2)
            p = tl.exp2(fma(score, sizes.scale_2, -new_top_2[:, None]))
            if limit - start < BLOCK_M:
                p = tl.where((key < limit - start)[None, :], p, 0.0)
            shrink = tl.exp2(fma(top, sizes.scale_2, -new_top_2))[:, None]
            top = new_top
            p_rounded = p.to(STORED)
            sum_before = sum_p * shrink
            sum_p = dot(p_rounded, ones, sum_before, PRECISION)
            out *= shrink
            b = load((own_v, stride, start, limit), column, WIDTH, BLOCK_M, BLOCK_OUT)
            if o_dot is not None:
                out_dot *= shrink
                sum_w *= shrink
            if q_dot is not None or k_dot[g] is not None:
                if EVERY == BLOCK_M or start % EVERY == 0:
                    # The center becomes the mean of S_dot so far: it takes a common offset off
                    # before W is rounded. What was summed with another one moves along.
                    moment = (tl.sum(p * score_dot, 1) * sizes.scale)[:, None]
                    root = tl.rsqrt(tl.where(sum_p == 0, 1.0, sum_p) if HIDES else sum_p)
                    moment = sum_w + center[:, None] * sum_before + moment
                    new = tl.max(moment * root * root, 1)
                    shift = (center - new)[:, None]
                    center = new
                    sum_w += shift * sum_before
                    out_dot += shift * out
                w = (p * fma(score_dot, sizes.scale, -center[:, None])).to(STORED)
                sum_w = dot(w, ones, sum_w, PRECISION)
                out_dot = dot(w, b, out_dot, PRECISION)
            out = dot(p_rounded, b, out, PRECISION)
            if v_dot[g] is not None:
                b = load((own_v_dot, stride, start, limit), column, WIDTH, BLOCK_M, BLOCK_OUT)
                out_dot = dot(p_rounded, b, out_dot, PRECISION)

    total = tl.max(sum_p, 1)
    nothing = total == 0
    inverse = tl.where(nothing, 0.0, 1 / tl.where(nothing, 1.0, total))[:, None]
    out *= inverse
    store(choose(o, stream), out, place, column, WIDTH, BLOCK_OUT)
    if o_dot is not None:
        out_dot = (out_dot - tl.max(sum_w, 1)[:, None] * out) * inverse
        store(choose(o_dot, stream), out_dot, place, column, WIDTH, BLOCK_OUT)
    token = tl.arange(0, BLOCK_N)
    sums = top * sizes.scale_2 + tl.log2(tl.where(nothing, 1.0, total))
    row = choose(lse, stream) + pair * sizes.all_queries + first
    here = token < tl.where(tl.program_id(1) == 0, count - first, 0)  # once is enough
    tl.store(row + token, tl.where(nothing, 0.0, sums), here)


@jit
def attention_bwd_q_kernel(
    q,  # views, one for each stream
    o_bar,  # pointers: strides are those of q
    o,  # views
    k,  # views, one for each stream of keys
    v,  # pointers: strides are those of k
    counts,  # tokens of each of these streams
    q_bar,  # pointers, one for each stream of queries
    delta,  # receives rowsum(o_bar o)
    lse,
    mask,  # `Mask` or None
    sizes,  # `Sizes`
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for each of keys
    CAUSAL: tl.constexpr,
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
    own = choose_view(q, stream)
    pointer, stride = at_head(own, sample, head, WIDTH)
    q_rows = (pointer, stride, first, count)
    own_bar = (choose(o_bar, stream), own[1], own[2], own[3])
    o_bar_rows = (at_head(own_bar, sample, head, WIDTH)[0], stride, first, count)
    pointer, stride = at_head(choose_view(o, stream), sample, head, WIDTH)
    o_rows = (pointer, stride, first, count)
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
    query = tile_of(q_rows, WIDTH, BLOCK_N, BLOCK_IN)
    out_bar = tile_of(o_bar_rows, WIDTH, BLOCK_N, BLOCK_IN)

    own_row = tl.minimum(token, count - first - 1)[:, None]
    own_mask = at_mask(mask, sample, head)
    key = tl.arange(0, BLOCK_M)
    query_bar = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    streams = at_heads(k, v, None, None, sample, head // GROUP, WIDTH)
    limits, tiles = limits_of(counts, sizes, 0, sample, BLOCK_M)
    if CAUSAL:
        limits = (tl.minimum(limits[0], first + BLOCK_N),)
        tiles = tl.cdiv(limits[0], BLOCK_M)
    if mask is not None:
        visits, tiles = visited(mask, sample, head, first // BLOCK_N)
    fields, limit, since, until = enter(streams, limits, 0, BLOCK_M)
    for step in range(0, tiles):
        tile = step
        if mask is not None:
            tile = tl.load(visits + step)
        if len(k) > 1 and tile == until:
            fields, limit, since, until = enter(streams, limits, tile, BLOCK_M)
        own_k, stride, own_v = fields[0], fields[1], fields[2]
        start = (tile - since) * BLOCK_M
        other = tl.minimum(key, limit - start - 1)[None, :]
        said = said_of(mask, own_mask, first, own_row, start, other)
        zeros = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
        k_rows = (own_k, stride, start, limit)
        score = add_products(zeros, query, k_rows, WIDTH, PRECISION, BLOCK_IN)
        v_rows = (own_v, stride, start, limit)
        p_bar = add_products(zeros, out_bar, v_rows, WIDTH, PRECISION, BLOCK_IN)
        score = hide(score, mask, said, first, own_row, start, other, sizes.scale, CAUSAL)
        p = tl.exp2(fma(score, sizes.scale_2, -sums[:, None]))
        if limit - start < BLOCK_M:
            p = tl.where((key < limit - start)[None, :], p, 0.0)
        score_bar = (p * (p_bar - center[:, None])).to(STORED)
        a = load(k_rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
        query_bar = dot(score_bar, a, query_bar, PRECISION)
    query_bar *= sizes.scale
    store(choose(q_bar, stream), query_bar, place, column, WIDTH, BLOCK_OUT)


@jit
def attention_bwd_kv_kernel(
    q,  # views, one for each stream
    o_bar,  # pointers: strides are those of q
    k,  # views, one for each stream of keys
    v,  # pointers: strides are those of k
    counts,  # tokens of each of these streams
    k_bar,  # pointers, one for each stream of keys
    v_bar,
    delta,  # and of queries
    lse,
    mask,  # `Mask` or None
    sizes,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for each of keys
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Compute k_bar and v_bar of a block of keys."""
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(counts, sizes.heads, WIDTH, BLOCK_M, BLOCK_OUT)
    sample, head, _, first, _ = place
    limit = choose(limits_of(counts, sizes, 0, sample, BLOCK_M)[0], stream)
    view = choose_view(k, stream)
    pointer, stride = at_head(view, sample, head, WIDTH)
    key = tile_of((pointer, stride, first, limit), WIDTH, BLOCK_M, BLOCK_IN)
    own_v = (choose(v, stream), view[1], view[2], view[3])
    pointer, stride = at_head(own_v, sample, head, WIDTH)
    value = tile_of((pointer, stride, first, limit), WIDTH, BLOCK_M, BLOCK_IN)

    key_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    value_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    token = tl.arange(0, BLOCK_N)
    HIDES: tl.constexpr = CAUSAL or mask is not None
    own_row = tl.minimum(tl.arange(0, BLOCK_M), limit - first - 1)[:, None]
    limits, tiles = limits_of(sizes.queries, sizes, None, sample, BLOCK_N)
    begin = 0
    if mask is not None:
        visits, tiles = visited(mask, sample, head, first // BLOCK_M)
    elif CAUSAL:
        begin = tl.minimum(first // BLOCK_N, tiles)
    tiles = tl.where(first < limit, tiles, begin)  # padding alone: nothing to do
    for member in range(0, GROUP):
        own_mask = at_mask(mask, sample, head * GROUP + member)
        streams = at_heads(q, o_bar, None, None, sample, head * GROUP + member, WIDTH)
        row = (pair * GROUP + member) * sizes.all_queries
        with_sums = ()
        for s in tl.static_range(len(q)):
            own = streams[s]
            with_sums += ((own[0], own[1], own[2], lse[s] + row, delta[s] + row),)  # type: ignore[assignment]
        fields, stop, since, until = enter(with_sums, limits, 0, BLOCK_N)
        for step in range(begin, tiles):
            tile = step
            if mask is not None:
                tile = tl.load(visits + step)
            if len(q) > 1 and tile == until:
                fields, stop, since, until = enter(with_sums, limits, tile, BLOCK_N)
            own_q, stride, own_o_bar, own_lse, own_delta = fields
            start = (tile - since) * BLOCK_N
            other = tl.minimum(token, stop - start - 1)[None, :]
            said = said_of(mask, own_mask, start, other, first, own_row)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], TYPE)
            q_rows = (own_q, stride, start, stop)
            o_bar_rows = (own_o_bar, stride, start, stop)
            score = add_products(zeros, key, q_rows, WIDTH, PRECISION, BLOCK_IN)
            p_bar = add_products(zeros, value, o_bar_rows, WIDTH, PRECISION, BLOCK_IN)
            query = tl.minimum(start + token, stop - 1)
            sums = tl.load(own_lse + query)
            center = tl.load(own_delta + query)
            score = hide(score, mask, said, start, other, first, own_row, sizes.scale, CAUSAL)
            p = tl.exp2(fma(score, sizes.scale_2, -sums[None, :]))
            if HIDES:  # the sum of a row that saw NaN is NaN
                p = tl.where(score == float("-inf"), 0.0, p)
            if stop - start < BLOCK_N:
                p = tl.where((token < stop - start)[None, :], p, 0.0)
            b = load(o_bar_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
            value_bar = dot(p.to(STORED), b, value_bar, PRECISION)
            score_bar = p * (p_bar - center[None, :])
            if HIDES:
                score_bar = tl.where(score == float("-inf"), 0.0, score_bar)
            a = load(q_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
            key_bar = dot(score_bar.to(STORED), a, key_bar, PRECISION)
    inside = (tl.arange(0, BLOCK_M) < limit - first)[:, None]
    key_bar = tl.where(inside, key_bar * sizes.scale, 0.0)
    value_bar = tl.where(inside, value_bar, 0.0)
    store(choose(k_bar, stream), key_bar, place, column, WIDTH, BLOCK_OUT)
    store(choose(v_bar, stream), value_bar, place, column, WIDTH, BLOCK_OUT)
