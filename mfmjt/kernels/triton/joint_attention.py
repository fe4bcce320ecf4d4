"""Triton kernels of `joint_attention`: value and tangent.

One launch computes value and tangent over all streams of queries; its programs walk along the
streams of keys where they lie, and a stream without a tangent costs no matmul. With
p = 2^(S - top) and w = p (S_dot - c) a program sums

    l = sum p,  r = sum w,  o~ = p v,  T~ = w v + p v_dot;    o = o~ / l,  o_dot = (T~ - r o) / l

The center c is the mean of S_dot so far, and l and r are sums of p and w as rounded for the
matmuls: without both, bfloat16 loses ten times the digits. `lse` is to the base 2. float32 goes
through three TF32 matmuls. 4 B H N M D operations, 12 with all tangents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels import _op
from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels.triton import (
    View,
    cdiv,
    choose,
    choose_view,
    fma,
    jit,
    locate,
    target,
    tl,
    tuning,
)

__all__ = ["fwd", "jvp"]


@jit
def at_head(stream, sample, head, WIDTH: tl.constexpr):
    """Return a pointer to the first token of a head, and elements from one token to the next.

    The strides of a stream are in units of 8 elements where heads are a multiple of 8 wide
    (`_view`): so Triton, which is told of multiples of 16 only, loads 8 elements at a time.
    """
    UNIT: tl.constexpr = 8 if WIDTH % 8 == 0 else 1
    pointer, sample_stride, token_stride, head_stride = stream
    return pointer + (sample * sample_stride + head * head_stride) * UNIT, token_stride * UNIT


@jit
def load(rows, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile (BLOCK, COLUMNS) from a column on, zeros where there is nothing.

    `rows` are (`at_head`, first token, one past the last that counts).
    """
    head, start, limit = rows
    pointer, stride = head
    token = tl.arange(0, BLOCK)[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    inside = token < limit - start
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)
    pointer += start * stride
    return tl.load(pointer + (token * stride + column), inside, 0.0)


@jit
def store(pointer, tile, sample, head, heads, start, count, first_column, WIDTH: tl.constexpr):
    """Write a tile of one head into a dense (B, count, H, WIDTH) result."""
    token = tl.arange(0, tile.shape[0])[:, None]
    column = first_column + tl.arange(0, tile.shape[1])[None, :]
    inside = token < count - start
    if WIDTH % tile.shape[1] != 0:
        inside = inside & (column < WIDTH)
    pointer += ((sample * count + start) * heads + head) * WIDTH
    tl.store(pointer + (token * (heads * WIDTH) + column), tile, inside)


@jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b, in the dtype of total."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def add_products(total, a, b, WIDTH: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr):
    """Return total + a b^T, where a and b are rows for `load`, some columns at a time."""
    for column in range(0, WIDTH, COLUMNS):
        x = load(a, column, WIDTH, total.shape[0], COLUMNS)
        y = load(b, column, WIDTH, total.shape[1], COLUMNS)
        total = dot(x, tl.trans(y), total, PRECISION)
    return total


@jit
def keys_of(lengths, stream, tokens, sample):
    """Return how many keys of a sample count; they are the first of the stream."""
    limit = tokens
    if lengths[stream] is not None:
        limit = tl.minimum(tl.load(lengths[stream] + sample), limit).to(tl.int32)
    return limit


@jit
def block_of(tokens, heads, BLOCK: tl.constexpr):
    """Return pair, sample and head of this program, its stream, its first token and their count."""
    tiles = 0
    for s in tl.static_range(len(tokens)):
        tiles += tl.cdiv(tokens[s], BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    stream, first, count = locate(tokens, tl.program_id(0) % tiles, BLOCK)
    return pair, pair // heads, pair % heads, stream, first, count


@jit
def _attention_fwd_kernel(
    q,  # views, one for each stream
    k,
    v,
    q_dot,  # None where no query moves, or pointers: strides are those of q
    k_dot,  # pointers, None for a stream that does not move
    v_dot,
    o,  # pointers, one for each stream of queries
    o_dot,  # None where no tangent is wanted
    lse,
    queries,  # tokens of each stream
    keys,
    lengths,  # pointers to the number of keys that count, or None
    all_queries,
    heads,
    scale,
    scale_2,  # for exp2, the exponential that GPUs have
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # columns of q and k at a time: all, or where those are too many, some
    BLOCK_OUT: tl.constexpr,  # columns of v and o in one program: likewise
):
    WHOLE: tl.constexpr = BLOCK_IN >= WIDTH
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, sample, head, stream, first, count = block_of(queries, heads, BLOCK_N)
    column = tl.program_id(1) * BLOCK_OUT
    own = choose_view(q, stream)
    q_rows = (at_head(own, sample, head, WIDTH), first, count)
    if q_dot is not None:
        own_dot = (choose(q_dot, stream), own[1], own[2], own[3])
        q_dot_rows = (at_head(own_dot, sample, head, WIDTH), first, count)
    if WHOLE:
        query = load(q_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)
        if q_dot is not None:
            query_dot = load(q_dot_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)

    key = tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_N], float("-inf"), TYPE)
    total = tl.zeros([BLOCK_N], TYPE)  # sum of p; and of p as rounded for the matmul
    total_rounded = total
    total_w = total
    center = total
    out = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    out_dot = out
    for s in tl.static_range(len(k)):
        limit = keys_of(lengths, s, keys[s], sample)
        at_k, at_v = at_head(k[s], sample, head, WIDTH), at_head(v[s], sample, head, WIDTH)
        if k_dot[s] is not None:
            dots = (k_dot[s], k[s][1], k[s][2], k[s][3])
            at_k_dot = at_head(dots, sample, head, WIDTH)
        if v_dot[s] is not None:
            dots = (v_dot[s], v[s][1], v[s][2], v[s][3])
            at_v_dot = at_head(dots, sample, head, WIDTH)
        if o_dot is not None and q_dot is None and k_dot[s] is None:
            # S_dot is zero, and so is W, if the center is
            out_dot += center[:, None] * out
            total_w += center * total_rounded
            center = tl.zeros([BLOCK_N], TYPE)
        for start in range(0, limit, BLOCK_M):
            score = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            score_dot = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            rows = (at_k, start, limit)
            if WHOLE:
                a = tl.trans(load(rows, 0, WIDTH, BLOCK_M, BLOCK_IN))
                score = dot(query, a, score, PRECISION)
                if q_dot is not None:
                    score_dot = dot(query_dot, a, score_dot, PRECISION)
            else:
                score = add_products(score, q_rows, rows, WIDTH, PRECISION, BLOCK_IN)
                if q_dot is not None:
                    score_dot = add_products(
                        score_dot, q_dot_rows, rows, WIDTH, PRECISION, BLOCK_IN
                    )
            if k_dot[s] is not None:
                rows = (at_k_dot, start, limit)
                if WHOLE:
                    a = tl.trans(load(rows, 0, WIDTH, BLOCK_M, BLOCK_IN))
                    score_dot = dot(query, a, score_dot, PRECISION)
                else:
                    score_dot = add_products(score_dot, q_rows, rows, WIDTH, PRECISION, BLOCK_IN)
            score = tl.where((key < limit - start)[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            # What rounds is the same for a whole row, and so leaves P as it is
            new_top_2 = new_top * scale_2
            p = tl.exp2(fma(score, scale_2, -new_top_2[:, None]))
            shrink = tl.exp2(fma(top, scale_2, -new_top_2))
            top = new_top
            sum_p = tl.sum(p, 1)
            p_rounded = p.to(STORED)
            total_rounded *= shrink
            total_w *= shrink
            b = load((at_v, start, limit), column, WIDTH, BLOCK_M, BLOCK_OUT)
            if q_dot is not None or k_dot[s] is not None:
                # The center is the mean of S_dot so far: it takes a common offset off before W is
                # rounded. What was summed with another center moves along.
                score_dot *= scale
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
                b = load((at_v_dot, start, limit), column, WIDTH, BLOCK_M, BLOCK_OUT)
                out_dot = dot(p_rounded, b, out_dot, PRECISION)
            total = total * shrink + sum_p
            # The sums that divide are those of the very numbers that were multiplied
            if STORED != TYPE:
                sum_p = tl.sum(p_rounded.to(TYPE), 1)
            total_rounded += sum_p

    nothing = total == 0
    inverse = tl.where(nothing, 0.0, 1 / tl.where(nothing, 1.0, total_rounded))[:, None]
    out *= inverse
    store(choose(o, stream), out, sample, head, heads, first, count, column, WIDTH)
    if o_dot is not None:
        out_dot = (out_dot - total_w[:, None] * out) * inverse
        store(choose(o_dot, stream), out_dot, sample, head, heads, first, count, column, WIDTH)
    token = tl.arange(0, BLOCK_N)
    sums = top * scale_2 + tl.log2(tl.where(nothing, 1.0, total))
    here = token < tl.where(tl.program_id(1) == 0, count - first, 0)  # once is enough
    row = choose(lse, stream) + pair * all_queries + first
    tl.store(row + token, tl.where(nothing, 0.0, sums), here)


def _strides(x: Tensor) -> list[int]:
    """Return the strides of samples, tokens and heads; 0 where there is only one."""
    return [d if n > 1 else 0 for d, n in zip(x.stride()[:3], x.shape[:3], strict=True)]


def _view(x: Tensor) -> View:
    unit = 8 if x.shape[3] % 8 == 0 else 1
    return View(x, *(d // unit for d in _strides(x)))


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether kernels read x where it lies, and the others (or None) by its strides.

    Heads are dense, 32 bits reach every element of a tile, and strides are whole units.
    """
    same = all(y is None or y.stride() == x.stride() for y in others)
    whole = x.shape[3] % 8 != 0 or all(d % 8 == 0 for d in _strides(x))
    return same and whole and x.stride(3) == 1 and x.stride(1) < 2**22


def packed(
    streams: Sequence[Tensor], dots: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return streams and their tangents: themselves where kernels read them, else contiguous."""
    pairs = zip(streams, dots or [None] * len(streams), strict=True)
    kept = [
        (x, dot) if _fits(x, dot) else (x.contiguous(), dot if dot is None else dot.contiguous())
        for x, dot in pairs
    ]
    return [x for x, _ in kept], [dot for _, dot in kept]


def launch(
    kernel: Any,
    part: str,
    streams: Sequence[Sequence[Tensor]],
    pointers: Sequence[Sequence[Tensor | None] | None],
    lengths: Sequence[Tensor | None],
    lse: Tensor,
    scale: float,
) -> None:
    """Run one kernel over all blocks of queries, or of keys for the gradients of keys.

    Args:
        kernel: The kernel.
        part: Its name in `tuning.attention`.
        streams: (B, tokens, H, D) as `packed` returned them: those of q first, then those of k.
        pointers: Tensors whose strides the kernel knows; the parts of lse last.
        lengths: For each stream of keys, (B,) or None.
        lse: (B, H, all queries).
        scale: Factor of the scores.

    Raises:
        ValueError: Heads are too wide, or 32 bits do not count the elements of a sample.
    """
    first = streams[0][0]
    batch, _, heads, width = first.shape
    _op.check(width <= 256, "joint_attention", "a head width up to 256 on a GPU", q=first)
    for i, x in enumerate(x for group in streams for x in group):
        near = x.shape[1] * x.stride(1) < 2**31
        needs = "samples of fewer than 2**31 elements in each stream on a GPU"
        _op.check(near, "joint_attention", needs, **{f"streams[{i}]": x})
    queries, keys = (tuple(x.shape[1] for x in group) for group in streams[:2])
    tokens = keys if part == "bwd_kv" else queries
    if batch * heads * sum(tokens) == 0:
        return
    blocks, warps, stages = tuning.attention(
        part, batch * heads, tokens, width, first.element_size()
    )
    block_n, block_m, block_in, block_out = blocks
    tiles = sum(cdiv(n, block_m if part == "bwd_kv" else block_n) for n in tokens)
    kernel[(batch * heads * tiles, cdiv(width, block_out))](
        *(tuple(_view(x) for x in group) for group in streams),
        *(None if group is None else tuple(group) for group in pointers),
        queries,
        keys,
        tuple(None if n is None else n.contiguous() for n in lengths),
        lse.shape[2],
        heads,
        scale,
        scale * math.log2(math.e),
        WIDTH=width,
        PRECISION="tf32x3" if first.dtype.itemsize == 4 and target()[0] == "cuda" else "ieee",
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        num_warps=warps,
        num_stages=stages,
    )


def by_streams(lse: Tensor, q: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts (B, H, N) of one number for each query, (B, H, all N); views."""
    return lse.split([x.shape[1] for x in q], dim=2)


def is_left(q: Sequence[Tensor]) -> bool:
    """Return whether the formulas compute it: Triton knows no matrix unit with float64."""
    return q[0].element_size() == 8 and not INTERPRETED


def empty(streams: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous tensors of the shapes of the streams."""
    return [s.new_empty(s.shape) for s in streams]


def new_lse(q: Sequence[Tensor]) -> Tensor:
    """Return room for one number for each query, (B, H, all N)."""
    batch, _, heads, _ = q[0].shape
    tokens = sum(stream.shape[1] for stream in q)
    return q[0].new_empty((batch, heads, tokens), dtype=_op.work_dtype(q[0]))


def fwd(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> Any:
    """Launch the value: o, lse."""
    if is_left(q):
        return NotImplemented
    o, lse = empty(q), new_lse(q)
    streams = [packed(x)[0] for x in (q, k, v)]
    none = [None] * len(k)
    pointers = (None, none, none, o, None, by_streams(lse, q))
    launch(_attention_fwd_kernel, "value", streams, pointers, lengths, lse, scale)
    return o, lse


def jvp(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dot: list[Tensor | None],
    k_dot: list[Tensor | None],
    v_dot: list[Tensor | None],
    lengths: list[Tensor | None],
    scale: float,
) -> Any:
    """Launch value and tangent, o, o_dot, lse: once, or twice where only some queries move."""
    if is_left(q):
        return NotImplemented
    o, o_dot, lse = empty(q), empty(q), new_lse(q)
    (all_q, q_dot), (keys, k_dot), (values, v_dot) = (
        packed(x, dots) for x, dots in ((q, q_dot), (k, k_dot), (v, v_dot))
    )
    keys_move = any(dot is not None for dot in (*k_dot, *v_dot))
    for queries_move in (True, False):
        group = [i for i, dot in enumerate(q_dot) if (dot is not None) == queries_move]
        if not group:
            continue
        own, own_dot, out, out_dot, sums = (
            [x[i] for i in group] for x in (all_q, q_dot, o, o_dot, by_streams(lse, q))
        )
        moves = queries_move or keys_move
        for zero in () if moves else out_dot:
            zero.zero_()
        pointers = (
            own_dot if queries_move else None, k_dot, v_dot, out, out_dot if moves else None, sums
        )  # fmt: skip
        part = "tangent" if moves else "value"
        launch(_attention_fwd_kernel, part, (own, keys, values), pointers, lengths, lse, scale)
    return o, o_dot, lse
