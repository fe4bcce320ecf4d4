"""Split planar qkv, RMS-normalise q and k over the head, rotate adjacent pairs.

    value      r = (mean(x^2) + eps)^-1/2,  n = x r,  y = R (w n)         for x = q, k; v as it is
    tangent    y_dot = R (w r (x_dot - n mean(n x_dot)))
    cotangent  g = R^T y_bar,  w_bar = sum(g n),  x_bar = r (w g - n mean(n w g))

qkv (B, N, 3, H, D), w (D); R turns the pair (2i, 2i + 1) of token n by the angle whose cosine and
sine are rope[n, i]. Stored in the dtype of qkv, computed in float32 (float64 for float64); a
rotation of a pair is a product of complex numbers. Kept for backward: qkv, the weights, rope, and
r of each head. The kernels move 6 B N H D elements, 12 with tangents, 8 for the gradient.

A Triton program takes whole heads (b, n, h) of q, k and v together, so that the angles are read
once. A lane holds both elements of a pair: cosines and sines lie in rope as even and odd elements
lie in a head, and one split serves both, without an exchange between lanes. Gradients of the
weights are summed in two stages, each in an order that the shapes alone decide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _op, _tuning
from mfmjt.kernels._triton import cdiv, jit, tl, wide

__all__ = ["qk_norm_rope", "qk_norm_rope_ref"]


def _rotate_ref(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # (N, 1, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def qk_norm_rope_ref(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None = None, eps: float = 2**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch `qk_norm_rope`; the definition of correct."""
    work = torch.promote_types(qkv.dtype, torch.float32)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(work)
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(work)
        return (x if rope is None else _rotate_ref(x, rope.to(work))).to(qkv.dtype)

    q, k, v = qkv.unbind(2)
    return one(q, q_weight), one(k, k_weight), v


def _turns(rope: Tensor | None, work: torch.dtype) -> Tensor | None:
    """The rotations as complex numbers (N, 1, D/2)."""
    return None if rope is None else torch.view_as_complex(rope.to(work).contiguous())[:, None]


def _rotate_(x: Tensor, turns: Tensor | None) -> Tensor:
    """Rotate (B, N, H, D) in place."""
    if turns is not None:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
    return x


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """X * factor, contiguous whatever x is."""
    return torch.mul(x, factor, out=x.new_empty(x.shape))


def _value(x: Tensor, weight: Tensor, turns: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _rotate_(_times(x, rstd).mul_(weight), turns), rstd


def _tangent(
    x: Tensor, x_dot: Tensor, weight: Tensor, turns: Tensor | None, rstd: Tensor
) -> Tensor:
    share = (x * x_dot).mean(-1, keepdim=True).mul_(rstd.square())
    y_dot = torch.addcmul(x_dot, x, share, value=-1, out=x.new_empty(x.shape))
    return _rotate_(y_dot.mul_(rstd).mul_(weight), turns)


def _cotangent_(
    out: Tensor, y_bar: Tensor, x: Tensor, weight: Tensor, turns: Tensor | None, rstd: Tensor
) -> Tensor:
    """Write the cotangent of x to out; returns that of the weight."""
    g = y_bar.clone(memory_format=torch.contiguous_format)
    # Not conj(): its lazy conjugate is ignored where torch.compile calls the op (torch 2.13).
    g = _rotate_(g, None if turns is None else turns.conj_physical())
    n = x * rstd
    product = g * n
    weight_bar = product.flatten(0, -2).sum(0)
    share = (product @ weight).div_(-x.shape[-1]).unsqueeze(-1)
    out.copy_(g.mul_(weight).addcmul_(n, share).mul_(rstd))
    return weight_bar


def _fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, dtype = _op.work_dtype(qkv), qkv.dtype
    turns = _turns(rope, work)
    q, q_rstd = _value(qkv[:, :, 0].to(work), q_weight.to(work), turns, eps)
    k, k_rstd = _value(qkv[:, :, 1].to(work), k_weight.to(work), turns, eps)
    v = qkv[:, :, 2].clone(memory_format=torch.contiguous_format)
    return q.to(dtype), k.to(dtype), v, q_rstd, k_rstd


def _jvp(
    qkv: Tensor,
    qkv_dot: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    work, dtype = _op.work_dtype(qkv), qkv.dtype
    turns = _turns(rope, work)
    results, statistics = [], []
    for i, weight in enumerate((q_weight.to(work), k_weight.to(work))):
        x, x_dot = qkv[:, :, i].to(work), qkv_dot[:, :, i].to(work)
        y, rstd = _value(x, weight, turns, eps)
        results += [y.to(dtype), _tangent(x, x_dot, weight, turns, rstd).to(dtype)]
        statistics.append(rstd)
    v, v_dot = (t[:, :, 2].clone(memory_format=torch.contiguous_format) for t in (qkv, qkv_dot))
    return *results, v, v_dot, *statistics


def _bwd(
    q_bar: Tensor | None,
    k_bar: Tensor | None,
    v_bar: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    work = _op.work_dtype(qkv)
    turns = _turns(rope, work)
    qkv_bar = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    weight_bars = []
    both = (q_bar, q_weight, q_rstd), (k_bar, k_weight, k_rstd)
    for i, (y_bar, weight, rstd) in enumerate(both):
        if y_bar is None:
            qkv_bar[:, :, i].zero_()
            weight_bars.append(torch.zeros_like(weight))
            continue
        x, w = qkv[:, :, i].to(work), weight.to(work)
        weight_bar = _cotangent_(qkv_bar[:, :, i], y_bar.to(work), x, w, turns, rstd)
        weight_bars.append(weight_bar.to(weight.dtype))
    if v_bar is None:
        qkv_bar[:, :, 2].zero_()
    else:
        qkv_bar[:, :, 2].copy_(v_bar)
    return qkv_bar, weight_bars[0], weight_bars[1]


@jit
def _heads(first, n_rows, n_tokens, n_heads, BLOCK_ROWS: tl.constexpr):
    """Rows `first` and on, (BLOCK_ROWS, 1): number, whether there is one, sample, token, head."""
    row = first + tl.arange(0, BLOCK_ROWS)[:, None]
    token = row // n_heads
    sample = token // n_tokens
    head = (row - token * n_heads).to(tl.int64)
    token = (token - sample * n_tokens).to(tl.int64)
    return row.to(tl.int64), row < n_rows, sample.to(tl.int64), token, head


@jit
def _pairs(x):
    """Even and odd elements of (rows, D), each (rows, D/2)."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def _turned(x, cos, sin):
    """The pairs of x (rows, D), rotated; x itself where there are no angles."""
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
    """Value and tangent of one of q and k."""
    x = wide(tl.load(x, inside, 0.0))
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    n = x * r
    tl.store(rstd, r, exists)
    tl.store(y, _turned(n * weight, cos, sin), inside)
    if x_dot is not None:
        dot = wide(tl.load(x_dot, inside, 0.0))
        dot = r * (dot - n * (tl.sum(n * dot, 1, keep_dims=True) / width))
        tl.store(y_dot, _turned(dot * weight, cos, sin), inside)


@jit
def _qk_norm_rope_fwd_kernel(
    qkv,
    qkv_dot,  # None where no tangent is wanted, and so are the results' tangents
    q_weight,
    k_weight,
    rope,  # None for no rotation
    q,
    k,
    v,
    q_dot,
    k_dot,
    v_dot,
    q_rstd,
    k_rstd,
    n_rows,
    n_tokens,
    n_heads,
    width,
    sample_stride,
    token_stride,
    part_stride,
    head_stride,
    sample_dot_stride,
    token_dot_stride,
    part_dot_stride,
    head_dot_stride,
    EPS: tl.constexpr,  # a number passed at run time would be rounded to float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, exists, sample, token, head = _heads(
        tl.program_id(0) * BLOCK_ROWS, n_rows, n_tokens, n_heads, BLOCK_ROWS
    )
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = exists & (col < width)
    x = qkv + sample * sample_stride + token * token_stride + head * head_stride + col
    x_k, x_v, out = x + part_stride, x + 2 * part_stride, row * width + col
    dot, dot_k, y_q_dot, y_k_dot = None, None, None, None
    if qkv_dot is not None:
        dot = qkv_dot + sample * sample_dot_stride + token * token_dot_stride
        dot += head * head_dot_stride + col
        dot_k, y_q_dot, y_k_dot = dot + part_dot_stride, q_dot + out, k_dot + out
        tl.store(v_dot + out, tl.load(dot + 2 * part_dot_stride, inside), inside)
    tl.store(v + out, tl.load(x_v, inside), inside)
    w_q = wide(tl.load(q_weight + col, col < width, 0.0))
    w_k = wide(tl.load(k_weight + col, col < width, 0.0))
    cos, sin = None, None
    if rope is not None:
        cos, sin = _pairs(tl.load(rope + token * width + col, inside, 0.0).to(w_q.dtype))
    _normalise(x, dot, w_q, cos, sin, q + out, y_q_dot, q_rstd + row, exists, inside, width, EPS)
    _normalise(
        x_k, dot_k, w_k, cos, sin, k + out, y_k_dot, k_rstd + row, exists, inside, width, EPS
    )


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
    """Store the cotangent of one of q and k; returns `total` with these rows added."""
    if y_bar is None:
        tl.store(x_bar, tl.zeros_like(total), inside)
    else:
        g = wide(tl.load(y_bar, inside, 0.0))
        if cos is not None:
            g = _turned(g, cos, -sin)
        r = tl.load(rstd, exists, 0.0)
        n = wide(tl.load(x, inside, 0.0)) * r
        total += g * n
        g *= weight
        tl.store(x_bar, r * (g - n * (tl.sum(n * g, 1, keep_dims=True) / width)), inside)
    return total


@jit
def _qk_norm_rope_bwd_kernel(
    q_bar,  # None where no gradient arrived
    k_bar,
    v_bar,
    qkv,
    q_weight,
    k_weight,
    rope,
    q_rstd,
    k_rstd,
    qkv_bar,
    partial,  # (programs, 2, D) sums for the weights of q and k
    n_rows,
    n_tokens,
    n_heads,
    width,
    sample_stride,
    token_stride,
    part_stride,
    head_stride,
    q_bar_sample_stride,
    q_bar_token_stride,
    q_bar_head_stride,
    k_bar_sample_stride,
    k_bar_token_stride,
    k_bar_head_stride,
    v_bar_sample_stride,
    v_bar_token_stride,
    v_bar_head_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    total_q = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), q_rstd.dtype.element_ty)
    total_k = total_q
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        row, exists, sample, token, head = _heads(
            block * BLOCK_ROWS, n_rows, n_tokens, n_heads, BLOCK_ROWS
        )
        inside = exists & (col < width)
        x = qkv + sample * sample_stride + token * token_stride + head * head_stride + col
        x_bar = qkv_bar + ((sample * n_tokens + token) * 3 * n_heads + head) * width + col
        k_x_bar = x_bar + n_heads * width
        # In the loop, because there are no registers to keep them in
        w_q = tl.load(q_weight + col, col < width, 0.0).to(total_q.dtype)
        w_k = tl.load(k_weight + col, col < width, 0.0).to(total_q.dtype)
        cos, sin = None, None
        if rope is not None:
            cos, sin = _pairs(tl.load(rope + token * width + col, inside, 0.0).to(w_q.dtype))
        y_q, y_k = None, None
        if q_bar is not None:
            y_q = q_bar + sample * q_bar_sample_stride + token * q_bar_token_stride
            y_q += head * q_bar_head_stride + col
        if k_bar is not None:
            y_k = k_bar + sample * k_bar_sample_stride + token * k_bar_token_stride
            y_k += head * k_bar_head_stride + col
        total_q = _cotangent(
            y_q, x, w_q, cos, sin, q_rstd + row, x_bar, total_q, exists, inside, width
        )
        total_k = _cotangent(
            y_k,
            x + part_stride,
            w_k,
            cos,
            sin,
            k_rstd + row,
            k_x_bar,
            total_k,
            exists,
            inside,
            width,
        )
        v_x_bar = k_x_bar + n_heads * width
        if v_bar is not None:
            y_v = v_bar + sample * v_bar_sample_stride + token * v_bar_token_stride
            tl.store(v_x_bar, tl.load(y_v + head * v_bar_head_stride + col, inside), inside)
        else:
            tl.store(v_x_bar, tl.zeros_like(total_q), inside)
    sums = partial + tl.program_id(0).to(tl.int64) * 2 * width + col
    tl.store(sums, tl.sum(total_q, 0, keep_dims=True), col < width)
    tl.store(sums + width, tl.sum(total_k, 0, keep_dims=True), col < width)


@jit
def _qk_norm_rope_sum_kernel(
    partial,  # (n, 2, D)
    q_weight_bar,
    k_weight_bar,
    n,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), partial.dtype.element_ty)
    for first in range(0, n, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        total += tl.load(partial + row * 2 * width + col, (row < n) & (col < 2 * width), 0.0)
    sums = tl.sum(total, 0, keep_dims=True)
    tl.store(q_weight_bar + col, sums, col < width)
    tl.store(k_weight_bar + col - width, sums, (col >= width) & (col < 2 * width))


def _dense(x: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _launch_fwd(
    qkv: Tensor,
    qkv_dot: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    eps: float,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Q, k and v, their tangents, and the statistics of q and k."""
    batch, tokens, _, heads, width = qkv.shape
    shape = (batch, tokens, heads, width)
    values = [qkv.new_empty(shape) for _ in range(3)]
    dots = [None if qkv_dot is None else qkv.new_empty(shape) for _ in range(3)]
    rstds = [qkv.new_empty((*shape[:3], 1), dtype=_op.work_dtype(qkv)) for _ in range(2)]
    qkv, qkv_dot = _dense(qkv), None if qkv_dot is None else _dense(qkv_dot)
    n_rows = batch * tokens * heads
    block_rows, block_width, num_warps = _tuning.heads(width, qkv.element_size())
    _qk_norm_rope_fwd_kernel[(cdiv(n_rows, block_rows),)](
        qkv,
        qkv_dot,
        q_weight.contiguous(),
        k_weight.contiguous(),
        None if rope is None else rope.contiguous(),
        *values,
        *dots,
        *rstds,
        n_rows,
        tokens,
        heads,
        width,
        *qkv.stride()[:4],
        *((0,) * 4 if qkv_dot is None else qkv_dot.stride()[:4]),
        EPS=eps,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )
    return values, dots, rstds


def _fwd_triton(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    values, _, rstds = _launch_fwd(qkv, None, q_weight, k_weight, rope, eps)
    return *values, *rstds


def _jvp_triton(
    qkv: Tensor,
    qkv_dot: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    (q, k, v), (q_dot, k_dot, v_dot), rstds = _launch_fwd(
        qkv, qkv_dot, q_weight, k_weight, rope, eps
    )
    return q, q_dot, k, k_dot, v, v_dot, *rstds


def _bwd_triton(
    q_bar: Tensor | None,
    k_bar: Tensor | None,
    v_bar: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    qkv_bar = qkv.new_empty(qkv.shape)
    n_rows = batch * tokens * heads
    block_rows, block_width, num_warps = _tuning.heads(width, qkv.element_size())
    programs = min(cdiv(n_rows, block_rows), _tuning.REDUCING_PROGRAMS)
    partial = q_rstd.new_empty((programs, 2, width))
    qkv = _dense(qkv)
    bars = [None if bar is None else _dense(bar) for bar in (q_bar, k_bar, v_bar)]
    _qk_norm_rope_bwd_kernel[(programs,)](
        *bars,
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        None if rope is None else rope.contiguous(),
        q_rstd,
        k_rstd,
        qkv_bar,
        partial,
        n_rows,
        tokens,
        heads,
        width,
        *qkv.stride()[:4],
        *(stride for bar in bars for stride in ((0,) * 3 if bar is None else bar.stride()[:3])),
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
        **_tuning.registers(num_warps),
    )
    weight_bars = [weight.new_empty(weight.shape) for weight in (q_weight, k_weight)]
    block_rows, block_cols, num_warps = _tuning.sum_of_rows(programs)
    _qk_norm_rope_sum_kernel[(cdiv(2 * width, block_cols),)](
        partial,
        *weight_bars,
        programs,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=num_warps,
    )
    return qkv_bar, weight_bars[0], weight_bars[1]


_fwd_op = _op.define(
    "qk_norm_rope_fwd(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? rope, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    triton=_fwd_triton,
)
_jvp_op = _op.define(
    "qk_norm_rope_jvp(Tensor qkv, Tensor qkv_dot, Tensor q_weight, Tensor k_weight, Tensor? rope, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _jvp,
    triton=_jvp_triton,
)
_bwd_op = _op.define(
    "qk_norm_rope_bwd(Tensor? q_bar, Tensor? k_bar, Tensor? v_bar, Tensor qkv, Tensor q_weight, "
    "Tensor k_weight, Tensor? rope, Tensor q_rstd, Tensor k_rstd) -> (Tensor, Tensor, Tensor)",
    _bwd,
    triton=_bwd_triton,
)


def _jvp_backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
    q_bar, k_bar, v_bar = (_op.refuse_gradient(*bars[i : i + 2]) for i in (0, 2, 4))
    qkv_bar, q_weight_bar, k_weight_bar = _bwd_op(q_bar, k_bar, v_bar, *ctx.saved_tensors)
    return qkv_bar, None, q_weight_bar, k_weight_bar, None, None


_op.backward_of(
    _fwd_op,
    lambda ctx, *bars: (*_bwd_op(*bars[:3], *ctx.saved_tensors), None, None),
    saves=lambda inputs, outputs: (*inputs[:4], *outputs[-2:]),
    outputs=3,
)
_op.backward_of(
    _jvp_op,
    _jvp_backward,
    saves=lambda inputs, outputs: (inputs[0], *inputs[2:5], *outputs[-2:]),
    outputs=6,
)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None = None, eps: float = 2**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """Split planar qkv, RMS-normalise q and k, rotate them; differentiable in both modes.

    Args:
        qkv: `(B, N, 3, H, D)`, any floating dtype, D even where rope is given.
        q_weight: `(D,)`; must not carry a tangent.
        k_weight: `(D,)`; must not carry a tangent.
        rope: `(N, D/2, 2)` cosines and sines, a constant; or None for no rotation.
        eps: Added to the mean square; the default is PyTorch's for float32.

    Returns:
        q, k and v, each `(B, N, H, D)` in the dtype of qkv.

    Raises:
        ValueError: The shapes do not fit.
        NotImplementedError: A weight or rope carries a tangent, or rope requires gradients.
    """
    if _op.use_reference():
        return qk_norm_rope_ref(qkv, q_weight, k_weight, rope, eps)
    _op.check_tensors("qk_norm_rope", {"rope": rope}, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    fits = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point()
    fits = fits and q_weight.shape == k_weight.shape == qkv.shape[4:]
    if rope is not None:
        fits = fits and rope.shape == (qkv.shape[1], qkv.shape[4] // 2, 2)
        fits = fits and qkv.shape[4] % 2 == 0
        if rope.requires_grad:
            raise NotImplementedError("mfmjt.kernels.qk_norm_rope keeps no gradient of its rope.")
    if not fits:
        needs = "qkv (B, N, 3, H, D), weights (D,) and rope (N, D/2, 2) or None"
        given = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "rope": rope}
        _op.check(False, "qk_norm_rope", needs, **given)

    def run(values: Any, dots: Any) -> Any:
        if dots is None:
            return _fwd_op(*values, eps)[:3]
        qkv, *others = values
        return _jvp_op(qkv, *dots, *others, eps)[:6]

    still = {"q_weight": q_weight, "k_weight": k_weight, "rope": rope}
    q, k, v = _op.dual(run, (qkv,), "qk_norm_rope", still)
    return q, k, v
