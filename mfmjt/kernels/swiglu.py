"""SwiGLU: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu", "swiglu_ref"]


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Plain PyTorch `swiglu`; the definition of correct."""
    return F.silu(gate) * up


swiglu = swiglu_ref
