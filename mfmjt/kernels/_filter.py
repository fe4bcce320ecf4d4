"""The anti-aliasing filter of BigVGAN's activation, as numbers and as tensors."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["FILTER", "taps"]

_COUNT = 12


def _filter() -> tuple[float, ...]:
    """Return the Kaiser-windowed sinc: low-pass at half the doubled rate's Nyquist, of sum one."""
    half_width, cutoff, half = 0.3, 0.25, _COUNT // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB; this is 51
    window = torch.kaiser_window(_COUNT, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(-half, half, dtype=torch.float64) + 0.5
    taps = window * torch.sinc(2 * cutoff * time)
    return tuple((taps / taps.sum()).tolist())


FILTER = _filter()


def taps(x: Tensor) -> Tensor:
    """Return the filter (12,) in the dtype and on the device of x.

    Kept, because numbers come to a GPU by a copy that the host waits for: a CUDA graph refuses it.
    What is made for a compiler, a mode or a subclass must not outlive it, and is not kept.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return x.new_tensor(FILTER)
    if torch._C._len_torch_dispatch_stack():
        return x.new_tensor(FILTER)
    return _kept_taps(x.dtype, x.device)


@functools.lru_cache
def _kept_taps(dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor of no functorch level, and one that may be saved for backward
    with torch._C._DisableFuncTorch(), torch.inference_mode(False):
        return torch.tensor(FILTER, dtype=dtype, device=device)
