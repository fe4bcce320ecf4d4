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

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import choose, choose_view, fma, jit, tl
from mfmjt.kernels.triton.attention import (
    add_products,
    block_of,
    by_streams,
    dot,
    empty,
    is_left,
    keys_of,
    launch,
    load,
    packed,
    store,
)
from mfmjt.kernels.triton.joint_attention_bwd import bwd

__all__ = ["bwd", "fwd", "jvp"]


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
    pair, column, stream, place = block_of(queries, heads, BLOCK_N, BLOCK_OUT)
    sample, head, _, first, count = place
    own = choose_view(q, stream)
    q_rows = (own, sample, head, first, count)
    if q_dot is not None:
        own_dot = (choose(q_dot, stream), own[1], own[2], own[3])
        q_dot_rows = (own_dot, sample, head, first, count)
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
        own_k_dot = (k_dot[s], k[s][1], k[s][2], k[s][3])
        own_v_dot = (v_dot[s], v[s][1], v[s][2], v[s][3])
        if o_dot is not None and q_dot is None and k_dot[s] is None:
            # S_dot is zero, and so is W, if the center is
            out_dot += center[:, None] * out
            total_w += center * total_rounded
            center = tl.zeros([BLOCK_N], TYPE)
        for start in range(0, limit, BLOCK_M):
            score = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            score_dot = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            rows = (k[s], sample, head, start, limit)
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
                rows = (own_k_dot, sample, head, start, limit)
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
            rows = (v[s], sample, head, start, limit)
            b = load(rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
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
    store(choose(o, stream), out, place, column, WIDTH, BLOCK_N, BLOCK_OUT)
    if o_dot is not None:
        out_dot = (out_dot - total_w[:, None] * out) * inverse
        store(choose(o_dot, stream), out_dot, place, column, WIDTH, BLOCK_N, BLOCK_OUT)
    token = tl.arange(0, BLOCK_N)
    sums = top * scale_2 + tl.log2(tl.where(nothing, 1.0, total))
    row = choose(lse, stream) + pair * all_queries + first
    here = token < tl.where(tl.program_id(1) == 0, count - first, 0)  # once is enough
    tl.store(row + token, tl.where(nothing, 0.0, sums), here)


def new_lse(q: Sequence[Tensor]) -> Tensor:
    """Return room for one number for each query, (B, H, all N)."""
    batch, _, heads, _ = q[0].shape
    tokens = sum(stream.shape[1] for stream in q)
    return q[0].new_empty((batch, heads, tokens), dtype=work_dtype(q[0]))


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
