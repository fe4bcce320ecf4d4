"""The dtype that a network is called in: that of the data, whatever the rest is computed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["called_in", "network_dtype"]


def network_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x; float32 where autocast is on with another one of 16 bits.

    Autocast casts float32 itself, and PyTorch mixes float16 and bfloat16 in no concatenation.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    device = x.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device)
    if cast and x.dtype != torch.get_autocast_dtype(device):
        return work
    return x.dtype if x.is_floating_point() else work


def called_in(dtype: torch.dtype, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(z, r, t, **cond), given its latents and times in `dtype`."""

    def call(z: Tensor, r: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return f(z.to(dtype), r.to(dtype), t.to(dtype), **cond)

    return call
