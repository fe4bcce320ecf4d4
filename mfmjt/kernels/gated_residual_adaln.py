"""The boundary between two sub-layers: a gated residual add, then `adaln` of the sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_residual_adaln", "gated_residual_adaln_ref"]


def gated_residual_adaln_ref(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch `gated_residual_adaln`; the definition of correct."""
    total = (x + gate * h).to(x.dtype)
    y = F.layer_norm(total, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return total, y.to(x.dtype)


gated_residual_adaln = gated_residual_adaln_ref
