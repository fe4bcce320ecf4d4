"""Split planar qkv, RMS-normalise q and k over the head, rotate adjacent pairs.

    value      r = (mean(x^2) + eps)^-1/2,  n = x r,  y = R (w n)         for x = q, k; v as it is
    tangent    y_dot = R (w r (x_dot - n mean(n x_dot)))
    cotangent  g = R^T y_bar,  w_bar = sum(g n),  x_bar = r (w g - n mean(n w g))

qkv (B, N, 3, H, D), w (D); R turns the pair (2i, 2i + 1) of token n by the angle whose cosine and
sine are rope[n, i]. Stored in the dtype of qkv, computed in float32 (float64 for float64); a
rotation of a pair is a product of complex numbers. Kept for backward: qkv, the weights, rope, and
r of each head. The kernels move 6 B N H D elements, 12 with tangents, 8 for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfmjt.kernels import _native
from mfmjt.kernels._op import MaybeTensors, Op, Tensors, check, check_tensors, work_dtype
from mfmjt.kernels._second_order import of_reference

__all__ = ["qk_norm_rope", "qk_norm_rope_ref"]


def _rotate_ref(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # (N, 1, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def qk_norm_rope_ref(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None = None, eps: float = 2**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `qk_norm_rope` in plain PyTorch; the definition of correct."""
    work = torch.promote_types(qkv.dtype, torch.float32)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(work)
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(work)
        return (x if rope is None else _rotate_ref(x, rope.to(work))).to(qkv.dtype)

    q, k, v = qkv.unbind(2)
    return one(q, q_weight), one(k, k_weight), v


def _rotations(rope: Tensor | None, work: torch.dtype) -> Tensor | None:
    """Return the rotations as complex numbers (N, 1, D/2)."""
    return None if rope is None else torch.view_as_complex(rope.to(work).contiguous())[:, None]


def _rotate_(x: Tensor, rotations: Tensor | None) -> Tensor:
    """Rotate (B, N, H, D) in place."""
    if rotations is not None:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotations)
    return x


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, contiguous whatever x is."""
    return torch.mul(x, factor, out=x.new_empty(x.shape))


def _value(
    x: Tensor, weight: Tensor, rotations: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    rstd = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _rotate_(_times(x, rstd).mul_(weight), rotations), rstd


def _tangent(
    x: Tensor, x_dot: Tensor, weight: Tensor, rotations: Tensor | None, rstd: Tensor
) -> Tensor:
    projection = (x * x_dot).mean(-1, keepdim=True).mul_(rstd.square())
    y_dot = torch.addcmul(x_dot, x, projection, value=-1, out=x.new_empty(x.shape))
    return _rotate_(y_dot.mul_(rstd).mul_(weight), rotations)


def _cotangent_(
    out: Tensor, y_bar: Tensor, x: Tensor, weight: Tensor, rotations: Tensor | None, rstd: Tensor
) -> Tensor:
    """Write the cotangent of x to out; return that of the weight."""
    g = y_bar.clone(memory_format=torch.contiguous_format)
    # Not conj(): its lazy conjugate is ignored where torch.compile calls the op (torch 2.13).
    g = _rotate_(g, None if rotations is None else rotations.conj_physical())
    n = x * rstd
    product = g * n
    weight_bar = product.flatten(0, -2).sum(0)
    projection = (product @ weight).div_(-x.shape[-1]).unsqueeze(-1)
    out.copy_(g.mul_(weight).addcmul_(n, projection).mul_(rstd))
    return weight_bar


def _fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, dtype = work_dtype(qkv), qkv.dtype
    rotations = _rotations(rope, work)
    q, q_rstd = _value(qkv[:, :, 0].to(work), q_weight.to(work), rotations, eps)
    k, k_rstd = _value(qkv[:, :, 1].to(work), k_weight.to(work), rotations, eps)
    v = qkv[:, :, 2].clone(memory_format=torch.contiguous_format)
    return q.to(dtype), k.to(dtype), v, q_rstd, k_rstd


def _jvp(
    qkv: Tensor,
    qkv_dot: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, dtype = work_dtype(qkv), qkv.dtype
    rotations = _rotations(rope, work)

    def one(part: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, x_dot, weight = qkv[:, :, part].to(work), qkv_dot[:, :, part].to(work), weight.to(work)
        y, rstd = _value(x, weight, rotations, eps)
        return y.to(dtype), _tangent(x, x_dot, weight, rotations, rstd).to(dtype), rstd

    q, q_dot, q_rstd = one(0, q_weight)
    k, k_dot, k_rstd = one(1, k_weight)
    v, v_dot = (t[:, :, 2].clone(memory_format=torch.contiguous_format) for t in (qkv, qkv_dot))
    return q, q_dot, k, k_dot, v, v_dot, q_rstd, k_rstd


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
    work = work_dtype(qkv)
    rotations = _rotations(rope, work)
    qkv_bar = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    weight_bars = []
    both = (q_bar, q_weight, q_rstd), (k_bar, k_weight, k_rstd)
    for i, (y_bar, weight, rstd) in enumerate(both):
        if y_bar is None:
            qkv_bar[:, :, i].zero_()
            weight_bars.append(torch.zeros_like(weight))
            continue
        x, w = qkv[:, :, i].to(work), weight.to(work)
        weight_bar = _cotangent_(qkv_bar[:, :, i], y_bar.to(work), x, w, rotations, rstd)
        weight_bars.append(weight_bar.to(weight.dtype))
    if v_bar is None:
        qkv_bar[:, :, 2].zero_()
    else:
        qkv_bar[:, :, 2].copy_(v_bar)
    return qkv_bar, weight_bars[0], weight_bars[1]


def _takes(qkv: Tensor, *others: Tensor | None) -> bool:
    """Return True if the C++ kernels serve these: pairs to rotate of float32 or bfloat16."""
    return _native.floats(qkv, *others) and qkv.shape[4] % 2 == 0


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, eps: float
) -> None:
    check_tensors("qk_norm_rope", {"rope": rope}, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
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
        check(False, "qk_norm_rope", needs, **given)


_op = Op(
    "qk_norm_rope",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=qk_norm_rope_ref,
    takes=_takes,
    streams=True,
    jvp_bwd=of_reference(qk_norm_rope_ref, _jvp, "q", "k", "v"),
)


def qk_norm_rope(
    qkv: Tensors,
    q_weight: Tensors,
    k_weight: Tensors,
    rope: MaybeTensors = None,
    eps: float = 2**-23,
) -> tuple[Tensors, Tensors, Tensors]:
    """Split planar qkv, RMS-normalise q and k, rotate them; differentiable in both modes.

    Args:
        qkv: `(B, N, 3, H, D)`, any floating dtype, D even where rope is given; or a tuple of
            streams, and so are the other tensors.
        q_weight: `(D,)`; must not carry a tangent.
        k_weight: `(D,)`; must not carry a tangent.
        rope: `(N, D/2, 2)` cosines and sines, a constant; or None for no rotation.
        eps: Added to the mean square; the default is PyTorch's for float32.

    Returns:
        q, k and v, each `(B, N, H, D)` in the dtype of qkv, or a tuple of those of all streams.

    Raises:
        ValueError: The shapes do not fit.
        NotImplementedError: A weight or rope carries a tangent, or rope requires gradients.
    """
    q, k, v = _op(qkv, q_weight, k_weight, rope, eps)
    return q, k, v
