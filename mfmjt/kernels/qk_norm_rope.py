"""Split planar qkv, RMS-normalise q and k over the head, rotate adjacent pairs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["qk_norm_rope", "qk_norm_rope_ref"]


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
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
        return (x if rope is None else _rotate(x, rope.to(work))).to(qkv.dtype)

    q, k, v = qkv.unbind(2)
    return one(q, q_weight), one(k, k_weight), v


qk_norm_rope = qk_norm_rope_ref
