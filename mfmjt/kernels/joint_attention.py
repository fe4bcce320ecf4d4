"""Softmax attention over the concatenation of several token streams.

    value      S = scale q k^T,  P = softmax(S),  o = P v
    tangent    S_dot = scale (q_dot k^T + q k_dot^T),  W = P (S_dot - rowsum(P S_dot))
               o_dot = W v + P v_dot
    cotangent  v_bar = P^T o_bar,  S_bar = P (o_bar v^T - rowsum(o_bar o))
               q_bar = scale S_bar k,  k_bar = scale S_bar^T q

q (B, N, H, D), k (B, M, K, D), v (B, M, K, E), each a tensor or a tuple of streams along the
tokens; where K < H, each H / K heads of queries share one of keys. A mask is added to S, or says
which keys a query sees: of the others S is -inf, P and W are zero, and a query without any has
o = 0. Stored in the dtype of q, computed in float32 (float64 for float64). Subtracting the row's
mean of S_dot before W is formed changes nothing in exact arithmetic and keeps the digits where
S_dot has a common offset. Kept for backward: q, k, v, o, and the log of each row's sum (B, H, N),
from which P is made again; in the Triton kernels to the base 2, unless there is a mask, whose own
gradient is the formula's. What does not move costs no matmul.

4 B H N M D operations, 12 with all tangents, 14 for gradients. A fused kernel reads q, k, v, writes
o and never stores S; the formulas below store blocks of it that fit a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _attention, _backends
from mfmjt.kernels._op import Op, Tensors, check, check_tensors, use_reference, work_dtype
from mfmjt.kernels._second_order import of_reference
from mfmjt.kernels.cpu import joint_attention as cpu

__all__ = ["joint_attention", "joint_attention_ref"]

Streams = Tensor | Sequence[Tensor]
Lengths = Tensor | Sequence[Tensor | None] | None

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _tuple(streams: Streams) -> tuple[Tensor, ...]:
    return tuple(streams) if isinstance(streams, (list, tuple)) else (streams,)  # type: ignore[return-value]


def _limits(lengths: Lengths, keys: Sequence[Tensor]) -> list[Tensor | None]:
    if lengths is None:
        return [None] * len(keys)
    return [lengths] if isinstance(lengths, Tensor) else list(lengths)


def joint_attention_ref(
    q: Tensors,
    k: Streams,
    v: Streams,
    scale: float | None = None,
    lengths: Lengths = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensors:
    """Compute `joint_attention` in plain PyTorch; the definition of correct."""
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    valid = _attention.valid_keys(keys, _limits(lengths, keys))
    all_q, all_k, all_v = (torch.cat(s, dim=1) for s in (queries, keys, values))
    groups = all_q.shape[2] // all_k.shape[2]
    all_k, all_v = (x.repeat_interleave(groups, 2) for x in (all_k, all_v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    seen = _seen(mask, valid, causal, all_q.shape[1], all_k)
    if seen is not None:
        anyone = seen.any((1, 2)).expand(all_k.shape[:2])
        all_k, all_v = (_attention.without_padding(x, anyone) for x in (all_k, all_v))
    scale = all_q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(all_q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", all_q * scale, all_k).to(work)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
        scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0)
    probability = scores.softmax(-1)
    if seen is not None:
        probability = probability.masked_fill(~seen, 0)
    out = torch.einsum("bhnm,bmhd->bnhd", probability.to(all_v.dtype), all_v).to(all_q.dtype)
    if isinstance(q, Tensor):
        return out
    return out.split([query.shape[1] for query in queries], dim=1)


def _seen(
    mask: Tensor | None, valid: Tensor | None, causal: bool, queries: int, keys: Tensor
) -> Tensor | None:
    """Return a mask (B or 1, H or 1, N or 1, M), True where a query sees a key; None for all."""
    rules = []
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > -torch.inf
        rules.append(shown.expand(*shown.shape[:3], keys.shape[1]))
    if valid is not None:
        rules.append(valid[:, None, None])
    if causal:
        ones = torch.ones(queries, keys.shape[1], dtype=torch.bool, device=keys.device)
        rules.append(ones.tril()[None, None])
    return functools.reduce(torch.logical_and, rules) if rules else None


def _jvp(
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
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    valid, heads = _attention.valid_keys(k, lengths), _attention.Heads(q[0], k[0])
    query, keys, values = heads.gather(q), heads.gather(k, valid), heads.gather(v, valid)
    query_dot = heads.gather(_attention.tangents(q, q_dot))
    keys_dot = heads.gather(_attention.tangents(k, k_dot), valid)
    values_dot = heads.gather(_attention.tangents(v, v_dot), valid)
    bad = bad_dot = None
    if mask is not None or causal:
        keys, values, bad = _attention.cleaned(keys, values)
        keys_dot, values_dot, bad_dot = _attention.cleaned(keys_dot, values_dot)
        assert keys is not None  # it was given
        keys_dot = torch.zeros_like(keys) if keys_dot is None and bad_dot is not None else keys_dot
    keys = _marked(heads.without_mean(keys), bad).transpose(1, 2)
    if keys_dot is not None:
        keys_dot = _marked(heads.without_mean(keys_dot), bad_dot).transpose(1, 2)
    moves = query_dot is not None or keys_dot is not None
    values_of_w = heads.without_mean(values) if moves else values
    o = query.new_empty(*query.shape[:2], values.shape[2])
    o_dot = torch.empty_like(o) if moves else torch.zeros_like(o)
    lse = query.new_empty(query.shape[:2], dtype=work_dtype(query))
    tokens = sum(x.shape[1] for x in q)
    hidden = _attention.Hidden(heads, mask, valid, causal, tokens)
    for pair, row, seen, parts in heads.blocks(tokens, keys.shape[2], 1 + moves, causal):
        p, w = parts[0], parts[1] if moves else None
        torch.bmm(query[pair, row], keys[pair, :, :seen], out=p)
        if w is not None and query_dot is not None:
            torch.bmm(query_dot[pair, row], keys[pair, :, :seen], out=w)
            if keys_dot is not None:
                w.baddbmm_(query[pair, row], keys_dot[pair, :, :seen])
        elif w is not None and keys_dot is not None:
            torch.bmm(query[pair, row], keys_dot[pair, :, :seen], out=w)
        lse[pair, row] = _attention.softmax(p, w, hidden.block(pair, row, seen), scale)
        torch.bmm(p, values[pair, :seen], out=o[pair, row])
        if w is not None:
            torch.bmm(w, values_of_w[pair, :seen], out=o_dot[pair, row])
        if values_dot is not None:
            o_dot[pair, row].baddbmm_(p, values_dot[pair, :seen])
    return heads.scatter(o, q), heads.scatter(o_dot, q), lse.view(len(q[0]), q[0].shape[2], tokens)


def _marked(keys: Tensor, bad: Tensor | None) -> Tensor:
    """Put NaN into keys that are not finite, so that whoever sees one has NaN for an answer."""
    return keys if bad is None else keys.masked_fill(bad, torch.nan)


def _fwd(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    fixed: list[Tensor | None] = [None] * len(k)
    still: list[Tensor | None] = [None] * len(q)
    o, _, lse = _jvp(q, k, v, still, fixed, fixed, mask, lengths, causal, scale)
    return o, lse


def _bwd(
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
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    valid, heads = _attention.valid_keys(k, lengths), _attention.Heads(q[0], k[0])
    query, keys, values = heads.gather(q), heads.gather(k, valid), heads.gather(v, valid)
    out_bar = heads.gather(o_bar)
    if mask is not None or causal:  # rows that saw what is not finite have that in lse
        keys, values, _ = _attention.cleaned(keys, values)
    keys = heads.without_mean(keys)
    query_bar = torch.empty_like(query)
    queries, tokens = sum(x.shape[1] for x in q), keys.shape[1]
    whole = heads.is_one_block(queries, tokens, causal)  # else rounding would add up over blocks
    keys_bar, values_bar = (
        x.new_zeros(x.shape, dtype=x.dtype if whole else lse.dtype) for x in (keys, values)
    )
    of_mask = mask is not None and needs[3]
    mask_bar = lse.new_zeros(mask.shape) if of_mask else q[0].new_empty(0)  # type: ignore[union-attr]
    sums = lse.reshape(query.shape[:2])
    hidden = _attention.Hidden(heads, mask, valid, causal, queries)
    for pair, row, seen, (p, s_bar) in heads.blocks(queries, tokens, 2, causal):
        torch.bmm(query[pair, row], keys[pair, :seen].transpose(1, 2), out=p)
        torch.bmm(out_bar[pair, row], values[pair, :seen].transpose(1, 2), out=s_bar)
        of_rows = sums[pair, row].contiguous()
        _attention.softmax_bar(p, s_bar, hidden.block(pair, row, seen), of_rows, scale)
        torch.bmm(s_bar, keys[pair, :seen], out=query_bar[pair, row])
        for bar, left, right in ((keys_bar, s_bar, query), (values_bar, p, out_bar)):
            if whole:
                torch.bmm(left.transpose(1, 2), right[pair, row], out=bar[pair])
            else:
                bar[pair, :seen] += torch.bmm(left.transpose(1, 2), right[pair, row])
        if of_mask:
            hidden.add_gradient(mask_bar, s_bar, pair, row, scale)
    k_bar, v_bar = heads.scatter(keys_bar, k, valid), heads.scatter(values_bar, v, valid)
    mask_bar = mask_bar.to(mask.dtype) if of_mask else mask_bar  # type: ignore[union-attr]
    return heads.scatter(query_bar, q), k_bar, v_bar, mask_bar


def _fake(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    rows = (q[0].shape[0], q[0].shape[2], sum(x.shape[1] for x in q))
    o = [x.new_empty(*x.shape[:3], v[0].shape[3]) for x in q]
    return o, q[0].new_empty(rows, dtype=work_dtype(q[0]))


def _plain(*args: Any) -> Any:
    (q, k, v, mask, *rest), _ = _op.cast(args, None)
    if not q[0].is_cpu or _backends.ON_CPU or cpu.route(q, k, v, mask, rest[1]) != "flash":
        return NotImplemented
    return cpu.flash(q, k, v, rest[0], rest[2])


def _reference(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    mask: Tensor | None,
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
) -> tuple[list[Tensor]]:
    """Call `joint_attention_ref` with the op's arguments."""
    return (list(joint_attention_ref(tuple(q), k, v, scale, lengths, mask, causal)),)


_op = Op(
    "joint_attention",
    _fwd,
    _jvp,
    _bwd,
    reference=_reference,
    fake=_fake,
    plain=_plain,
    autocasts="q, k, v, and a mask that is added, of one dtype",
    jvp_bwd=of_reference(_reference, _jvp, "o"),
)


def joint_attention(
    q: Tensors,
    k: Streams,
    v: Streams,
    scale: float | None = None,
    lengths: Lengths = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensors:
    """Attend from every query to the keys of all streams, differentiable in both modes.

    A query that sees no key gets zeros. A key that a query does not see may be anything for it, NaN
    included; one that no query sees gets zero gradients.

    Args:
        q: `(B, N, H, D)`, or a tuple of such streams, each with its own N. There may be fewer
            streams of queries than of keys, where the rest of the answer is not wanted. On a GPU
            D and the width of v go up to 256 and are best multiples of 8.
        k: `(B, M, K, D)`, or a tuple of such streams, each with its own M. K divides H: of grouped
            queries each H / K neighboring heads share one of keys.
        v: As k, of a width of its own or D.
        scale: Factor of the scores; D ** -0.5 by default.
        lengths: How many leading keys count, `(B,)` integers on the device of q: one tensor where
            k is one tensor, else a tuple with a tensor or None (all count) for each stream.
        mask: Which keys a query sees, of bool, or what is added to its scores, of q's dtype, where
            -inf hides a key. It broadcasts to `(B, H, N, M)`, N and M counting the tokens of all
            streams. One that is added has a gradient, but no tangent. Where all a row's numbers are
            below -32, their largest is taken off, which softmax cancels.
        causal: A query sees the keys up to its own place among all tokens.

    Returns:
        The answers, of q's dtype and shape but for the width, which is v's: a tensor, or a tuple of
        streams.

    Raises:
        ValueError: Streams do not fit together, or a head is too wide, or a stream too long, for a
            GPU's kernels; or the mask is of another shape or dtype.
        NotImplementedError: The mask has a tangent.
    """
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    check_tensors("joint_attention", {"mask": mask}, q=queries, k=keys, v=values)
    limits = _limits(lengths, keys)
    _check(queries, keys, values, limits)
    if mask is not None:
        mask = _checked_mask(mask, queries, keys)
    if use_reference():
        return joint_attention_ref(q, k, v, scale, lengths, mask, causal)
    scale = queries[0].shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # kernels look for a row's largest score by its largest q k^T
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        queries = tuple(sign * x for x in queries)
    out = _op(list(queries), list(keys), list(values), mask, limits, causal, scale)
    return out[0] if isinstance(q, Tensor) else tuple(out)


def _checked_mask(mask: Tensor, q: Sequence[Tensor], k: Sequence[Tensor]) -> Tensor:
    """Return a mask of four axes; the largest number of a row is not far below zero.

    Else the log of the row's sum would have fewer digits left, and at -1e38, say, none.
    """
    batch, _, heads, _ = q[0].shape
    sizes = (batch, heads, *(sum(x.shape[1] for x in xs) for xs in (q, k)))
    shape = (1,) * (4 - mask.ndim) + mask.shape
    fits = len(shape) == 4 and all(n in (1, size) for n, size in zip(shape, sizes, strict=True))
    added = mask.is_floating_point()
    needs = f"a mask that broadcasts to (B, H, N, M) = {sizes}, of bool or of q's dtype"
    check(fits and (added or mask.dtype == torch.bool), "joint_attention", needs, mask=mask)
    if mask.device != q[0].device:
        needs = f"the mask on {q[0].device} as q, not on {mask.device}"
        check(False, "joint_attention", needs, mask=mask)
    mask = mask[(None,) * (4 - mask.ndim)]
    if not added or mask.numel() == 0:
        return mask
    top = mask.detach().amax(-1, keepdim=True)
    return mask - torch.where((top < -32) & (top > -torch.inf), top, 0)


def _check(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], lengths: list[Tensor | None]
) -> None:
    of_q, of_k, of_v = (
        [(t.shape[0], *t.shape[2:]) if t.ndim == 4 else () for t in streams]
        for streams in (q, k, v)
    )
    fits = len(k) == len(v) == len(lengths)
    fits = fits and all(a.shape[:3] == b.shape[:3] for a, b in zip(k, v, strict=True))
    fits = fits and all(len(set(sizes)) == 1 and sizes[0] for sizes in (of_q, of_k, of_v))
    fits = fits and of_q[0][::2] == of_k[0][::2] and of_q[0][2] > 0 and of_v[0][2] > 0
    groups = fits and of_k[0][1] > 0 and of_q[0][1] % of_k[0][1] == 0
    if not (groups and sum(x.shape[1] for x in k) > 0):
        needs = (
            "q, k, v (B, tokens, H, D) with as many streams (and lengths) of v as of k, not empty"
        )
        if fits and not groups:
            needs = "q, k, v (B, tokens, H, D) whose heads of k divide those of q"
        streams = zip("qkv", (q, k, v), strict=True)
        named = {f"{name}[{i}]": x for name, xs in streams for i, x in enumerate(xs)}
        check(False, "joint_attention", needs, **named)
    check_tensors("joint_attention", {f"lengths[{i}]": n for i, n in enumerate(lengths)})
    for length in (n for n in lengths if n is not None):
        if not (length.shape == q[0].shape[:1] and length.dtype in _INTEGERS):
            needs = f"lengths ({len(q[0])},) of integers, one for each sample"
            check(False, "joint_attention", needs, lengths=length)
        if length.device != q[0].device:  # to be copied at every call, which is waited for
            needs = f"lengths on {q[0].device} as q, not on {length.device}"
            check(False, "joint_attention", needs, lengths=length)
