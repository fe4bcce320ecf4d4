"""Triton kernels of `qk_norm_rope`: value with tangent, and gradient.

A program takes whole heads (b, n, h) of q, k and v together, so that the angles are read once. A
lane holds both elements of a pair: cosines and sines lie in rope as even and odd elements lie in a
head, and one split serves both, without an exchange between lanes. Gradients of the weights are
summed in two stages, each in an order that the shapes alone decide.
"""

from __future__ import annotations

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import View, cdiv, jit, tl, tuning, wide

__all__ = ["bwd", "fwd", "jvp"]


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
def _at(x, sample, token, head):
    """Pointers to the first elements of heads of a `View`."""
    return x.pointer + sample * x.sample + token * x.token + head * x.head


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
    qkv,  # this and the next are `View`s, of no pointer where there is none
    qkv_dot,  # where no tangent is wanted, the results' tangents are None
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
    part,  # elements from q to k, and from k to v
    part_dot,
    EPS: tl.constexpr,  # a number passed at run time would be rounded to float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, exists, sample, token, head = _heads(
        tl.program_id(0) * BLOCK_ROWS, n_rows, n_tokens, n_heads, BLOCK_ROWS
    )
    col = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = exists & (col < width)
    x = _at(qkv, sample, token, head) + col
    x_k, x_v, out = x + part, x + 2 * part, row * width + col
    dot, dot_k, y_q_dot, y_k_dot = None, None, None, None
    if qkv_dot.pointer is not None:
        dot = _at(qkv_dot, sample, token, head) + col
        dot_k, y_q_dot, y_k_dot = dot + part_dot, q_dot + out, k_dot + out
        tl.store(v_dot + out, tl.load(dot + 2 * part_dot, inside), inside)
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
    q_bar,  # this and the next three are `View`s; of no pointer where no gradient arrived
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
    part,  # elements from q to k, and from k to v
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
        x = _at(qkv, sample, token, head) + col
        x_bar = qkv_bar + ((sample * n_tokens + token) * 3 * n_heads + head) * width + col
        k_x_bar = x_bar + n_heads * width
        # In the loop, because there are no registers to keep them in
        w_q = tl.load(q_weight + col, col < width, 0.0).to(total_q.dtype)
        w_k = tl.load(k_weight + col, col < width, 0.0).to(total_q.dtype)
        cos, sin = None, None
        if rope is not None:
            cos, sin = _pairs(tl.load(rope + token * width + col, inside, 0.0).to(w_q.dtype))
        y_q, y_k = None, None
        if q_bar.pointer is not None:
            y_q = _at(q_bar, sample, token, head) + col
        if k_bar.pointer is not None:
            y_k = _at(k_bar, sample, token, head) + col
        total_q = _cotangent(
            y_q, x, w_q, cos, sin, q_rstd + row, x_bar, total_q, exists, inside, width
        )
        total_k = _cotangent(
            y_k,
            x + part,
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
        if v_bar.pointer is not None:
            y_v = _at(v_bar, sample, token, head) + col
            tl.store(v_x_bar, tl.load(y_v, inside), inside)
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


def _view(x: Tensor | None) -> View:
    """Return (B, N, ..., H, D) as kernels take it: any strides but the last."""
    if x is None:
        return View(None)
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    return View(x, x.stride(0), x.stride(1), x.stride(-2))


def _part(qkv: View) -> int | None:
    """Return the elements from q to k in qkv."""
    return None if qkv.pointer is None else qkv.pointer.stride(2)


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
    rstds = [qkv.new_empty((*shape[:3], 1), dtype=work_dtype(qkv)) for _ in range(2)]
    given, given_dot = _view(qkv), _view(qkv_dot)
    n_rows = batch * tokens * heads
    block_rows, block_width, num_warps = tuning.heads(width, qkv.element_size())
    _qk_norm_rope_fwd_kernel[(cdiv(n_rows, block_rows),)](
        given,
        given_dot,
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
        _part(given),
        _part(given_dot),
        EPS=eps,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )
    return values, dots, rstds


def fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """Run the kernel for the value."""
    values, _, rstds = _launch_fwd(qkv, None, q_weight, k_weight, rope, eps)
    return *values, *rstds


def jvp(
    qkv: Tensor,
    qkv_dot: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Run the kernel for value and tangent."""
    (q, k, v), (q_dot, k_dot, v_dot), rstds = _launch_fwd(
        qkv, qkv_dot, q_weight, k_weight, rope, eps
    )
    return q, q_dot, k, k_dot, v, v_dot, *rstds


def bwd(
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
    """Run the kernel for the gradient."""
    batch, tokens, _, heads, width = qkv.shape
    qkv_bar = qkv.new_empty(qkv.shape)
    n_rows = batch * tokens * heads
    block_rows, block_width, num_warps = tuning.heads(width, qkv.element_size())
    programs = min(cdiv(n_rows, block_rows), tuning.REDUCING_PROGRAMS)
    partial = q_rstd.new_empty((programs, 2, width))
    given = _view(qkv)
    _qk_norm_rope_bwd_kernel[(programs,)](
        *map(_view, (q_bar, k_bar, v_bar)),
        given,
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
        _part(given),
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
        **tuning.registers(num_warps),
    )
    weight_bars = [weight.new_empty(weight.shape) for weight in (q_weight, k_weight)]
    block_rows, block_cols, num_warps = tuning.sum_of_rows(programs)
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
