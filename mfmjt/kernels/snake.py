"""Anti-aliased SnakeBeta of BigVGAN: twice the rate, a periodic activation, back to the rate."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["snake", "snake_ref"]

_TAPS = 12


@functools.lru_cache
def _filter_values() -> tuple[float, ...]:
    """Kaiser-windowed sinc low-pass at half the doubled rate's Nyquist frequency, sum one."""
    half_width, cutoff, half = 0.3, 0.25, _TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    window = torch.kaiser_window(_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(-half, half, dtype=torch.float64) + 0.5
    taps = window * torch.sinc(2 * cutoff * time)
    return tuple((taps / taps.sum()).tolist())


def snake_ref(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Plain PyTorch `snake`; the definition of correct."""
    channels = x.shape[1]
    taps = x.new_tensor(_filter_values()).expand(channels, 1, -1)
    up = F.conv_transpose1d(
        F.pad(x, (5, 5), mode="replicate"), 2 * taps, stride=2, groups=channels
    )[..., 15:-15]
    frequency, height = alpha.exp()[:, None], 1 / (beta.exp()[:, None] + 1e-9)
    up = (up + height * torch.sin(up * frequency).square()).to(x.dtype)
    return F.conv1d(F.pad(up, (5, 6), mode="replicate"), taps, stride=2, groups=channels)


snake = snake_ref
