"""Triton kernels of `qk_norm_rope`: value with tangent, and gradient, over streams.

A program takes whole heads (b, n, h) of q, k and v together, so that the angles are read once. A
lane holds both elements of a pair: cosines and sines lie in rope as even and odd elements lie in a
head, and one split serves both, without an exchange between lanes. Gradients of the weights are
summed in two stages, each in an order that the shapes alone decide. Streams of a launch share the
number and the width of heads, and dtypes; other tuples, and what is empty, go stream by stream or
run the formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import at, choose, locate, put, wide
from mfmjt.kernels.triton.launching import (
    alike,
    dense,
    empty,
    filled,
    launch,
    of_one,
    present,
    views,
)
from mfmjt.kernels.triton.sums import add_up

__all__ = ["angles", "bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams", "rotated"]


@jit
def _heads(first, n_rows, n_tokens, n_heads, BLOCK_ROWS: tl.constexpr):
    """Return rows `first` and on, (R, 1): number, which exist, sample, token and head."""
    row = first + tl.arange(0, BLOCK_ROWS)[:, None]
    token = row // n_heads
    sample = token // n_tokens
    head = (row - token * n_heads).to(tl.int64)
    token = (token - sample * n_tokens).to(tl.int64)
    return row.to(tl.int64), row < n_rows, sample.to(tl.int64), token, head


@jit
def angles(ropes, stream, token, col, width, inside, WORK: tl.constexpr):
    """Return cosines and sines of rows of heads, (rows, D/2) each.

    `ropes` are (angles, 1 for each stream that is rotated). What is not `inside`, or not rotated,
    is turned by nothing.
    """
    pointers, given = ropes
    inside = inside & (choose(given, stream) == 1)
    rope = choose(pointers, stream) + token * width + col
    return _pairs(tl.load(rope, inside, tl.where(col % 2 == 0, 1.0, 0.0)).to(WORK))


@jit
def _pairs(x):
    """Return even and odd elements of (rows, D), each (rows, D/2)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def rotated(x, cos, sin):
    """Rotate the pairs of x (rows, D); return x itself where there are no angles."""
    if cos is not None:
        even, odd = _pairs(x)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
    return x


@jit
def _qk_norm_rope_fwd_kernel(
    qkvs,  # for each stream a `View` of q, as for the next
    qkv_dots,  # None where no tangent is wanted, and so are the results' tangents
    weights,  # of q and of k, for each stream, as all results
    ropes,  # as `angles` takes them, or None
    ys,  # q, k and v
    y_dots,
    rstds,  # of q and of k
    counts,  # heads of all tokens of each stream
    tokens,
    parts,  # elements from q to k, and from k to v
    part_dots,
    n_heads,
    width,
    EPS: tl.constexpr,  # a number passed at run time would be rounded to float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    WORK: tl.constexpr = rstds[0][0].dtype.element_ty
    stream, start, count = locate(counts, tl.program_id(0), BLOCK_ROWS)
    row, exists, sample, token, head = _heads(
        start, count, choose(tokens, stream), n_heads, BLOCK_ROWS
    )
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = exists & (col < width)
    out = row * width + col
    q, part = at(qkvs, stream, sample, token, head) + col, choose(parts, stream)
    if qkv_dots is not None:
        q_dot = at(qkv_dots, stream, sample, token, head) + col
        part_dot = choose(part_dots, stream)
        put(y_dots[2], stream, out, tl.load(q_dot + 2 * part_dot, inside), inside)
    put(ys[2], stream, out, tl.load(q + 2 * part, inside), inside)
    cos, sin = None, None
    if ropes is not None:
        cos, sin = angles(ropes, stream, token, col, width, inside, WORK)
    for i in tl.static_range(2):
        weight = tl.load(choose(weights[i], stream) + col, col < width, 0.0).to(WORK)
        x = wide(tl.load(q + i * part, inside, 0.0))
        r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + EPS)
        n = x * r
        put(rstds[i], stream, row, r, exists)
        put(ys[i], stream, out, rotated(n * weight, cos, sin), inside)
        if qkv_dots is not None:
            dot = wide(tl.load(q_dot + i * part_dot, inside, 0.0))
            dot = r * (dot - n * (tl.sum(n * dot, 1, keep_dims=True) / width))
            put(y_dots[i], stream, out, rotated(dot * weight, cos, sin), inside)


@jit
def _qk_norm_rope_bwd_kernel(
    bars,  # of q, k and v, for each stream a `View`; None where no gradient arrived
    qkvs,  # for each stream a `View` of q
    weights,
    ropes,
    rstds,
    qkv_bars,
    partial,  # (2, programs, D) sums for the weights of q and k
    programs,  # of each stream
    counts,
    tokens,
    parts,
    n_heads,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    WORK: tl.constexpr = rstds[0][0].dtype.element_ty
    stream, program, step = locate(programs, tl.program_id(0), 1)
    count, length, part = choose(counts, stream), choose(tokens, stream), choose(parts, stream)
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), WORK)
    totals = (zeros, zeros)  # sums over rows of what reaches the weights
    for block in range(program, tl.cdiv(count, BLOCK_ROWS), step):
        row, exists, sample, token, head = _heads(
            block * BLOCK_ROWS, count, length, n_heads, BLOCK_ROWS
        )
        inside = exists & (col < width)
        q = at(qkvs, stream, sample, token, head) + col
        out = ((sample * length + token) * 3 * n_heads + head) * width + col
        # In the loop, because there are no registers to keep them and the weights in
        if ropes is not None:
            cos, sin = angles(ropes, stream, token, col, width, inside, WORK)
        sums = ()  # type: Any
        for i in tl.static_range(2):
            weight = tl.load(choose(weights[i], stream) + col, col < width, 0.0).to(WORK)
            x_bar, total = zeros, totals[i]
            if bars[i] is not None:
                g = wide(tl.load(at(bars[i], stream, sample, token, head) + col, inside, 0.0))
                if ropes is not None:
                    g = rotated(g, cos, -sin)
                r = tl.load(choose(rstds[i], stream) + row, exists, 0.0)
                n = wide(tl.load(q + i * part, inside, 0.0)) * r
                total += g * n
                g *= weight
                x_bar = r * (g - n * (tl.sum(n * g, 1, keep_dims=True) / width))
            put(qkv_bars, stream, out + i * n_heads * width, x_bar, inside)
            sums += (total,)
        totals = sums
        v_bar = zeros
        if bars[2] is not None:
            v_bar = tl.load(at(bars[2], stream, sample, token, head) + col, inside)
        put(qkv_bars, stream, out + 2 * n_heads * width, v_bar, inside)
    for i in tl.static_range(2):
        place = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * width + col
        tl.store(partial + place, tl.sum(totals[i], 0, keep_dims=True), col < width)


# --- Launchers


def _fits(qkvs: Sequence[Tensor], *lists: Sequence[Tensor | None] | None) -> bool:
    """Return True if one launch serves these streams."""
    return alike(qkvs, *lists) and all(x.shape[2:] == qkvs[0].shape[2:] for x in qkvs)


def _heads_of(qkvs: Sequence[Tensor] | None) -> tuple[Any, Any]:
    """Return q of each stream as kernels read it, and the elements from q to k; None for None."""
    if qkvs is None:
        return None, None
    qkvs = list(map(dense, qkvs))
    return views([x[:, :, 0] for x in qkvs]), [x.stride(2) for x in qkvs]


def _contiguous(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t.contiguous() for t in ts] for ts in lists]


def _forward(
    qkvs: list[Tensor],
    qkv_dots: list[Tensor] | None,
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    ropes: list[Tensor | None],
    eps: float,
) -> Any:
    """Return q, k and v, each with its tangent where one is wanted, and the statistics."""
    if not _fits(qkvs, qkv_dots, q_weights, k_weights, ropes):
        return NotImplemented
    qs = [x[:, :, 0] for x in qkvs]
    ys = [empty(qs) for _ in range(3)]
    y_dots = None if qkv_dots is None else [empty(qs) for _ in range(3)]
    work = work_dtype(qs[0])
    rstds = [[q.new_empty((*q.shape[:3], 1), dtype=work) for q in qs] for _ in range(2)]
    (sources, parts), (source_dots, part_dots) = _heads_of(qkvs), _heads_of(qkv_dots)
    counts, (heads, width) = [q[..., 0].numel() for q in qs], qs[0].shape[2:]
    options = tuning.heads(width, qs[0].element_size())
    launch(
        _qk_norm_rope_fwd_kernel,
        (sum(cdiv(n, options["BLOCK_ROWS"]) for n in counts),),
        *(sources, source_dots, _contiguous(q_weights, k_weights), present(ropes)),
        *(ys, y_dots, rstds),
        *(counts, [q.shape[1] for q in qs], parts, part_dots, heads, width),
        EPS=eps,
        **options,
    )
    results = ys if y_dots is None else itertools.chain(*zip(ys, y_dots, strict=True))
    return (*results, *rstds)


def fwd_streams(qkvs: list[Tensor], *others: Any) -> Any:
    """Compute results and statistics of all streams."""
    return _forward(qkvs, None, *others)


def jvp_streams(qkvs: list[Tensor], qkv_dots: list[Tensor | None], *others: Any) -> Any:
    """Compute results, tangents and statistics of all streams."""
    return _forward(qkvs, filled(qkv_dots, qkvs), *others)


def bwd_streams(
    q_bars: list[Tensor | None],
    k_bars: list[Tensor | None],
    v_bars: list[Tensor | None],
    qkvs: list[Tensor],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    ropes: list[Tensor | None],
    q_rstds: list[Tensor],
    k_rstds: list[Tensor],
) -> Any:
    """Compute the cotangents of all streams."""
    if not _fits(qkvs, q_bars, k_bars, v_bars, q_weights, k_weights, ropes):
        return NotImplemented
    qs = [x[:, :, 0] for x in qkvs]
    bars = [views(filled(given, qs)) for given in (q_bars, k_bars, v_bars)]
    results = [empty(ts) for ts in (qkvs, q_weights, k_weights)]
    counts, (heads, width) = [q[..., 0].numel() for q in qs], qs[0].shape[2:]
    options = tuning.heads(width, qs[0].element_size())
    most = tuning.REDUCING_PROGRAMS // len(qs)
    programs = [min(cdiv(n, options["BLOCK_ROWS"]), most) for n in counts]
    partial = q_rstds[0].new_empty((2, sum(programs), width))
    sources, parts = _heads_of(qkvs)
    launch(
        _qk_norm_rope_bwd_kernel,
        (sum(programs),),
        *(bars, sources, _contiguous(q_weights, k_weights), present(ropes)),
        *([q_rstds, k_rstds], results[0], partial, programs),
        *(counts, [q.shape[1] for q in qs], parts, heads, width),
        **options,
    )
    add_up(
        [
            (part[None], n, bar)
            for weight, weight_bars in zip(partial, results[1:], strict=True)
            for part, n, bar in zip(weight.split(programs), programs, weight_bars, strict=True)
        ]
    )
    return tuple(results)


fwd, jvp, bwd = of_one(fwd_streams, jvp_streams, bwd_streams)
