"""Launchers of `joint_attention`: the kernels of `attention`, whatever the strides of streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._op import check, work_dtype
from mfmjt.kernels.triton import cdiv, target, tuning
from mfmjt.kernels.triton.attention import (
    Sizes,
    attention_bwd_kv_kernel,
    attention_bwd_q_kernel,
    attention_fwd_kernel,
)
from mfmjt.kernels.triton.launching import View, empty, launch, strides

__all__ = ["bwd", "fwd", "jvp"]


def _view(x: Tensor) -> View:
    unit = 8 if x.shape[3] % 8 == 0 else 1
    return View(x, *(d // unit for d in strides(x)))


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether kernels read x where it lies, and the others (or None) by its strides.

    Heads are dense, 32 bits reach every element of a tile, and strides are whole units.
    """
    same = all(y is None or y.stride() == x.stride() for y in others)
    whole = x.shape[3] % 8 != 0 or all(d % 8 == 0 for d in strides(x))
    return same and whole and x.stride(3) == 1 and x.stride(1) < 2**22


def _packed(
    streams: Sequence[Tensor], dots: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return streams and their tangents: themselves where kernels read them, else contiguous."""
    pairs = zip(streams, dots or [None] * len(streams), strict=True)
    kept = [
        (x, dot) if _fits(x, dot) else (x.contiguous(), dot if dot is None else dot.contiguous())
        for x, dot in pairs
    ]
    return [x for x, _ in kept], [dot for _, dot in kept]


def _launch(
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
        streams: (B, tokens, H, D) as `_packed` returned them: those of q, k, v, and of o_bar and o.
        pointers: Tensors whose strides the kernel knows; the parts of lse last.
        lengths: For each stream of keys, (B,) or None.
        lse: (B, H, all queries).
        scale: Factor of the scores.

    Raises:
        ValueError: Heads are too wide, or 32 bits do not count the elements of a sample.
    """
    first = streams[0][0]
    batch, _, heads, width = first.shape
    check(width <= 256, "joint_attention", "a head width up to 256 on a GPU", q=first)
    for name, group in zip(("q", "k", "v", "o_bar", "o"), streams, strict=False):
        for i, x in enumerate(group):
            needs = "less than 2**31 elements of a sample in each stream on a GPU"
            near = x.shape[1] * x.stride(1) < 2**31
            check(near, "joint_attention", needs, **{f"{name}[{i}]": x})
    queries, keys = (tuple([x.shape[1] for x in group]) for group in streams[:2])
    tokens = keys if part == "bwd_kv" else queries
    if batch * heads * sum(tokens) == 0:
        return
    options = tuning.attention(part, batch * heads, tokens, width, first.element_size())
    block = options["BLOCK_M" if part == "bwd_kv" else "BLOCK_N"]
    grid = batch * heads * sum(cdiv(n, block) for n in tokens), cdiv(width, options["BLOCK_OUT"])
    counts = tuple([None if n is None else n.contiguous() for n in lengths])
    launch(
        kernel,
        grid,
        *([_view(x) for x in group] for group in streams),
        *(None if group is None else list(group) for group in pointers),
        Sizes(queries, keys, counts, lse.shape[2], heads, scale, scale * math.log2(math.e)),
        WIDTH=width,
        PRECISION="tf32x3" if first.dtype.itemsize == 4 and target()[0] == "cuda" else "ieee",
        **options,
    )


def _by_streams(lse: Tensor, q: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts (B, H, N) of one number for each query, (B, H, all N); views."""
    return lse.split([x.shape[1] for x in q], dim=2)


def _is_left(q: Sequence[Tensor]) -> bool:
    """Return whether the formulas compute it: Triton knows no matrix unit with float64."""
    return q[0].element_size() == 8 and not INTERPRETED


def _new_lse(q: Sequence[Tensor]) -> Tensor:
    """Return room for one number for each query, (B, H, all N)."""
    batch, _, heads, _ = q[0].shape
    tokens = sum(stream.shape[1] for stream in q)
    return q[0].new_empty((batch, heads, tokens), dtype=work_dtype(q[0]))


def fwd(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> Any:
    """Launch the value: o, lse."""
    if _is_left(q):
        return NotImplemented
    o, lse = empty(q), _new_lse(q)
    streams = [_packed(x)[0] for x in (q, k, v)]
    none = [None] * len(k)
    pointers = (None, none, none, o, None, _by_streams(lse, q))
    _launch(attention_fwd_kernel, "value", streams, pointers, lengths, lse, scale)
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
    if _is_left(q):
        return NotImplemented
    o, o_dot, lse = empty(q), empty(q), _new_lse(q)
    (all_q, q_dot), (keys, k_dot), (values, v_dot) = (
        _packed(x, dots) for x, dots in ((q, q_dot), (k, k_dot), (v, v_dot))
    )
    keys_move = any(dot is not None for dot in (*k_dot, *v_dot))
    for queries_move in (True, False):
        group = [i for i, dot in enumerate(q_dot) if (dot is not None) == queries_move]
        if not group:
            continue
        parts: Sequence[Any] = (all_q, q_dot, o, o_dot, _by_streams(lse, q))
        own, own_dot, out, out_dot, sums = ([x[i] for i in group] for x in parts)
        moves = queries_move or keys_move
        for zero in () if moves else out_dot:
            zero.zero_()
        dots = (own_dot if queries_move else None, k_dot, v_dot)
        pointers = (*dots, out, out_dot if moves else None, sums)
        part = "tangent" if moves else "value"
        _launch(attention_fwd_kernel, part, (own, keys, values), pointers, lengths, lse, scale)
    return o, o_dot, lse


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
    if _is_left(q):
        return NotImplemented
    q_bar, k_bar, v_bar = empty(q), empty(k), empty(v)
    streams = [_packed(x)[0] for x in (q, k, v, o_bar, o)]
    sums, delta = _by_streams(lse, q), _by_streams(torch.empty_like(lse), q)
    pointers: tuple[Any, ...] = (q_bar, delta, sums)
    _launch(attention_bwd_q_kernel, "bwd_q", streams, pointers, lengths, lse, scale)
    pointers = (k_bar, v_bar, delta, sums)
    _launch(attention_bwd_kv_kernel, "bwd_kv", streams[:4], pointers, lengths, lse, scale)
    return q_bar, k_bar, v_bar
