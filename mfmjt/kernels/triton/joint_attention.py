"""Launchers of `joint_attention`: the kernels of `attention`, whatever the strides of streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mfmjt.kernels._attention import joined, parted, tangents, valid_keys
from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._op import check, work_dtype
from mfmjt.kernels.triton import cdiv, target, tuning
from mfmjt.kernels.triton.attention import (
    Mask,
    Sizes,
    attention_bwd_kv_kernel,
    attention_bwd_q_kernel,
    attention_fwd_kernel,
    attention_visits_kernel,
)
from mfmjt.kernels.triton.launching import View, empty, launch, strides

__all__ = ["bwd", "fwd", "jvp"]

FASTER: frozenset[tuple[str, torch.dtype, int]] = frozenset()
"""(GPU, dtype, D) of committed measurements in which PyTorch's attention computes a value faster
than our kernel, the concatenation of streams included. None has been made."""

_LOG2E = math.log2(math.e)


class Rules(NamedTuple):
    """Which keys a query sees, of one stream each.

    Attributes:
        mask: (B or 1, H or 1, N or 1, M or 1), of bool or of numbers to add; or None.
        causal: Later keys are hidden.
        group: Heads of queries for each of keys.
        keys: M.
    """

    mask: Tensor | None = None
    causal: bool = False
    group: int = 1
    keys: int = 0


_PLAIN = Rules()


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
    rules: Rules,
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
        rules: Of masks and groups.
    """
    batch, _, heads, width = blocks[0].shape
    tokens = tuple([x.shape[1] for x in blocks])
    if batch * heads * sum(tokens) == 0:
        return
    hides = rules.mask is not None or rules.causal
    options = tuning.attention(part, batch * heads, tokens, width, q[0].element_size(), hides)
    block = options["BLOCK_M" if part == "bwd_kv" else "BLOCK_N"]
    grid = batch * heads * sum(cdiv(n, block) for n in tokens), cdiv(width, options["BLOCK_OUT"])
    queries = tuple([x.shape[1] for x in q])
    launch(
        kernel,
        grid,
        _views(q),
        *tensors,
        None if rules.mask is None else _mask(rules, part, options, queries[0], lengths[0][0]),
        Sizes(queries, tuple(lengths), lse.shape[2], heads, scale, scale * _LOG2E),
        WIDTH=width,
        PRECISION="tf32x3" if q[0].dtype.itemsize == 4 and target()[0] == "cuda" else "ieee",
        GROUP=rules.group,
        CAUSAL=rules.causal,
        **options,
    )


def _mask(
    rules: Rules, part: str, options: dict[str, int], queries: int, length: Tensor | None
) -> Mask:
    """Return a mask as kernels take it, with the tiles that each block of a launch visits."""
    mask = rules.mask
    assert mask is not None  # the caller has looked
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if max(mask.stride()[2:]) >= 2**22:  # 32 bits reach every element of a tile
        mask = mask.contiguous()
    steps = [d if n > 1 else 0 for d, n in zip(mask.stride(), mask.shape, strict=True)]
    samples, heads = mask.shape[:2]
    rows, columns, block, tile = queries, rules.keys, options["BLOCK_N"], options["BLOCK_M"]
    by_rows, by_columns, members = steps[2], steps[3], 1
    by_keys = part == "bwd_kv"
    if by_keys:
        rows, columns, block, tile = columns, rows, tile, block
        by_rows, by_columns, length = by_columns, by_rows, None
        members = rules.group if heads > 1 else 1
    elif length is not None:
        samples = length.shape[0]
    heads //= members
    visits = mask.new_empty(
        (samples, heads, cdiv(rows, block), 1 + cdiv(columns, tile)), dtype=torch.int32
    )
    launch(
        attention_visits_kernel,
        (visits[..., 0].numel(),),
        mask,
        (steps[0], steps[1], by_rows, by_columns),
        visits,
        length,
        (heads, rows, columns),
        MEMBERS=members,
        CAUSAL=rules.causal,
        BY_KEYS=by_keys,
        BLOCK=block,
        TILE=tile,
        num_warps=8,
    )
    return Mask(mask, tuple(steps), visits, tuple(strides(visits)))


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


def _is_left(q: Sequence[Tensor]) -> bool:
    """Return whether the formulas compute it: Triton knows no matrix unit with float64."""
    return q[0].element_size() == 8 and not INTERPRETED


def _has_rules(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], mask: Tensor | None, causal: bool
) -> bool:
    """Return whether more is asked for than streams of equal heads and widths."""
    hides = mask is not None or causal
    return hides or q[0].shape[2:] != k[0].shape[2:] or k[0].shape[3] != v[0].shape[3]


def _as_one(
    streams: Sequence[tuple[Sequence[Tensor], Sequence[Tensor | None]]],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    marked: bool = True,
) -> tuple[list[list[Any]], list[Tensor | None], Rules]:
    """Return all tokens of q, k, v and of more, as one stream each, its length, and the rules.

    Heads get one width, zeros beyond their own. Lengths of several streams become a mask.

    Args:
        streams: q, k, v, and what has their tokens; each with its tensors, or None for zeros.
        mask: As `joint_attention` takes it.
        lengths: Likewise.
        causal: Likewise.
        marked: As `_finite` takes it.
    """
    (q, _), (k, _), (v, _), *_ = streams
    width = max(q[0].shape[3], v[0].shape[3])
    found = [_one(like, given, width) for like, given in streams]
    if len(k) > 1:
        mask, lengths = _with_padding(mask, valid_keys(k, lengths)), [None]
    if mask is not None or causal:
        for i in range(1, len(found), 3) if marked else (1,):
            found[i : i + 2] = _finite(found[i], found[i + 1], marked)
    rules = Rules(mask, causal, q[0].shape[2] // k[0].shape[2], sum(_tokens(k)))
    return [[x] for x in found], lengths, rules


def _one(like: Sequence[Tensor], given: Sequence[Tensor | None], width: int) -> Tensor | None:
    """Return streams as one, of heads so wide, zeros where there is nothing; None of Nones."""
    filled = tangents(like, given)
    if filled is None:
        return None
    one: Tensor = joined(filled)
    return one if one.shape[3] == width else pad(one, (0, width - one.shape[3]))


def _with_padding(mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Return a mask that hides padding too."""
    if valid is None:
        return mask
    shown = valid[:, None, None]
    if mask is None:
        return shown
    return mask & shown if mask.dtype == torch.bool else torch.where(shown, mask, -torch.inf)


def _finite(k: Tensor | None, v: Tensor | None, marked: bool) -> list[Tensor | None]:
    """Return keys and values, or their tangents, with zeros for what is not finite.

    A hidden key must not reach a result by 0 * NaN. `marked`: keys are NaN where they or their
    values were not finite, so that whoever sees one has NaN for an answer.
    """
    given = [x for x in (k, v) if x is not None]
    if not given:
        return [None, None]
    if k is None:
        k = torch.zeros_like(given[0])
    if marked:  # 0 * the largest number is NaN where that is NaN or infinite
        k = k + sum(0 * torch.linalg.vector_norm(x, math.inf, -1, keepdim=True) for x in given)
    else:
        k = k.nan_to_num(0, 0, 0)
    return [k, None if v is None else v.nan_to_num(0, 0, 0)]


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
    if _is_left(q):
        return NotImplemented
    if _has_rules(q, k, v, mask, causal):
        streams = ((q, q), (k, k), (v, v))
        (one_q, one_k, one_v), lengths, rules = _as_one(streams, mask, lengths, causal)
        (o,), lse = _value(one_q, one_k, one_v, lengths, scale, rules)
        return _parted(o, v, q), _kept(lse, mask)
    gpu = torch.cuda.get_device_name(q[0].device) if q[0].is_cuda else "cpu"
    if (gpu, q[0].dtype, q[0].shape[3]) in FASTER and all(n is None for n in lengths):
        return _by_pytorch(q, k, v, scale)
    return _value(q, k, v, lengths, scale, _PLAIN)


def _value(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    scale: float,
    rules: Rules,
) -> tuple[list[Tensor], Tensor]:
    o, lse = empty(q), _new_lse(q)
    (queries,) = _packed(q)
    _check(q=queries)
    still: list[Tensor | None] = [None] * len(k)
    *groups, counts = _groups(k, v, still, still, lengths)
    tensors = (None, *groups, o, None, list(_by_streams(lse, q)))
    _launch(attention_fwd_kernel, "value", queries, tensors, queries, counts, lse, scale, rules)
    return o, lse


def _parted(x: Tensor, like: Sequence[Tensor], tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return one stream as those that it was made of, of the width that theirs had."""
    return parted(x[..., : like[0].shape[3]], tokens)


def _kept(lse: Tensor, mask: Tensor | None) -> Tensor:
    """Return what backward is given: not to the base 2 where the formula may be, for a mask's."""
    return lse if mask is None else lse / _LOG2E


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
    return parted(o.transpose(1, 2), q), lse.reshape(o.shape[:3]) * _LOG2E


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
    if _is_left(q):
        return NotImplemented
    if not _has_rules(q, k, v, mask, causal):
        return _dual(q, k, v, q_dot, k_dot, v_dot, lengths, scale, _PLAIN)
    streams = ((q, q), (k, k), (v, v), (q, q_dot), (k, k_dot), (v, v_dot))
    ones, lengths, rules = _as_one(streams, mask, lengths, causal)
    one_q, one_k, one_v, of_q, of_k, of_v = ones
    (o,), (o_dot,), lse = _dual(one_q, one_k, one_v, of_q, of_k, of_v, lengths, scale, rules)
    return _parted(o, v, q), _parted(o_dot, v, q), _kept(lse, mask)


def _dual(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    q_dot: Sequence[Tensor | None],
    k_dot: Sequence[Tensor | None],
    v_dot: Sequence[Tensor | None],
    lengths: Sequence[Tensor | None],
    scale: float,
    rules: Rules,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
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
        _launch(attention_fwd_kernel, part, own, tensors, own, counts, lse, scale, rules)
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
    """Launch the gradients q_bar, k_bar and v_bar; the formula has that of a mask."""
    if _is_left(q) or (mask is not None and needs[3]):
        return NotImplemented
    nothing = q[0].new_empty(0)
    if not _has_rules(q, k, v, mask, causal):
        return *_gradients(o_bar, q, k, v, o, lse, lengths, scale, _PLAIN), nothing
    streams = ((q, q), (k, k), (v, v), (q, o_bar), (q, o))
    ones, lengths, rules = _as_one(streams, mask, lengths, causal, marked=False)
    one_q, one_k, one_v, one_bar, one_o = ones
    sums = lse if mask is None else lse * _LOG2E
    bars = _gradients(one_bar, one_q, one_k, one_v, one_o, sums, lengths, scale, rules)
    (q_bar,), (k_bar,), (v_bar,) = bars
    return _parted(q_bar, q, q), _parted(k_bar, k, k), _parted(v_bar, v, v), nothing


def _gradients(
    o_bar: Sequence[Tensor],
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    o: Sequence[Tensor],
    lse: Tensor,
    lengths: Sequence[Tensor | None],
    scale: float,
    rules: Rules,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    q_bar, k_bar, v_bar = empty(q), empty(k), empty(v)
    queries, o_bar = _packed(q, o_bar)
    (o,), (k, v) = _packed(o), _packed(k, v)
    _check(q=queries, k=k, v=v, o_bar=o_bar, o=o)
    sums, delta = ([*_by_streams(x, q)] for x in (lse, torch.empty_like(lse)))
    keys, counts = (_views(k), v, _tokens(k)), [_dense(lengths)]
    of_q = (o_bar, _views(o), *keys, q_bar, delta, sums)
    _launch(attention_bwd_q_kernel, "bwd_q", queries, of_q, queries, counts, lse, scale, rules)
    of_kv = (o_bar, *keys, k_bar, v_bar, delta, sums)
    _launch(attention_bwd_kv_kernel, "bwd_kv", queries, of_kv, k, counts, lse, scale, rules)
    return q_bar, k_bar, v_bar
