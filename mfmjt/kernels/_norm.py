"""Layer norm and modulation, shared by the ops that end in them.

    n = (x - mean) rstd,    y = n (1 + scale) + shift

The Jacobian of n with respect to x is symmetric, so PyTorch's fused backward kernel serves for the
tangent too. All functions work in the dtype of x, which callers raise to float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfmjt.kernels import _op

__all__ = [
    "check_modulation",
    "modulate",
    "modulate_bar",
    "modulate_dot",
    "normalise",
    "whole_shift_bar",
]

_normalise_bar = torch.ops.aten.native_layer_norm_backward.default


def check_modulation(op: str, x: Tensor, **modulations: Tensor) -> None:
    """Raise unless every modulation broadcasts to x without growing it."""
    for name, m in modulations.items():
        fits = m.ndim <= x.ndim and all(
            a in (1, b) for a, b in zip(m.shape[::-1], x.shape[::-1], strict=False)
        )
        if not (fits and m.is_floating_point() and x.is_floating_point()):
            _op.check(False, op, f"{name} that broadcasts to x", x=x, **{name: m})


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last axis; returns n, mean and rstd (statistics keep the axis)."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)


def modulate(n: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Turn n into y in place."""
    return torch.addcmul(shift, n, 1 + scale, out=n)


def modulate_dot(
    x: Tensor,
    n: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
) -> Tensor:
    """The tangent of y; tangents that are None are zero and cost nothing."""
    if x_dot is None:
        y_dot = torch.zeros_like(n) if scale_dot is None else n * scale_dot
    else:
        y_dot, _, _ = _normalise_bar(
            x_dot, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        y_dot = y_dot.mul_(1 + scale)
        if scale_dot is not None:
            y_dot.addcmul_(n, scale_dot)
    return y_dot if shift_dot is None else y_dot.add_(shift_dot)


def modulate_bar(
    y_bar: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, shift_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of x, shift and scale; that of shift has no elements where it equals y_bar.

    A library op must not return its input, and a copy would be a pass over memory: whoever called
    the op puts y_bar there (`whole_shift_bar`).
    """
    n = torch.addcmul(-mean * rstd, x, rstd)
    scale_bar = n.mul_(y_bar).sum_to_size(scale.shape).contiguous()
    shift_bar = y_bar.new_empty(0) if shift_shape == x.shape else y_bar.sum_to_size(shift_shape)
    x_bar, _, _ = _normalise_bar(
        torch.addcmul(y_bar, y_bar, scale),
        x,
        x.shape[-1:],
        mean,
        rstd,
        None,
        None,
        [True, False, False],
    )
    return x_bar, shift_bar, scale_bar


def whole_shift_bar(shift_bar: Tensor, y_bar: Tensor | None, shift: Tensor) -> Tensor:
    """The cotangent of shift, from what `modulate_bar` returned."""
    if y_bar is None or shift_bar.shape == shift.shape:
        return shift_bar
    return y_bar.to(shift.dtype)
