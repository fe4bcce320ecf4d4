"""Softmax attention over the concatenation of several token streams.

    value      S = scale q k^T,  P = softmax(S),  o = P v
    tangent    S_dot = scale (q_dot k^T + q k_dot^T),  W = P (S_dot - rowsum(P S_dot))
               o_dot = W v + P v_dot
    cotangent  v_bar = P^T o_bar,  S_bar = P (o_bar v^T - rowsum(o_bar o))
               q_bar = scale S_bar k,  k_bar = scale S_bar^T q

q (B, N, H, D), k and v (B, M, H, D), each a tensor or a tuple of streams along the tokens. Stored
in the dtype of q, computed in float32 (float64 for float64). Taking the row's mean off S_dot before
W is formed changes nothing in exact arithmetic and keeps the digits where S_dot has a common
offset. Kept for backward: q, k, v, o, and the log of each row's sum, from which P is made again.
The CPU takes PyTorch's flash kernels for value and gradient; the tangent goes by blocks of query
rows, so that no (N, M) matrix grows with N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mfmjt.kernels import _op

__all__ = ["joint_attention", "joint_attention_ref"]

Streams = Tensor | Sequence[Tensor]
Lengths = Tensor | Sequence[Tensor | None] | None

_BLOCK = 2**20  # elements of S in one block of query rows: 4 MiB of float32, the size of a cache

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bar = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _tuple(streams: Streams) -> tuple[Tensor, ...]:
    return (streams,) if isinstance(streams, Tensor) else tuple(streams)


def _valid_keys(keys: tuple[Tensor, ...], lengths: Lengths) -> Tensor | None:
    """True where a key counts, (B, M); None where every key does."""
    if lengths is None or isinstance(lengths, Tensor):
        given: tuple[Tensor | None, ...] = (lengths,)
    else:
        given = tuple(lengths)
    if all(length is None for length in given):
        return None
    rows = []
    for key, length in zip(keys, given, strict=True):
        position = torch.arange(key.shape[1], device=key.device)
        limit = key.shape[1] if length is None else length.to(key.device)[:, None]
        rows.append((position < limit).expand(key.shape[0], -1))
    return torch.cat(rows, dim=1)


def _without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros for what padding holds, be it NaN: 0 * NaN must not reach the result."""
    return x if valid is None else torch.where(valid[:, :, None, None], x, 0)


@overload
def joint_attention_ref(
    q: Tensor, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor: ...
@overload
def joint_attention_ref(
    q: Sequence[Tensor], k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> tuple[Tensor, ...]: ...
def joint_attention_ref(
    q: Streams, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor | tuple[Tensor, ...]:
    """Plain PyTorch `joint_attention`; the definition of correct."""
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    valid = _valid_keys(keys, lengths)
    all_q, all_k, all_v = (torch.cat(s, dim=1) for s in (queries, keys, values))
    all_k, all_v = _without_padding(all_k, valid), _without_padding(all_v, valid)
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


def _bias(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to S, (B, 1, 1, M). Finite, so that a row without any key stays finite."""
    if valid is None:
        return None
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return bias.masked_fill_(~valid, torch.finfo(dtype).min)[:, None, None]


class _Heads:
    """(B, tokens, H, D) tensors as the (B H, tokens, D) batches that bmm wants, and back."""

    def __init__(self, like: Tensor) -> None:
        self.batch, _, self.heads, self.width = like.shape
        self.dtype = _op.work_dtype(like)

    def take(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])

    def give(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.heads, *x.shape[1:]).transpose(1, 2)

    def rows(self, valid: Tensor | None) -> Tensor | None:
        bias = _bias(valid, self.dtype)
        return (
            None
            if bias is None
            else bias.expand(-1, self.heads, 1, -1).reshape(-1, 1, bias.shape[-1])
        )

    def blocks(self, queries: int, keys: int) -> list[slice]:
        step = max(1, _BLOCK // max(1, self.batch * self.heads * keys))
        return [slice(start, start + step) for start in range(0, queries, step)]


def _dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(q)
    o, o_dot = q.new_empty(q.shape), q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=heads.dtype)
    keys, values, bias = heads.take(k).transpose(1, 2), heads.take(v), heads.rows(valid)
    keys_dot = None if k_dot is None else heads.take(k_dot).transpose(1, 2)
    values_dot = None if v_dot is None else heads.take(v_dot)
    for block in heads.blocks(q.shape[1], k.shape[1]):
        query = heads.take(q[:, block]) * scale
        p = torch.bmm(query, keys)
        if bias is not None:
            p.add_(bias)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        p.div_(total)
        lse[:, block] = heads.give(total.log_().add_(top)).squeeze(-1)
        o[:, block] = heads.give(torch.bmm(p, values))

        s_dot = None
        if q_dot is not None:
            s_dot = torch.bmm(heads.take(q_dot[:, block]) * scale, keys)
        if keys_dot is not None:
            s_dot = torch.bmm(query, keys_dot) if s_dot is None else s_dot.baddbmm_(query, keys_dot)
        out_dot = None
        if s_dot is not None:
            centre = (p * s_dot).sum(-1, keepdim=True)
            out_dot = torch.bmm(s_dot.sub_(centre).mul_(p), values)
        if values_dot is not None:
            out_dot = (
                torch.bmm(p, values_dot) if out_dot is None else out_dot.baddbmm_(p, values_dot)
            )
        o_dot[:, block] = 0 if out_dot is None else heads.give(out_dot)
    return o, o_dot, lse


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    o, _, lse = _dual(q, k, v, None, None, None, valid, scale)
    return o, lse


def _bwd(
    o_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(q)
    q_bar, k_bar, v_bar = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    keys, values, bias = heads.take(k), heads.take(v), heads.rows(valid)
    keys_bar, values_bar = torch.zeros_like(keys), torch.zeros_like(values)
    for block in heads.blocks(q.shape[1], k.shape[1]):
        query, out, out_bar = (heads.take(t[:, block]) for t in (q, o, o_bar))
        query = query * scale
        p = torch.bmm(query, keys.transpose(1, 2))
        if bias is not None:
            p.add_(bias)
        p.sub_(heads.take(lse[:, block, :, None])).exp_()
        values_bar.baddbmm_(p.transpose(1, 2), out_bar)
        centre = (out_bar * out).sum(-1, keepdim=True)
        s_bar = torch.bmm(out_bar, values.transpose(1, 2)).sub_(centre).mul_(p)
        q_bar[:, block] = heads.give(torch.bmm(s_bar, keys).mul_(scale))
        keys_bar.baddbmm_(s_bar.transpose(1, 2), query)
    k_bar.copy_(heads.give(keys_bar))
    v_bar.copy_(heads.give(values_bar))
    return q_bar, k_bar, v_bar


def _fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    o, lse = _flash(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=_bias(valid, q.dtype), scale=scale
    )
    return o.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _bwd_cpu(
    o_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    bars = _flash_bar(
        *(t.transpose(1, 2) for t in (o_bar, q, k, v, o, lse)),
        0.0,
        False,
        attn_mask=_bias(valid, q.dtype),
        scale=scale,
    )
    return tuple(bar.transpose(1, 2).contiguous() for bar in bars)


def _fwd_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_op.work_dtype(q))


def _jvp_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), *_fwd_fake(q)


def _bwd_fake(_: Tensor, *qkv: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in qkv[:3])


_fwd_op = _op.define(
    "joint_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? valid, float scale) "
    "-> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    cpu=_fwd_cpu,
)
_jvp_op = _op.define(
    "joint_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, "
    "Tensor? v_dot, Tensor? valid, float scale) -> (Tensor, Tensor, Tensor)",
    _dual,
    _jvp_fake,
)
_bwd_op = _op.define(
    "joint_attention_bwd(Tensor o_bar, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? valid, float scale) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    cpu=_bwd_cpu,
)


def _fwd_backward(ctx: Any, o_bar: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return (*_bwd_op(o_bar, *ctx.saved_tensors, ctx.constants), None, None)


def _jvp_backward(
    ctx: Any, o_bar: Tensor | None, o_dot_bar: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    o_bar = _op.refuse_gradient(o_bar, o_dot_bar)
    return (*_bwd_op(o_bar, *ctx.saved_tensors, ctx.constants), *(None,) * 5)


_op.backward_of(
    _fwd_op,
    _fwd_backward,
    saves=lambda inputs, outputs: (*inputs[:3], *outputs, inputs[3]),
    outputs=1,
    constants=lambda inputs: inputs[4],
)
_op.backward_of(
    _jvp_op,
    _jvp_backward,
    saves=lambda inputs, outputs: (*inputs[:3], outputs[0], outputs[2], inputs[6]),
    outputs=2,
    constants=lambda inputs: inputs[7],
)


def _concatenate(streams: tuple[Tensor, ...], valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One tensor of all values and one of all tangents, None where no stream has one."""
    values, dots = zip(*(_op.split(s) for s in streams), strict=True)
    value = _without_padding(values[0] if len(values) == 1 else torch.cat(values, dim=1), valid)
    if all(dot is None for dot in dots):
        return value, None
    whole = [torch.zeros_like(x) if d is None else d for x, d in zip(values, dots, strict=True)]
    return value, _without_padding(whole[0] if len(whole) == 1 else torch.cat(whole, dim=1), valid)


@overload
def joint_attention(
    q: Tensor, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor: ...
@overload
def joint_attention(
    q: Sequence[Tensor], k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> tuple[Tensor, ...]: ...
def joint_attention(
    q: Streams, k: Streams, v: Streams, scale: float | None = None, lengths: Lengths = None
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every query to the keys of all streams, differentiable in both modes.

    Args:
        q: `(B, N, H, D)`, or a tuple of such streams, each with its own N. There may be fewer
            streams of queries than of keys, where the rest of the answer is not wanted.
        k: `(B, M, H, D)`, or a tuple of such streams, each with its own M.
        v: As k.
        scale: Factor of the scores; D ** -0.5 by default.
        lengths: How many leading keys count, `(B,)` integers: one tensor where k is one tensor,
            else a tuple with a tensor or None (all count) for each stream. What lies beyond may be
            anything, NaN included, and gets zero gradients. A sample without any key gets zeros.

    Returns:
        The answers, of q's shape and dtype: a tensor, or a tuple of streams.

    Raises:
        ValueError: Streams do not fit together.
    """
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    given = len(keys) if lengths is None else 1 if isinstance(lengths, Tensor) else len(lengths)
    head = (queries[0].shape[0], *queries[0].shape[2:])
    fits = len(keys) == len(values) == given
    fits = fits and all(a.shape == b.shape for a, b in zip(keys, values, strict=True))
    fits = fits and all(
        t.ndim == 4 and (t.shape[0], *t.shape[2:]) == head for t in (*queries, *keys)
    )
    if not (fits and sum(key.shape[1] for key in keys) > 0):
        needs = (
            "q, k, v (B, tokens, H, D) with as many streams (and lengths) of v as of k, not empty"
        )
        named = {
            f"{n}[{i}]": t
            for n, s in zip("qkv", (queries, keys, values), strict=True)
            for i, t in enumerate(s)
        }
        _op.check(False, "joint_attention", needs, **named)
    if _op.use_reference():
        return joint_attention_ref(q, k, v, scale, lengths)
    valid = _valid_keys(keys, lengths)
    all_q, q_dot = _concatenate(queries, None)
    all_k, k_dot = _concatenate(keys, valid)
    all_v, v_dot = _concatenate(values, valid)
    all_q, all_k, all_v = _op.autocast(all_q, all_k, all_v)
    scale = all_q.shape[-1] ** -0.5 if scale is None else scale
    if q_dot is None and k_dot is None and v_dot is None:
        out = _fwd_op(all_q, all_k, all_v, valid, scale)[0]
    else:
        dots = _op.autocast(q_dot, k_dot, v_dot)
        out = _op.join(*_jvp_op(all_q, all_k, all_v, *dots, valid, scale)[:2])
    if isinstance(q, Tensor):
        return out
    return (out,) if len(queries) == 1 else out.split([s.shape[1] for s in queries], dim=1)
