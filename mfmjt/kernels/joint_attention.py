"""Softmax attention over the concatenation of several token streams.

    value      S = scale q k^T,  P = softmax(S),  o = P v
    tangent    S_dot = scale (q_dot k^T + q k_dot^T),  W = P (S_dot - rowsum(P S_dot))
               o_dot = W v + P v_dot
    cotangent  v_bar = P^T o_bar,  S_bar = P (o_bar v^T - rowsum(o_bar o))
               q_bar = scale S_bar k,  k_bar = scale S_bar^T q

q (B, N, H, D), k and v (B, M, H, D), each a tensor or a tuple of streams along the tokens. Stored
in the dtype of q, computed in float32 (float64 for float64). Taking the row's mean off S_dot before
W is formed changes nothing in exact arithmetic and keeps the digits where S_dot has a common
offset. Kept for backward: q, k, v, o, and the log of each row's sum (B, H, N), from which P is made
again; in the Triton kernels to the base 2, whose power GPUs compute.
A GPU takes one launch for value and tangent over all streams of queries, whose programs walk along
the streams of keys where they lie; what does not move costs no matrix product. With p = 2^(S - top)
and w = p (S_dot - c) it sums l = sum p, r = sum w, o~ = p v and T~ = w v + p v_dot, and in the end
o = o~ / l, o_dot = (T~ - r o) / l. The centre c is the mean of S_dot so far, and l and r are sums
of p and w as rounded for the products: without both, bfloat16 loses ten times the digits. Gradients
take two launches and no atomics. 4 B H N M D operations, 12 with all tangents, 14 for gradients.
float32 goes through three TF32 products, float64 through the formulas.
On a CPU that multiplies pairs of bfloat16 (AVX-512 BF16), bfloat16 goes through one C++ pass over
six rows of queries at a time, products included: S and S_dot stay float32 in the first-level cache,
and only P, W and S_bar are rounded. Elsewhere the matrix products are PyTorch's, by blocks of heads
and of query rows, so that no (N, M) matrix grows with N; what lies between them is one pass over a
block (`_softmax`, in C++ where built), and where products of bfloat16 are quicker than those of
float32, S, P, S_dot and W are rounded to it, as PyTorch's own are. Value and gradient of float32
are left to PyTorch's flash kernels: a value without a tangent calls them with their own backward,
since copies of results, which a library op owes, made ours 3 to 9 % slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mfmjt.kernels import _backends, _native, _op

if _backends.AVAILABLE:
    from mfmjt.kernels.triton import joint_attention as _kernels
    from mfmjt.kernels.triton import joint_attention_bwd as _kernels_bwd

__all__ = ["joint_attention", "joint_attention_ref"]

Streams = Tensor | Sequence[Tensor]
Lengths = Tensor | Sequence[Tensor | None] | None

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_BLOCK = 2**21  # bytes of S in one block of heads and query rows: those of a cache

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bar = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _tuple(streams: Streams) -> tuple[Tensor, ...]:
    return tuple(streams) if isinstance(streams, (list, tuple)) else (streams,)  # type: ignore[return-value]


def _valid_keys(keys: Sequence[Tensor], lengths: Lengths) -> Tensor | None:
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


def _join(streams: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
    """One tensor of all tokens, padding zero, rows of a head dense.

    PyTorch's flash attention for CPUs takes them for dense, whatever the last stride says.
    """
    joined = streams[0] if len(streams) == 1 else torch.cat(tuple(streams), dim=1)
    joined = joined if joined.stride(-1) == 1 else joined.contiguous()
    return _without_padding(joined, valid)


def _flash_alone(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, ...]:
    """PyTorch's flash attention for CPUs, and its own gradient."""
    valid = _valid_keys(k, lengths)
    joined = (_join(q), _join(k, valid), _join(v, valid))
    o = _flash(
        *(x.transpose(1, 2) for x in joined),
        attn_mask=_bias(valid, _op.work_dtype(q[0])),
        scale=scale,
    )[0]
    return o.transpose(1, 2).split([x.shape[1] for x in q], dim=1)


def _is_left_to_flash(x: Tensor) -> bool:
    """A value alone, of a dtype that a CPU multiplies no quicker than float32.

    Ours would be the same kernels; results in memory of their own cost a tenth more.
    """
    return x.device.type == "cpu" and not _backends.ON_CPU and not _bfloat16_products(x)


def _part(x: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """The streams of a tensor of all tokens, each in memory of its own."""
    if len(streams) == 1:
        return [x.contiguous()]
    parts = x.split([s.shape[1] for s in streams], dim=1)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


class _Heads:
    """(B, tokens, H, D) tensors as the (B H, tokens, D) batches that bmm wants, and back.

    Where a CPU multiplies bfloat16 quicker than float32, products are in bfloat16; what lies
    between them is in float32 all the same.
    """

    def __init__(self, like: Tensor) -> None:
        self.batch, _, self.heads, self.width = like.shape
        self.dtype = torch.bfloat16 if _bfloat16_products(like) else _op.work_dtype(like)
        self.block = max(1, _BLOCK // self.dtype.itemsize)

    def take(
        self, streams: Sequence[Tensor], valid: Tensor | None = None, dots: Any = None
    ) -> Tensor:
        """All tokens of the streams, or of their tangents; what is padding, zero."""
        tokens = sum(x.shape[1] for x in streams)
        shape = (self.batch, self.heads, tokens, self.width)
        batches = torch.empty(shape, dtype=self.dtype, device=streams[0].device)
        parts = batches.split([x.shape[1] for x in streams], dim=2)
        for to, x in zip(parts, streams if dots is None else dots, strict=True):
            to.zero_() if x is None else to.copy_(x.transpose(1, 2))
        if valid is not None:
            batches.masked_fill_(~valid[:, None, :, None], 0)
        return batches.flatten(0, 1)

    def give(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, (self.batch, self.heads)).transpose(1, 2).to(like.dtype)

    def rows(self, valid: Tensor | None) -> Tensor | None:
        bias = _bias(valid, self.dtype)
        return None if bias is None else bias.expand(-1, self.heads, 1, -1).flatten(0, 2)

    def centred(self, x: Tensor) -> Tensor:
        """Keys, or values of W, without a large common part.

        It adds one number to a row of S or of S_dot, which the softmax takes off again, and nothing
        to W v, as rows of W have sum zero; but the rest would lose its digits to it in bfloat16.
        A small one is left, lest taking it off cost a rounding.
        """
        if self.dtype != torch.bfloat16:
            return x
        ones = x.new_ones(1, 1, x.shape[1]).expand(x.shape[0], 1, -1)  # products sum quicker
        total = torch.bmm(ones, x)
        large = 2 * total.abs() > torch.bmm(ones, x.abs())
        return x - total.mul_(large).div_(x.shape[1])

    def blocks(
        self, queries: int, keys: int, matrices: int, device: torch.device
    ) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Heads and rows to take at a time, and room for matrices (heads, rows, M) of theirs."""
        total = self.batch * self.heads
        rows = max(1, min(queries, self.block // keys))
        heads = max(1, min(total, self.block // (rows * keys)))
        room = torch.empty((matrices, heads * rows * keys), dtype=self.dtype, device=device)
        for head in range(0, total, heads):
            for row in range(0, queries, rows):
                shape = (min(heads, total - head), min(rows, queries - row), keys)
                parts = [x[: math.prod(shape)].view(shape) for x in room]
                yield slice(head, head + heads), slice(row, row + rows), parts


def _bfloat16_products(like: Tensor) -> bool:
    return (
        like.dtype == torch.bfloat16
        and like.device.type == "cpu"
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _softmax(s: Tensor, s_dot: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Turn scores q k^T (G, R, M) into P and, where given, their tangents into W, in place.

    Returns:
        The log of each row's sum (G, R).
    """
    p = s.to(_op.work_dtype(s)).mul_(scale)
    if bias is not None:
        p.add_(bias[:, None])
    top = p.amax(-1, keepdim=True)
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    p.div_(total)
    if s_dot is not None:
        moved = s_dot.to(p.dtype).mul_(scale)
        centre = (p * moved).sum(-1, keepdim=True)
        s_dot.copy_(moved.sub_(centre).mul_(p))
    s.copy_(p)
    return total.log_().add_(top)[..., 0]


def _softmax_bar(
    s: Tensor, p_bar: Tensor, bias: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """Turn scores q k^T into P, and the cotangent of P into that of the scores, in place."""
    p = s.to(_op.work_dtype(s)).mul_(scale)
    if bias is not None:
        p.add_(bias[:, None])
    p.sub_(lse[..., None]).exp_()
    bar = p_bar.to(p.dtype)
    centre = (p * bar).sum(-1, keepdim=True)
    p_bar.copy_(bar.sub_(centre).mul_(p).mul_(scale))
    return s.copy_(p)


_softmax = _native.kernel("joint_attention_softmax", _softmax) or _softmax
_softmax_bar = _native.kernel("joint_attention_softmax_bar", _softmax_bar) or _softmax_bar


def _jvp(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dots: list[Tensor | None],
    k_dots: list[Tensor | None],
    v_dots: list[Tensor | None],
    lengths: list[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    valid, heads = _valid_keys(k, lengths), _Heads(q[0])
    query, values, bias = heads.take(q), heads.take(v, valid), heads.rows(valid)
    keys = heads.centred(heads.take(k, valid))
    query_dot, keys_dot, values_dot = (
        None if all(dot is None for dot in dots) else heads.take(x, padding, dots)
        for x, padding, dots in ((q, None, q_dots), (k, valid, k_dots), (v, valid, v_dots))
    )
    moves = query_dot is not None or keys_dot is not None
    centred_values = heads.centred(values) if moves else values
    keys = keys.transpose(1, 2)
    if keys_dot is not None:
        keys_dot = heads.centred(keys_dot).transpose(1, 2)
    o = torch.empty_like(query)
    o_dot = torch.empty_like(query) if moves else torch.zeros_like(query)
    lse = query.new_empty(query.shape[:2], dtype=_op.work_dtype(query))
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
        lse[head, row] = _softmax(p, w, None if bias is None else bias[head], scale)
        torch.bmm(p, values[head], out=o[head, row])
        if w is not None:
            torch.bmm(w, centred_values[head], out=o_dot[head, row])
        if values_dot is not None:
            o_dot[head, row].baddbmm_(p, values_dot[head])
    lse = lse.view(heads.batch, heads.heads, lse.shape[1])
    return _part(heads.give(o, q[0]), q), _part(heads.give(o_dot, q[0]), q), lse


def _fwd(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[list[Tensor], Tensor]:
    no_q: list[Tensor | None] = [None] * len(q)
    no_k: list[Tensor | None] = [None] * len(k)
    o, _, lse = _jvp(q, k, v, no_q, no_k, no_k, lengths, scale)
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
    valid, heads = _valid_keys(k, lengths), _Heads(q[0])
    query, values, out_bar = heads.take(q), heads.take(v, valid), heads.take(o_bar)
    keys, bias = heads.centred(heads.take(k, valid)), heads.rows(valid)
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
        known = sums[head, row].contiguous()
        _softmax_bar(p, s_bar, None if bias is None else bias[head], known, scale)
        torch.bmm(s_bar, keys[head], out=query_bar[head, row])
        for bar, left, right in ((keys_bar, s_bar, query), (values_bar, p, out_bar)):
            if whole:
                torch.bmm(left.transpose(1, 2), right[head, row], out=bar[head])
            else:
                bar[head] += torch.bmm(left.transpose(1, 2), right[head, row])
    q_bar, k_bar, v_bar = (heads.give(bar, q[0]) for bar in (query_bar, keys_bar, values_bar))
    k_bar, v_bar = _without_padding(k_bar, valid), _without_padding(v_bar, valid)
    return _part(q_bar, q), _part(k_bar, k), _part(v_bar, v)


# In C++ by rows, where the CPU multiplies pairs of bfloat16; all streams in one tensor each.
_rows = _native.kernel("joint_attention_rows", _jvp)
_rows_bar = _native.kernel("joint_attention_rows_bar", _bwd)


def _row_bias(valid: Tensor | None) -> Tensor | None:
    bias = _bias(valid, torch.float32)
    return None if bias is None else bias[:, 0, 0]


def _join_dots(
    streams: Sequence[Tensor], dots: Sequence[Tensor | None], valid: Tensor | None = None
) -> Tensor | None:
    if all(dot is None for dot in dots):
        return None
    pairs = zip(streams, dots, strict=True)
    return _join([torch.zeros_like(x) if dot is None else dot for x, dot in pairs], valid)


def _jvp_cpu(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_dots: list[Tensor | None],
    k_dots: list[Tensor | None],
    v_dots: list[Tensor | None],
    lengths: list[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    if _rows is None or not _native.takes("joint_attention_rows", q[0]):
        return _jvp(q, k, v, q_dots, k_dots, v_dots, lengths, scale)
    valid = _valid_keys(k, lengths)
    dots = _join_dots(q, q_dots), _join_dots(k, k_dots, valid), _join_dots(v, v_dots, valid)
    joined = _join(q), _join(k, valid), _join(v, valid)
    o, o_dot, lse = _rows(*joined, *dots, _row_bias(valid), scale)
    if all(dot is None for dot in dots):
        o_dot = torch.zeros_like(o)
    return _part(o, q), _part(o_dot, q), lse


def _fwd_cpu(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], lengths: list[Tensor | None], scale: float
) -> tuple[list[Tensor], Tensor]:
    if _rows is not None and _native.takes("joint_attention_rows", q[0]):
        valid = _valid_keys(k, lengths)
        joined = _join(q), _join(k, valid), _join(v, valid)
        o, _, lse = _rows(*joined, None, None, None, _row_bias(valid), scale)
        return _part(o, q), lse
    if _bfloat16_products(q[0]):
        return _fwd(q, k, v, lengths, scale)
    valid = _valid_keys(k, lengths)
    o, lse = _flash(
        *(t.transpose(1, 2) for t in (_join(q), _join(k, valid), _join(v, valid))),
        attn_mask=_bias(valid, _op.work_dtype(q[0])),
        scale=scale,
    )
    return _part(o.transpose(1, 2), q), lse.contiguous()


def _bwd_cpu(
    o_bar: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    o: list[Tensor],
    lse: Tensor,
    lengths: list[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    if _rows_bar is not None and _native.takes("joint_attention_rows_bar", o_bar[0], q[0]):
        valid = _valid_keys(k, lengths)
        given = _join(o_bar), _join(q), _join(k, valid), _join(v, valid)
        q_bar, k_bar, v_bar = _rows_bar(*given, lse, _row_bias(valid), scale)
        k_bar, v_bar = _without_padding(k_bar, valid), _without_padding(v_bar, valid)
        return _part(q_bar, q), _part(k_bar, k), _part(v_bar, v)
    if _bfloat16_products(q[0]):
        return _bwd(o_bar, q, k, v, o, lse, lengths, scale)
    valid = _valid_keys(k, lengths)
    joined = (_join(o_bar), _join(q), _join(k, valid), _join(v, valid), _join(o))
    bars = _flash_bar(
        *(t.transpose(1, 2) for t in joined),
        lse,
        0.0,
        False,
        attn_mask=_bias(valid, lse.dtype),
        scale=scale,
    )
    q_bar, k_bar, v_bar = (bar.transpose(1, 2) for bar in bars)
    k_bar, v_bar = _without_padding(k_bar, valid), _without_padding(v_bar, valid)
    return _part(q_bar, q), _part(k_bar, k), _part(v_bar, v)


def _or_formula(launcher: Any, formula: Any) -> Any:
    def triton(*args: Any) -> Any:
        results = launcher(*args)
        return formula(*args) if results is NotImplemented else results

    return triton


def _new_lse(q: Sequence[Tensor]) -> Tensor:
    batch, _, heads, _ = q[0].shape
    tokens = sum(stream.shape[1] for stream in q)
    return q[0].new_empty((batch, heads, tokens), dtype=_op.work_dtype(q[0]))


def _empty(streams: Sequence[Tensor]) -> list[Tensor]:
    return [s.new_empty(s.shape) for s in streams]


def _fwd_fake(q: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor]:
    return _empty(q), _new_lse(q)


def _jvp_fake(q: list[Tensor], *_: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return _empty(q), *_fwd_fake(q)


def _bwd_fake(
    _: list[Tensor], q: list[Tensor], k: list[Tensor], v: list[Tensor], *__: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return _empty(q), _empty(k), _empty(v)


_fwd_op = _op.define(
    "joint_attention_fwd(Tensor[] q, Tensor[] k, Tensor[] v, Tensor?[] lengths, float scale) "
    "-> (Tensor[], Tensor)",
    _fwd,
    _fwd_fake,
    cpu=_fwd_cpu,
    triton=_or_formula(_kernels.fwd, _fwd) if _backends.AVAILABLE else None,
)
_jvp_op = _op.define(
    "joint_attention_jvp(Tensor[] q, Tensor[] k, Tensor[] v, Tensor?[] q_dot, Tensor?[] k_dot, "
    "Tensor?[] v_dot, Tensor?[] lengths, float scale) -> (Tensor[], Tensor[], Tensor)",
    _jvp,
    _jvp_fake,
    cpu=_jvp_cpu,
    triton=_or_formula(_kernels.jvp, _jvp) if _backends.AVAILABLE else None,
)
_bwd_op = _op.define(
    "joint_attention_bwd(Tensor[] o_bar, Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] o, "
    "Tensor lse, Tensor?[] lengths, float scale) -> (Tensor[], Tensor[], Tensor[])",
    _bwd,
    _bwd_fake,
    cpu=_bwd_cpu,
    triton=_or_formula(_kernels_bwd.bwd, _bwd) if _backends.AVAILABLE else None,
)


def _saves(inputs: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    q, k, v, *_, lengths, _scale = inputs
    return (*q, *k, *v, *results[0], results[-1], *lengths)


def _constants(inputs: tuple[Any, ...]) -> tuple[int, int, float, list[Any]]:
    # PyTorch wants a None for each tensor of a list, and one for a list that holds no tensors only
    rest = [
        [None] * len(given) if all(isinstance(x, Tensor) for x in given) else None
        for given in inputs[3:-1]
    ]
    return len(inputs[0]), len(inputs[1]), inputs[-1], rest


def _backward(ctx: Any, o_bars: list[Tensor | None] | None) -> tuple[Any, ...]:
    queries, keys, scale, rest = ctx.constants
    saved = list(ctx.saved_tensors)
    q, k, v, o = ([saved.pop(0) for _ in range(count)] for count in (queries, keys, keys, queries))
    o_bars = [None] * queries if o_bars is None else o_bars
    o_bar = [torch.zeros_like(y) if bar is None else bar for y, bar in zip(o, o_bars, strict=True)]
    return (*_bwd_op(o_bar, q, k, v, o, saved[0], saved[1:], scale), *rest, None)


def _jvp_backward(
    ctx: Any, o_bars: list[Tensor | None], o_dot_bars: list[Tensor | None], _: None
) -> tuple[Any, ...]:
    pairs = zip(o_bars, o_dot_bars, strict=True)
    return _backward(ctx, [_op.refuse_gradient(*pair) for pair in pairs])


_op.backward_of(
    _fwd_op, lambda ctx, o_bars, _: _backward(ctx, o_bars), _saves, outputs=1, constants=_constants
)
_op.backward_of(_jvp_op, _jvp_backward, _saves, outputs=2, constants=_constants)


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
        ValueError: Streams do not fit together, or a head is too wide for a GPU's kernels.
    """
    queries, keys, values = _tuple(q), _tuple(k), _tuple(v)
    _op.check_tensors("joint_attention", q=queries, k=keys, v=values)
    limits: list[Tensor | None] = [None] * len(keys)
    if lengths is not None:
        limits = [lengths] if isinstance(lengths, Tensor) else list(lengths)
    head = (queries[0].shape[0], *queries[0].shape[2:]) if queries and queries[0].ndim == 4 else ()
    fits = len(keys) == len(values) == len(limits)
    fits = fits and all(a.shape == b.shape for a, b in zip(keys, values, strict=True))
    fits = fits and all(
        t.ndim == 4 and (t.shape[0], *t.shape[2:]) == head for t in (*queries, *keys)
    )
    if not (fits and head[-1] > 0 and sum(key.shape[1] for key in keys) > 0):
        needs = (
            "q, k, v (B, tokens, H, D) with as many streams (and lengths) of v as of k, not empty"
        )
        named = {
            f"{n}[{i}]": t
            for n, s in zip("qkv", (queries, keys, values), strict=True)
            for i, t in enumerate(s)
        }
        _op.check(False, "joint_attention", needs, **named)
    _op.check_tensors("joint_attention", {f"lengths[{i}]": n for i, n in enumerate(limits)})
    for limit in limits:
        if limit is None:
            continue
        if not (limit.shape == head[:1] and limit.dtype in _INTEGERS):
            needs = f"lengths ({head[0]},) of integers, one for each sample"
            _op.check(False, "joint_attention", needs, lengths=limit)
        if limit.device != queries[0].device:  # to be copied at every call, which is waited for
            needs = f"lengths on {queries[0].device} as q, not on {limit.device}"
            _op.check(False, "joint_attention", needs, lengths=limit)
    if _op.use_reference():
        return joint_attention_ref(q, k, v, scale, lengths)
    ends = len(queries), len(queries) + len(keys), len(queries) + 2 * len(keys)
    scale = queries[0].shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # kernels look for a row's largest score by its largest product
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        queries = tuple(sign * x for x in queries)

    def grouped(xs: Any) -> tuple[list[Any], list[Any], list[Any]]:
        xs = _op.autocast(*xs[: ends[2]])
        return list(xs[: ends[0]]), list(xs[ends[0] : ends[1]]), list(xs[ends[1] :])

    def run(values: Any, dots: Any) -> Any:
        (q, k, v), limits = grouped(values), list(values[ends[2] :])
        same = all(x.dtype == q[0].dtype for x in (*q, *k, *v))
        _op.check(same, "joint_attention", "q, k, v of one dtype", q=q[0], k=k[0], v=v[0])
        if dots is not None:
            outs, out_dots, _ = _jvp_op(q, k, v, *grouped(dots), limits, scale)
            return [y for pair in zip(outs, out_dots, strict=True) for y in pair]
        if _is_left_to_flash(q[0]):
            return _flash_alone(q, k, v, limits, scale)
        return _fwd_op(q, k, v, limits, scale)[0]

    counts = {f"lengths[{i}]": limit for i, limit in enumerate(limits)}
    out = _op.dual(run, (*queries, *keys, *values), "joint_attention", counts)
    return out[0] if isinstance(q, Tensor) else tuple(out)
