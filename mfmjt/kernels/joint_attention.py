"""Softmax attention over the concatenation of several token streams.

    value      S = scale q k^T,  P = softmax(S),  o = P v
    tangent    S_dot = scale (q_dot k^T + q k_dot^T),  W = P (S_dot - rowsum(P S_dot))
               o_dot = W v + P v_dot
    cotangent  v_bar = P^T o_bar,  S_bar = P (o_bar v^T - rowsum(o_bar o))
               q_bar = scale S_bar k,  k_bar = scale S_bar^T q

q (B, N, H, D), k and v (B, M, H, D), each a tensor or a tuple of streams along the tokens. Stored
in the dtype of q, computed in float32 (float64 for float64). Subtracting the row's mean of S_dot
before W is formed changes nothing in exact arithmetic and keeps the digits where S_dot has a common
offset. Kept for backward: q, k, v, o, and the log of each row's sum (B, H, N), from which P is made
again; in the Triton kernels to the base 2. What does not move costs no matmul.

4 B H N M D operations, 12 with all tangents, 14 for gradients. A fused kernel reads q, k, v, writes
o and never stores S; the formulas below store blocks of it that fit a cache.
"""

from __future__ import annotations

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
    q: Tensors, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensors:
    """Compute `joint_attention` in plain PyTorch; the definition of correct."""
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    valid = _attention.valid_keys(keys, _limits(lengths, keys))
    all_q, all_k, all_v = (torch.cat(s, dim=1) for s in (queries, keys, values))
    all_k, all_v = (_attention.without_padding(x, valid) for x in (all_k, all_v))
    scale = all_q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(all_q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", all_q * scale, all_k).to(work)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], torch.finfo(work).min)
    probability = scores.softmax(-1).to(all_v.dtype)
    out = torch.einsum("bhnm,bmhd->bnhd", probability, all_v).to(all_q.dtype)
    if isinstance(q, Tensor):
        return out
    return out.split([query.shape[1] for query in queries], dim=1)


def _jvp(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dot: list[Tensor | None],
    k_dot: list[Tensor | None],
    v_dot: list[Tensor | None],
    lengths: list[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    valid, heads = _attention.valid_keys(k, lengths), _attention.Heads(q[0])
    query, values, bias = heads.gather(q), heads.gather(v, valid), heads.additive(valid)
    keys = heads.without_mean(heads.gather(k, valid)).transpose(1, 2)
    query_dot = heads.gather(_attention.tangents(q, q_dot))
    keys_dot = heads.gather(_attention.tangents(k, k_dot), valid)
    values_dot = heads.gather(_attention.tangents(v, v_dot), valid)
    if keys_dot is not None:
        keys_dot = heads.without_mean(keys_dot).transpose(1, 2)
    moves = query_dot is not None or keys_dot is not None
    values_of_w = heads.without_mean(values) if moves else values
    o = torch.empty_like(query)
    o_dot = torch.empty_like(query) if moves else torch.zeros_like(query)
    lse = query.new_empty(query.shape[:2], dtype=work_dtype(query))
    shape = query.shape[1], keys.shape[2]
    for head, row, (p, *rest) in heads.blocks(*shape, 1 + moves, query.device):
        w = rest[0] if moves else None
        torch.bmm(query[head, row], keys[head], out=p)
        if w is not None and query_dot is not None:
            torch.bmm(query_dot[head, row], keys[head], out=w)
            if keys_dot is not None:
                w.baddbmm_(query[head, row], keys_dot[head])
        elif w is not None and keys_dot is not None:
            torch.bmm(query[head, row], keys_dot[head], out=w)
        lse[head, row] = _attention.softmax(p, w, None if bias is None else bias[head], scale)
        torch.bmm(p, values[head], out=o[head, row])
        if w is not None:
            torch.bmm(w, values_of_w[head], out=o_dot[head, row])
        if values_dot is not None:
            o_dot[head, row].baddbmm_(p, values_dot[head])
    lse = lse.view(heads.batch, heads.heads, lse.shape[1])
    return heads.scatter(o, q), heads.scatter(o_dot, q), lse


def _fwd(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[list[Tensor], Tensor]:
    fixed: list[Tensor | None] = [None] * len(k)
    o, _, lse = _jvp(q, k, v, [None] * len(q), fixed, fixed, lengths, scale)
    return o, lse


def _bwd(
    o_bar: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    o: list[Tensor],
    lse: Tensor,
    lengths: list[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    valid, heads = _attention.valid_keys(k, lengths), _attention.Heads(q[0])
    query, values, out_bar = heads.gather(q), heads.gather(v, valid), heads.gather(o_bar)
    keys, bias = heads.without_mean(heads.gather(k, valid)), heads.additive(valid)
    query_bar = torch.empty_like(query)
    queries, tokens = query.shape[1], keys.shape[1]
    whole = queries * tokens <= heads.block  # else rounding would add up over blocks
    keys_bar, values_bar = (
        x.new_zeros(x.shape, dtype=x.dtype if whole else lse.dtype) for x in (keys, values)
    )
    sums = lse.reshape(query.shape[:2])
    for head, row, (p, s_bar) in heads.blocks(queries, tokens, 2, query.device):
        torch.bmm(query[head, row], keys[head].transpose(1, 2), out=p)
        torch.bmm(out_bar[head, row], values[head].transpose(1, 2), out=s_bar)
        of_rows = sums[head, row].contiguous()
        _attention.softmax_bar(p, s_bar, None if bias is None else bias[head], of_rows, scale)
        torch.bmm(s_bar, keys[head], out=query_bar[head, row])
        for bar, left, right in ((keys_bar, s_bar, query), (values_bar, p, out_bar)):
            if whole:
                torch.bmm(left.transpose(1, 2), right[head, row], out=bar[head])
            else:
                bar[head] += torch.bmm(left.transpose(1, 2), right[head, row])
    k_bar, v_bar = heads.scatter(keys_bar, k, valid), heads.scatter(values_bar, v, valid)
    return heads.scatter(query_bar, q), k_bar, v_bar


def _fake(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[list[Tensor], Tensor]:
    rows = (q[0].shape[0], q[0].shape[2], sum(x.shape[1] for x in q))
    return [x.new_empty(x.shape) for x in q], q[0].new_empty(rows, dtype=work_dtype(q[0]))


def _plain(*args: Any) -> Any:
    (q, *rest), _ = _op.cast(args, None)
    on_cpu = q[0].is_cpu and not _backends.ON_CPU
    return cpu.flash(q, *rest) if on_cpu and cpu.route(q[0]) == "flash" else NotImplemented


def _reference(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[list[Tensor]]:
    """Call `joint_attention_ref` with the op's arguments."""
    return (list(joint_attention_ref(tuple(q), k, v, scale, lengths)),)


_op = Op(
    "joint_attention",
    _fwd,
    _jvp,
    _bwd,
    reference=_reference,
    fake=_fake,
    plain=_plain,
    autocasts="q, k, v of one dtype",
    jvp_bwd=of_reference(_reference, _jvp, "o"),
)


def joint_attention(
    q: Tensors, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensors:
    """Attend from every query to the keys of all streams, differentiable in both modes.

    Args:
        q: `(B, N, H, D)`, or a tuple of such streams, each with its own N. There may be fewer
            streams of queries than of keys, where the rest of the answer is not wanted. On a GPU
            D goes up to 256 and is best a multiple of 8.
        k: `(B, M, H, D)`, or a tuple of such streams, each with its own M.
        v: As k.
        scale: Factor of the scores; D ** -0.5 by default.
        lengths: How many leading keys count, `(B,)` integers on the device of q: one tensor where
            k is one tensor, else a tuple with a tensor or None (all count) for each stream. What
            lies beyond may be anything, NaN included, and gets zero gradients. A sample without
            any key gets zeros.

    Returns:
        The answers, of q's shape and dtype: a tensor, or a tuple of streams.

    Raises:
        ValueError: Streams do not fit together, or a head is too wide, or a stream too long, for a
            GPU's kernels.
    """
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    check_tensors("joint_attention", q=queries, k=keys, v=values)
    limits = _limits(lengths, keys)
    _check(queries, keys, values, limits)
    if use_reference():
        return joint_attention_ref(q, k, v, scale, lengths)
    scale = queries[0].shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # kernels look for a row's largest score by its largest q k^T
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        queries = tuple(sign * x for x in queries)
    out = _op(list(queries), list(keys), list(values), limits, scale)
    return out[0] if isinstance(q, Tensor) else tuple(out)


def _check(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], lengths: list[Tensor | None]
) -> None:
    head = (q[0].shape[0], *q[0].shape[2:]) if q and q[0].ndim == 4 else ()
    fits = len(k) == len(v) == len(lengths)
    fits = fits and all(a.shape == b.shape for a, b in zip(k, v, strict=True))
    fits = fits and all(t.ndim == 4 and (t.shape[0], *t.shape[2:]) == head for t in (*q, *k))
    if not (fits and head[-1] > 0 and sum(x.shape[1] for x in k) > 0):
        needs = (
            "q, k, v (B, tokens, H, D) with as many streams (and lengths) of v as of k, not empty"
        )
        streams = zip("qkv", (q, k, v), strict=True)
        named = {f"{name}[{i}]": x for name, xs in streams for i, x in enumerate(xs)}
        check(False, "joint_attention", needs, **named)
    check_tensors("joint_attention", {f"lengths[{i}]": n for i, n in enumerate(lengths)})
    for length in (n for n in lengths if n is not None):
        if not (length.shape == head[:1] and length.dtype in _INTEGERS):
            needs = f"lengths ({head[0]},) of integers, one for each sample"
            check(False, "joint_attention", needs, lengths=length)
        if length.device != q[0].device:  # to be copied at every call, which is waited for
            needs = f"lengths on {q[0].device} as q, not on {length.device}"
            check(False, "joint_attention", needs, lengths=length)
