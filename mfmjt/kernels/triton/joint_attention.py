"""Launchers of `joint_attention`: the kernels of `attention`, whatever the strides of streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._attention import joined, parted
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

FASTER: frozenset[tuple[str, torch.dtype, int]] = frozenset()
"""(GPU, dtype, D) of committed measurements in which PyTorch's attention computes a value faster
than our kernel, the concatenation of streams included. None has been made."""


def _view(x: Tensor) -> View:
    unit = 8 if x.shape[3] % 8 == 0 else 1
    return View(x, *(d // unit for d in strides(x)))


def _fits(x: Tensor, *others: Tensor) -> bool:
    """Return whether kernels read x where it lies, and the others by its strides.

    Heads are dense, 32 bits reach every element of a tile, and strides are whole units.
    """
    same = all(y.stride() == x.stride() for y in others)
    whole = x.shape[3] % 8 != 0 or all(d % 8 == 0 for d in strides(x))
    return same and whole and x.stride(3) == 1 and x.stride(1) < 2**22


def _packed(*lists: Sequence[Tensor | None]) -> list[list[Any]]:
    """Return lists of streams, the first with tensors only, of one set of strides for each stream.

    They are themselves where kernels read them, else contiguous.
    """
    found = []
    for stream in zip(*lists, strict=True):
        fits = _fits(*(x for x in stream if x is not None))
        found.append([x if x is None or fits else x.contiguous() for x in stream])
    return [list(x) for x in zip(*found, strict=True)]


def _views(streams: Sequence[Tensor]) -> list[View]:
    return [_view(x) for x in streams]


def _launch(
    kernel: Any,
    part: str,
    q: Sequence[Tensor],
    tensors: Sequence[Any],
    blocks: Sequence[Tensor],
    lengths: Sequence[tuple[Tensor | None, ...]],
    lse: Tensor,
    scale: float,
) -> None:
    """Run one kernel over all blocks of queries, or of keys for the gradients of keys.

    Args:
        kernel: The kernel.
        part: Its name in `tuning.attention`.
        q: Streams of queries as `_packed` returned them.
        tensors: What the kernel takes after the views of q.
        blocks: The streams that are cut into blocks, q or k.
        lengths: As `Sizes` has them.
        lse: (B, H, all queries).
        scale: Factor of the scores.
    """
    batch, _, heads, width = q[0].shape
    tokens = tuple([x.shape[1] for x in blocks])
    if batch * heads * sum(tokens) == 0:
        return
    options = tuning.attention(part, batch * heads, tokens, width, q[0].element_size())
    block = options["BLOCK_M" if part == "bwd_kv" else "BLOCK_N"]
    grid = batch * heads * sum(cdiv(n, block) for n in tokens), cdiv(width, options["BLOCK_OUT"])
    queries = tuple([x.shape[1] for x in q])
    launch(
        kernel,
        grid,
        _views(q),
        *tensors,
        Sizes(queries, tuple(lengths), lse.shape[2], heads, scale, scale * math.log2(math.e)),
        WIDTH=width,
        PRECISION="tf32x3" if q[0].dtype.itemsize == 4 and target()[0] == "cuda" else "ieee",
        **options,
    )


def _check(**groups: Sequence[Tensor]) -> None:
    """Raise ValueError if heads are too wide, or 32 bits do not count a sample's elements."""
    for name, group in groups.items():
        for i, x in enumerate(group):
            wide = x.shape[3] <= 256
            check(wide, "joint_attention", "a head width up to 256 on a GPU", **{f"{name}[{i}]": x})
            needs = "less than 2**31 elements of a sample in each stream on a GPU"
            near = x.shape[1] * x.stride(1) < 2**31
            check(near, "joint_attention", needs, **{f"{name}[{i}]": x})


def _tokens(streams: Sequence[Tensor]) -> list[int]:
    return [x.shape[1] for x in streams]


def _dense(lengths: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple([None if n is None else n.contiguous() for n in lengths])


def _groups(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    k_dot: Sequence[Tensor | None],
    v_dot: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
) -> list[list[Any]]:
    """Return k, v, k_dot, v_dot, tokens and lengths by what moves: a group shares a loop."""
    k, v, k_dot, v_dot = _packed(k, v, k_dot, v_dot)
    _check(k=k, v=v)
    found: list[list[Any]] = []
    moves = [(a is not None, b is not None) for a, b in zip(k_dot, v_dot, strict=True)]
    for kind in dict.fromkeys(moves):
        own = [i for i, other in enumerate(moves) if other == kind]
        keys, values = ([x[i] for i in own] for x in (k, v))
        dots = [
            [x[i] for i in own] if there else None
            for x, there in zip((k_dot, v_dot), kind, strict=True)
        ]
        counts = _dense([lengths[i] for i in own])
        found.append([_views(keys), values, *dots, _tokens(keys), counts])
    return [list(x) for x in zip(*found, strict=True)]


def _by_streams(lse: Tensor, q: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts (B, H, N) of one number for each query, (B, H, all N); views."""
    return lse.split([x.shape[1] for x in q], dim=2)


def _is_left(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], mask: Tensor | None, causal: bool
) -> bool:
    """Return whether the formulas compute it: Triton knows no matrix unit with float64."""
    if mask is not None or causal or q[0].shape[2:] != k[0].shape[2:] or k[0].shape != v[0].shape:
        return True
    return q[0].element_size() == 8 and not INTERPRETED


def _new_lse(q: Sequence[Tensor]) -> Tensor:
    """Return room for one number for each query, (B, H, all N)."""
    batch, _, heads, _ = q[0].shape
    tokens = sum(stream.shape[1] for stream in q)
    return q[0].new_empty((batch, heads, tokens), dtype=work_dtype(q[0]))


def fwd(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> Any:
    """Launch the value: o, lse."""
    if _is_left(q, k, v, mask, causal):
        return NotImplemented
    gpu = torch.cuda.get_device_name(q[0].device) if q[0].is_cuda else "cpu"
    if (gpu, q[0].dtype, q[0].shape[3]) in FASTER and all(n is None for n in lengths):
        return _by_pytorch(q, k, v, scale)
    o, lse = empty(q), _new_lse(q)
    (queries,) = _packed(q)
    _check(q=queries)
    still: list[Tensor | None] = [None] * len(k)
    *groups, counts = _groups(k, v, still, still, lengths)
    tensors = (None, *groups, o, None, list(_by_streams(lse, q)))
    _launch(attention_fwd_kernel, "value", queries, tensors, queries, counts, lse, scale)
    return o, lse


def _by_pytorch(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], Tensor]:
    """Compute o and lse, to the base 2, by cuDNN, or by PyTorch's flash attention on a CPU."""
    heads = [joined(x).transpose(1, 2) for x in (q, k, v)]
    if q[0].is_cuda:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        o, lse, *_ = cudnn(*heads, None, True, scale=scale)
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = flash(*heads, scale=scale)
    return parted(o.transpose(1, 2), q), lse.reshape(o.shape[:3]) * math.log2(math.e)


def jvp(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dot: list[Tensor | None],
    k_dot: list[Tensor | None],
    v_dot: list[Tensor | None],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> Any:
    """Launch value and tangent, o, o_dot, lse: once, or twice where only some queries move."""
    if _is_left(q, k, v, mask, causal):
        return NotImplemented
    o, o_dot, lse = empty(q), empty(q), _new_lse(q)
    all_q, q_dot = _packed(q, q_dot)
    _check(q=all_q)
    *groups, counts = _groups(k, v, k_dot, v_dot, lengths)
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
        dots = own_dot if queries_move else None
        tensors = (dots, *groups, out, out_dot if moves else None, sums)
        part = "tangent" if moves else "value"
        _launch(attention_fwd_kernel, part, own, tensors, own, counts, lse, scale)
    return o, o_dot, lse


def bwd(
    o_bar: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    o: list[Tensor],
    lse: Tensor,
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
    needs: list[bool],
) -> Any:
    """Launch the gradients q_bar, k_bar and v_bar, and an empty mask_bar."""
    if _is_left(q, k, v, mask, causal):
        return NotImplemented
    q_bar, k_bar, v_bar = empty(q), empty(k), empty(v)
    queries, o_bar = _packed(q, o_bar)
    (o,), (k, v) = _packed(o), _packed(k, v)
    _check(q=queries, k=k, v=v, o_bar=o_bar, o=o)
    sums, delta = ([*_by_streams(x, q)] for x in (lse, torch.empty_like(lse)))
    keys, counts = (_views(k), v, _tokens(k)), [_dense(lengths)]
    of_q = (o_bar, _views(o), *keys, q_bar, delta, sums)
    _launch(attention_bwd_q_kernel, "bwd_q", queries, of_q, queries, counts, lse, scale)
    of_kv = (o_bar, *keys, k_bar, v_bar, delta, sums)
    _launch(attention_bwd_kv_kernel, "bwd_kv", queries, of_kv, k, counts, lse, scale)
    return q_bar, k_bar, v_bar, q[0].new_empty(0)
