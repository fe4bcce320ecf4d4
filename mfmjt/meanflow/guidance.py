"""Classifier-free guidance of a conditional and an unconditional velocity."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["GuidanceMode", "guide"]

GuidanceMode = Literal["cfg_scaled", "cfg", "none"]

_EPS = 1e-8
"""Keeps the scale finite where the unconditional velocity is zero."""


def guide(u_c: Tensor, u_0: Tensor, w: float | Tensor, mode: GuidanceMode = "cfg_scaled") -> Tensor:
    """Combine the velocities with guidance scale w.

    - `"cfg"`: u = w·u_c + (1 − w)·u_0
    - `"cfg_scaled"`: u = w·u_c + (1 − w)·s·u_0 with s = ⟨u_c, u_0⟩ / (‖u_0‖² + ε) for each sample
      (arXiv 2509.06389, after arXiv 2503.18886), so that the unconditional part is as long as its
      projection on the conditional one
    - `"none"`: u = u_c

    Args:
        u_c: Conditional velocity (B, ...).
        u_0: Unconditional velocity, same shape.
        w: Guidance scale, one or (B,); 1 gives u_c.
        mode: See above.

    Returns:
        As u_c; computed in float32 or wider.

    Raises:
        InputError: Unknown mode, or shapes differ.
    """
    check_mode(mode)
    if mode == "none":
        return u_c
    if u_c.shape != u_0.shape:
        raise InputError(
            f"u_c has shape {tuple(u_c.shape)}, u_0 {tuple(u_0.shape)}: guidance combines equal "
            "shapes. Evaluate both on the same latent."
        )
    work = torch.promote_types(u_c.dtype, torch.float32)
    c, null = u_c.to(work), u_0.to(work)
    sample = tuple(range(1, c.ndim))
    if isinstance(w, Tensor) and w.ndim:
        w = w.to(work).view(-1, *(1 for _ in sample))
    if mode == "cfg_scaled":
        dot = (c * null).sum(sample, keepdim=True)
        null = null * (dot / (null.square().sum(sample, keepdim=True) + _EPS))
    return (w * c + (1 - w) * null).to(u_c.dtype)


def check_negative(w: float | Tensor, mode: str) -> None:
    """Raise InputError unless the sound is guided, so that a negative prompt has an effect."""
    if mode == "none" or (not isinstance(w, Tensor) and w <= 1):
        raise InputError(
            "A negative prompt is what guidance leads away from, and there is none with mode "
            f"{mode} and guidance {float(w):g}. Give mode cfg or cfg_scaled and guidance above 1, "
            "or leave the negative prompt out."
        )


def check_mode(mode: str) -> None:
    """Raise InputError unless `mode` is one of `GuidanceMode`."""
    if mode not in get_args(GuidanceMode):
        raise InputError(
            f"No guidance mode {mode!r}: there are {', '.join(get_args(GuidanceMode))}. Choose one."
        )
