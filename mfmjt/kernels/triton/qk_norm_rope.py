"""Triton kernels of `qk_norm_rope`: value with tangent, and gradient, over streams.

A program takes whole heads (b, n, h) of q, k and v together, so that the angles are read once. A
lane holds both elements of a pair: cosines and sines lie in rope as even and odd elements lie in a
head, and one split serves both, without an exchange between lanes. Gradients of the weights are
summed in two stages, each in an order that the shapes alone decide. Streams of a launch share the
number and the width of heads, and dtypes; other tuples, and what is empty, go stream by stream or
run the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import (
    View,
    cdiv,
    choose,
    choose_view,
    filled,
    jit,
    locate,
    one_stream,
    tl,
    tuning,
    wide,
)

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


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
def _at(views, stream, sample, token, head):
    """Return pointers to the first elements of heads of one of the `View`s."""
    pointer, sample_stride, token_stride, head_stride = choose_view(views, stream)
    return pointer + sample * sample_stride + token * token_stride + head * head_stride


@jit
def _angles(ropes, rotated, stream, token, col, width, inside, WORK: tl.constexpr):
    """Return cosines and sines of rows of heads, (rows, D/2) each; None if nothing is rotated."""
    cos, sin = None, None
    if ropes is not None:
        here = inside
        if rotated is not None:  # some streams are not
            here = inside & (choose(rotated, stream) == 1)
        rope = tl.load(choose(ropes, stream) + token * width + col, here, 0.0).to(WORK)
        if rotated is not None:
            rope = tl.where(here, rope, tl.where(col % 2 == 0, 1.0, 0.0))
        cos, sin = _pairs(rope)
    return cos, sin


@jit
def _pairs(x):
    """Return even and odd elements of (rows, D), each (rows, D/2)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def _rotated(x, cos, sin):
    """Rotate the pairs of x (rows, D); return x itself where there are no angles."""
    if cos is not None:
        even, odd = _pairs(x)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
    return x


@jit
def _normalise(
    x,  # pointers to the head's elements in qkv and, or None, its tangent
    x_dot,
    weight,  # (1, D)
    cos,
    sin,
    y,  # pointers to the head's elements in q or k
    y_dot,
    rstd,  # pointers, (rows, 1)
    exists,
    inside,
    width,
    eps,
):
    """Compute value and tangent of one of q and k."""
    x = wide(tl.load(x, inside, 0.0))
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    n = x * r
    tl.store(rstd, r, exists)
    tl.store(y, _rotated(n * weight, cos, sin), inside)
    if x_dot is not None:
        dot = wide(tl.load(x_dot, inside, 0.0))
        dot = r * (dot - n * (tl.sum(n * dot, 1, keep_dims=True) / width))
        tl.store(y_dot, _rotated(dot * weight, cos, sin), inside)


@jit
def _qk_norm_rope_fwd_kernel(
    qkvs,  # for each stream a `View`, as for the next
    qkv_dots,  # None where no tangent is wanted, and so are the results' tangents
    q_weights,
    k_weights,
    ropes,  # None for no rotation
    rotated,  # 1 for each stream that is rotated; None where all are
    qs,
    q_dots,
    ks,
    k_dots,
    vs,
    v_dots,
    q_rstds,
    k_rstds,
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
    WORK: tl.constexpr = q_rstds[0].dtype.element_ty
    stream, start, count = locate(counts, tl.program_id(0), BLOCK_ROWS)
    row, exists, sample, token, head = _heads(
        start, count, choose(tokens, stream), n_heads, BLOCK_ROWS
    )
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = exists & (col < width)
    x, part = _at(qkvs, stream, sample, token, head) + col, choose(parts, stream)
    out = row * width + col
    dot, dot_k, q_dot, k_dot = None, None, None, None
    if qkv_dots is not None:
        dot, part_dot = _at(qkv_dots, stream, sample, token, head) + col, choose(part_dots, stream)
        dot_k = dot + part_dot
        q_dot, k_dot = choose(q_dots, stream) + out, choose(k_dots, stream) + out
        tl.store(choose(v_dots, stream) + out, tl.load(dot + 2 * part_dot, inside), inside)
    tl.store(choose(vs, stream) + out, tl.load(x + 2 * part, inside), inside)
    q_weight = tl.load(choose(q_weights, stream) + col, col < width, 0.0).to(WORK)
    k_weight = tl.load(choose(k_weights, stream) + col, col < width, 0.0).to(WORK)
    cos, sin = _angles(ropes, rotated, stream, token, col, width, inside, WORK)
    q, k = choose(qs, stream) + out, choose(ks, stream) + out
    q_rstd, k_rstd = choose(q_rstds, stream) + row, choose(k_rstds, stream) + row
    _normalise(x, dot, q_weight, cos, sin, q, q_dot, q_rstd, exists, inside, width, EPS)
    _normalise(x + part, dot_k, k_weight, cos, sin, k, k_dot, k_rstd, exists, inside, width, EPS)


@jit
def _cotangent(
    y_bar,  # pointers to the head's elements, or None for a cotangent of zero
    x,
    weight,  # (1, D)
    cos,
    sin,
    rstd,
    x_bar,
    total,  # sum over rows so far of what reaches the weight, (rows, D)
    exists,
    inside,
    width,
):
    """Store the cotangent of one of q and k; return `total` with these rows added."""
    if y_bar is None:
        tl.store(x_bar, tl.zeros_like(total), inside)
    else:
        g = wide(tl.load(y_bar, inside, 0.0))
        if cos is not None:
            g = _rotated(g, cos, -sin)
        r = tl.load(rstd, exists, 0.0)
        n = wide(tl.load(x, inside, 0.0)) * r
        total += g * n
        g *= weight
        tl.store(x_bar, r * (g - n * (tl.sum(n * g, 1, keep_dims=True) / width)), inside)
    return total


@jit
def _qk_norm_rope_bwd_kernel(
    q_bars,  # for each stream a `View`, as for the next three; None where no gradient arrived
    k_bars,
    v_bars,
    qkvs,
    q_weights,
    k_weights,
    ropes,
    rotated,
    q_rstds,
    k_rstds,
    qkv_bars,
    partial,  # (programs, 2, D) sums for the weights of q and k
    programs,  # of each stream
    counts,
    tokens,
    parts,
    n_heads,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    WORK: tl.constexpr = q_rstds[0].dtype.element_ty
    stream, program, step = locate(programs, tl.program_id(0), 1)
    count, length, part = choose(counts, stream), choose(tokens, stream), choose(parts, stream)
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    total_q = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), WORK)
    total_k = total_q
    for block in range(program, tl.cdiv(count, BLOCK_ROWS), step):
        row, exists, sample, token, head = _heads(
            block * BLOCK_ROWS, count, length, n_heads, BLOCK_ROWS
        )
        inside = exists & (col < width)
        x = _at(qkvs, stream, sample, token, head) + col
        q_x_bar = choose(qkv_bars, stream) + col
        q_x_bar += ((sample * length + token) * 3 * n_heads + head) * width
        k_x_bar = q_x_bar + n_heads * width
        v_x_bar = k_x_bar + n_heads * width
        # In the loop, because there are no registers to keep them in
        q_weight = tl.load(choose(q_weights, stream) + col, col < width, 0.0).to(WORK)
        k_weight = tl.load(choose(k_weights, stream) + col, col < width, 0.0).to(WORK)
        cos, sin = _angles(ropes, rotated, stream, token, col, width, inside, WORK)
        q_rstd, k_rstd = choose(q_rstds, stream) + row, choose(k_rstds, stream) + row
        q_bar, k_bar = None, None
        if q_bars is not None:
            q_bar = _at(q_bars, stream, sample, token, head) + col
        if k_bars is not None:
            k_bar = _at(k_bars, stream, sample, token, head) + col
        total_q = _cotangent(
            q_bar, x, q_weight, cos, sin, q_rstd, q_x_bar, total_q, exists, inside, width
        )
        total_k = _cotangent(
            k_bar, x + part, k_weight, cos, sin, k_rstd, k_x_bar, total_k, exists, inside, width
        )
        if v_bars is not None:
            v_bar = _at(v_bars, stream, sample, token, head) + col
            tl.store(v_x_bar, tl.load(v_bar, inside), inside)
        else:
            tl.store(v_x_bar, tl.zeros_like(total_q), inside)
    sums = partial + tl.program_id(0).to(tl.int64) * 2 * width + col
    tl.store(sums, tl.sum(total_q, 0, keep_dims=True), col < width)
    tl.store(sums + width, tl.sum(total_k, 0, keep_dims=True), col < width)


@jit
def _qk_norm_rope_sum_kernel(
    partial,  # (programs, 2, D)
    programs,  # of each stream
    q_weight_bars,
    k_weight_bars,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    for i in tl.static_range(len(programs)):
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), partial.dtype.element_ty)
        for first in range(0, programs[i], BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)[:, None]
            inside = (row < programs[i]) & (col < 2 * width)
            total += tl.load(partial + row * 2 * width + col, inside, 0.0)
        sums = tl.sum(total, 0, keep_dims=True)
        tl.store(q_weight_bars[i] + col, sums, col < width)
        tl.store(k_weight_bars[i] + col - width, sums, (col >= width) & (col < 2 * width))
        partial += programs[i] * 2 * width


# --- Launchers


def _fits(qkvs: Sequence[Tensor], *lists: Sequence[Tensor | None]) -> bool:
    """Return True if one launch serves these streams."""
    first = qkvs[0]
    alike = all(
        x.shape[2:] == first.shape[2:] and x.dtype == first.dtype and x.numel() for x in qkvs
    )
    return alike and all(len({t.dtype for t in tensors if t is not None}) <= 1 for tensors in lists)


def _views(tensors: Sequence[Tensor] | None) -> tuple[View, ...] | None:
    """Return (B, N, ..., H, D) as kernels take it: any strides but the last."""
    if tensors is None:
        return None
    dense = [x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return tuple([View(x, x.stride(0), x.stride(1), x.stride(-2)) for x in dense])


def _parts(views: tuple[View, ...] | None) -> tuple[int, ...] | None:
    """Return the elements from q to k of every stream."""
    return None if views is None else tuple([view.pointer.stride(2) for view in views])  # type: ignore[union-attr]


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple([t.contiguous() for t in tensors])


def _rotations(ropes: Sequence[Tensor | None]) -> tuple[Any, tuple[int, ...] | None]:
    """Return angles, another's where there are none, and which streams are rotated."""
    some = [rope for rope in ropes if rope is not None]
    if not some:
        return None, None
    rotated = tuple([int(rope is not None) for rope in ropes])
    angles = _dense([some[0] if rope is None else rope for rope in ropes])
    return angles, None if all(rotated) else rotated


def _forward(
    qkvs: list[Tensor],
    qkv_dots: list[Tensor] | None,
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    ropes: list[Tensor | None],
    eps: float,
) -> Any:
    """Return q, its tangent, k, its tangent, v, its tangent and the statistics of all streams."""
    if not _fits(qkvs, qkv_dots or (), q_weights, k_weights, ropes):
        return NotImplemented
    heads, width = qkvs[0].shape[3:]
    shapes = [(*x.shape[:2], heads, width) for x in qkvs]
    results: list[Any] = [
        None if i % 2 and qkv_dots is None else [qkvs[0].new_empty(s) for s in shapes]
        for i in range(6)
    ]
    work = work_dtype(qkvs[0])
    results += [[qkvs[0].new_empty((*s[:3], 1), dtype=work) for s in shapes] for _ in range(2)]
    sources, source_dots = _views(qkvs), _views(qkv_dots)
    counts = tuple([b * n * heads for b, n, *_ in shapes])
    block_rows, block_width, num_warps = tuning.heads(width, qkvs[0].element_size())
    _qk_norm_rope_fwd_kernel[(sum(cdiv(n, block_rows) for n in counts),)](
        sources,
        source_dots,
        _dense(q_weights),
        _dense(k_weights),
        *_rotations(ropes),
        *(None if result is None else tuple(result) for result in results),
        counts,
        tuple([n for _, n, *_ in shapes]),
        _parts(sources),
        _parts(source_dots),
        heads,
        width,
        EPS=eps,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )
    return tuple(results)


def fwd_streams(
    qkvs: list[Tensor],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    ropes: list[Tensor | None],
    eps: float,
) -> Any:
    """Compute results and statistics of all streams."""
    found = _forward(qkvs, None, q_weights, k_weights, ropes, eps)
    return found if found is NotImplemented else (*found[:6:2], *found[6:])


def jvp_streams(
    qkvs: list[Tensor],
    qkv_dots: list[Tensor | None],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    ropes: list[Tensor | None],
    eps: float,
) -> Any:
    """Compute results, tangents and statistics of all streams."""
    return _forward(qkvs, filled(qkv_dots, qkvs), q_weights, k_weights, ropes, eps)


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
    heads, width = qkvs[0].shape[3:]
    bars = [filled(given, [x[:, :, 0] for x in qkvs]) for given in (q_bars, k_bars, v_bars)]
    results = [[t.new_empty(t.shape) for t in ts] for ts in (qkvs, q_weights, k_weights)]
    counts = tuple([x.shape[0] * x.shape[1] * heads for x in qkvs])
    block_rows, block_width, num_warps = tuning.heads(width, qkvs[0].element_size())
    most = tuning.REDUCING_PROGRAMS // len(qkvs)
    programs = tuple([min(cdiv(n, block_rows), most) for n in counts])
    partial = q_rstds[0].new_empty((sum(programs), 2, width))
    sources = _views(qkvs)
    _qk_norm_rope_bwd_kernel[(sum(programs),)](
        *map(_views, bars),
        sources,
        _dense(q_weights),
        _dense(k_weights),
        *_rotations(ropes),
        tuple(q_rstds),
        tuple(k_rstds),
        tuple(results[0]),
        partial,
        programs,
        counts,
        tuple([x.shape[1] for x in qkvs]),
        _parts(sources),
        heads,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
        **tuning.registers(num_warps),
    )
    block_rows, block_cols, num_warps = tuning.sum_of_rows(max(programs))
    _qk_norm_rope_sum_kernel[(cdiv(2 * width, block_cols),)](
        partial,
        programs,
        tuple(results[1]),
        tuple(results[2]),
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )
    return tuple(results)


fwd = functools.partial(one_stream, fwd_streams)
jvp = functools.partial(one_stream, jvp_streams)
bwd = functools.partial(one_stream, bwd_streams)
