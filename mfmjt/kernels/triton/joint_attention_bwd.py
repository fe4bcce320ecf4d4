"""Triton kernels of `joint_attention`: gradients, in two launches without atomics.

From q, k, v, o and the log of each row's sum, to the base 2, P is made again:

    S_bar = P (o_bar v^T - delta),  delta = rowsum(o_bar o),  q_bar = scale S_bar k
    v_bar = P^T o_bar,  k_bar = scale S_bar^T q

A program of the first kernel has a block of queries, walks along the keys, and leaves delta to the
second, whose programs have a block of keys and walk along the queries. 14 B H N M D operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

__all__ = ["bwd"]


@jit
def _attention_bwd_q_kernel(
    q,  # views, one for each stream
    k,
    v,
    o_bar,
    o,
    q_bar,  # pointers, one for each stream of queries
    delta,  # receives rowsum(o_bar o)
    lse,
    queries,  # tokens of each stream
    keys,
    lengths,  # pointers to the number of keys that count, or None
    all_queries,
    heads,
    scale,
    scale_2,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    WHOLE: tl.constexpr = BLOCK_IN >= WIDTH
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(queries, heads, BLOCK_N, BLOCK_OUT)
    sample, head, _, first, count = place
    q_rows = (choose_view(q, stream), sample, head, first, count)
    o_rows = (choose_view(o, stream), sample, head, first, count)
    o_bar_rows = (choose_view(o_bar, stream), sample, head, first, count)
    center = tl.zeros([BLOCK_N], TYPE)
    for part in range(0, WIDTH, BLOCK_IN):
        a = load(o_rows, part, WIDTH, BLOCK_N, BLOCK_IN)
        b = load(o_bar_rows, part, WIDTH, BLOCK_N, BLOCK_IN)
        center += tl.sum(a.to(TYPE) * b.to(TYPE), 1)
    token = tl.arange(0, BLOCK_N)
    row = pair * all_queries + first
    here = token < count - first
    once = token < tl.where(tl.program_id(1) == 0, count - first, 0)
    tl.store(choose(delta, stream) + row + token, center, once)
    sums = tl.load(choose(lse, stream) + row + token, here, 0.0)
    if WHOLE:
        query = load(q_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)
        out_bar = load(o_bar_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)

    key = tl.arange(0, BLOCK_M)
    query_bar = tl.zeros([BLOCK_N, BLOCK_OUT], TYPE)
    for s in tl.static_range(len(k)):
        limit = keys_of(lengths, s, keys[s], sample)
        for start in range(0, limit, BLOCK_M):
            score = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            p_bar = tl.zeros([BLOCK_N, BLOCK_M], TYPE)
            k_rows = (k[s], sample, head, start, limit)
            v_rows = (v[s], sample, head, start, limit)
            if WHOLE:
                a = load(k_rows, 0, WIDTH, BLOCK_M, BLOCK_IN)
                score = dot(query, tl.trans(a), score, PRECISION)
                b = load(v_rows, 0, WIDTH, BLOCK_M, BLOCK_IN)
                p_bar = dot(out_bar, tl.trans(b), p_bar, PRECISION)
            else:
                score = add_products(score, q_rows, k_rows, WIDTH, PRECISION, BLOCK_IN)
                p_bar = add_products(p_bar, o_bar_rows, v_rows, WIDTH, PRECISION, BLOCK_IN)
            score = tl.where((key < limit - start)[None, :], score, float("-inf"))
            p = tl.exp2(fma(score, scale_2, -sums[:, None]))
            score_bar = (p * (p_bar - center[:, None])).to(STORED)
            if BLOCK_OUT != BLOCK_IN or not WHOLE:
                a = load(k_rows, column, WIDTH, BLOCK_M, BLOCK_OUT)
            query_bar = dot(score_bar, a, query_bar, PRECISION)
    query_bar *= scale
    store(choose(q_bar, stream), query_bar, place, column, WIDTH, BLOCK_N, BLOCK_OUT)


@jit
def _attention_bwd_kv_kernel(
    q,  # views, one for each stream
    k,
    v,
    o_bar,
    k_bar,  # pointers, one for each stream of keys
    v_bar,
    delta,  # and of queries
    lse,
    queries,
    keys,
    lengths,
    all_queries,
    heads,
    scale,
    scale_2,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    WHOLE: tl.constexpr = BLOCK_IN >= WIDTH
    STORED: tl.constexpr = q[0][0].dtype.element_ty
    TYPE: tl.constexpr = tl.float64 if STORED.primitive_bitwidth == 64 else tl.float32
    pair, column, stream, place = block_of(keys, heads, BLOCK_M, BLOCK_OUT)
    sample, head, _, first, count = place
    limit = count
    for s in tl.static_range(len(k)):
        if lengths[s] is not None:
            limit = tl.where(stream == s, keys_of(lengths, s, keys[s], sample), limit)
    k_rows = (choose_view(k, stream), sample, head, first, limit)
    v_rows = (choose_view(v, stream), sample, head, first, limit)
    if WHOLE:
        key = load(k_rows, 0, WIDTH, BLOCK_M, BLOCK_IN)
        value = load(v_rows, 0, WIDTH, BLOCK_M, BLOCK_IN)

    key_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    value_bar = tl.zeros([BLOCK_M, BLOCK_OUT], TYPE)
    token = tl.arange(0, BLOCK_N)
    for s in tl.static_range(len(q)):
        stop = tl.where(first < limit, queries[s], 0)  # padding alone: nothing to do
        for start in range(0, stop, BLOCK_N):
            score = tl.zeros([BLOCK_M, BLOCK_N], TYPE)
            p_bar = tl.zeros([BLOCK_M, BLOCK_N], TYPE)
            q_rows = (q[s], sample, head, start, stop)
            o_bar_rows = (o_bar[s], sample, head, start, stop)
            if WHOLE:
                a = load(q_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)
                score = dot(key, tl.trans(a), score, PRECISION)
                b = load(o_bar_rows, 0, WIDTH, BLOCK_N, BLOCK_IN)
                p_bar = dot(value, tl.trans(b), p_bar, PRECISION)
            else:
                score = add_products(score, k_rows, q_rows, WIDTH, PRECISION, BLOCK_IN)
                p_bar = add_products(p_bar, v_rows, o_bar_rows, WIDTH, PRECISION, BLOCK_IN)
            if BLOCK_OUT != BLOCK_IN or not WHOLE:
                a = load(q_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
                b = load(o_bar_rows, column, WIDTH, BLOCK_N, BLOCK_OUT)
            row = pair * all_queries + start
            here = token < stop - start
            sums = tl.load(lse[s] + row + token, here, float("inf"))
            center = tl.load(delta[s] + row + token, here, 0.0)
            p = tl.exp2(fma(score, scale_2, -sums[None, :]))
            value_bar = dot(p.to(STORED), b, value_bar, PRECISION)
            score_bar = (p * (p_bar - center[None, :])).to(STORED)
            key_bar = dot(score_bar, a, key_bar, PRECISION)
    counts = (tl.arange(0, BLOCK_M) < limit - first)[:, None]
    key_bar = tl.where(counts, key_bar * scale, 0.0)
    value_bar = tl.where(counts, value_bar, 0.0)
    store(choose(k_bar, stream), key_bar, place, column, WIDTH, BLOCK_M, BLOCK_OUT)
    store(choose(v_bar, stream), value_bar, place, column, WIDTH, BLOCK_M, BLOCK_OUT)


def bwd(
    o_bar: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    o: list[Tensor],
    lse: Tensor,
    lengths: list[Tensor | None],
    scale: float,
) -> Any:
    """Launch the gradients q_bar, k_bar and v_bar."""
    if is_left(q):
        return NotImplemented
    q_bar, k_bar, v_bar = empty(q), empty(k), empty(v)
    streams = [packed(x)[0] for x in (q, k, v, o_bar, o)]
    sums, delta = by_streams(lse, q), by_streams(torch.empty_like(lse), q)
    pointers: tuple[Any, ...] = (q_bar, delta, sums)
    launch(_attention_bwd_q_kernel, "bwd_q", streams, pointers, lengths, lse, scale)
    pointers = (k_bar, v_bar, delta, sums)
    launch(_attention_bwd_kv_kernel, "bwd_kv", streams[:4], pointers, lengths, lse, scale)
    return q_bar, k_bar, v_bar
