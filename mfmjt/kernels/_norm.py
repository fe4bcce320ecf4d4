"""Formulas of layer norm and modulation, for `adaln` and `gated_residual_adaln`.

    n = (x - mean) rstd,    y = n (1 + scale) + shift

The Jacobian of n with respect to x is symmetric, so PyTorch's fused backward serves for the tangent
too. The formulas compute in the dtype of x, which callers raise to float32 at least.
Rows are centred twice, everywhere: what rounding left in the mean goes with the second, so that a
large offset costs no digits and a constant row is normalised to zeros. In C++ the first centre is
the mean of a row's first elements, for one sweep to make all sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _native, _op

__all__ = [
    "add",
    "add_up",
    "checked",
    "modulate",
    "modulate_bar",
    "modulate_dot",
    "normalise",
    "normalised_and_modulated",
    "pick",
    "spread",
    "takes",
]

_normalise_bar = torch.ops.aten.native_layer_norm_backward.default


def checked(op: str, *names: str) -> Callable[..., None]:
    """Return the check of an op of x (B, N, C), and of h of its shape and modulations by name.

    What follows them is eps and the rows to pick, whose modulations `spread` has checked.
    """

    def check(x: Tensor, *others: Any) -> None:
        if others[-1] is not None:
            return
        for t in (x, *others[: len(names)]):
            if not isinstance(t, Tensor):
                _op.check_tensors(op, x=x, **dict(zip(names, others, strict=False)))
        shape, floating = x.shape, x.is_floating_point()
        if not shape:
            _op.check(False, op, "x (B, N, C)", x=x)
        usual = shape, (*shape[:-2], 1, shape[-1])
        for name, m in zip(names, others, strict=False):
            if name == "h":
                if m.shape != shape:
                    _op.check(False, op, "h of the shape of x", x=x, h=m)
            elif not (
                floating
                and m.is_floating_point()
                and (m.shape in usual or _broadcasts(m.shape, shape))
            ):
                _op.check(False, op, f"{name} that broadcasts to x", x=x, **{name: m})

    return check


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    return len(shape) <= len(whole) and all(
        shape[i] == 1 or shape[i] == whole[i] for i in range(-len(shape), 0)
    )


def add(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate h, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.addcmul(x, gate, h, out=out)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last axis; return n, mean and rstd, which keep the axis."""
    mean = x.mean(-1, keepdim=True)
    n, rest, rstd = torch.native_layer_norm(x - mean, x.shape[-1:], None, None, eps)
    return n, mean.add_(rest), rstd


def _project_out(x: Tensor, n: Tensor) -> Tensor:
    """Project x off the constant and off n, which is normalised: x - mean(x) - n mean(n x).

    This is layer norm's Jacobian up to rstd. ATen's fused backward computes it when given n with
    mean 0 and rstd 1.
    """
    zeros = n.new_zeros((*n.shape[:-1], 1))
    projected, _, _ = _normalise_bar(
        x, n, n.shape[-1:], zeros, torch.ones_like(zeros), None, None, [True, False, False]
    )
    return projected


def normalised_and_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rows: Tensor | None
) -> Tensor:
    """Return y by PyTorch's functions, in one pass less over memory than the reference."""
    shift, scale = pick(rows, shift, scale)
    n = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift, n, 1 + scale).to(x.dtype)


def modulate(n: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Turn n into y in place."""
    return torch.addcmul(shift, n, 1 + scale, out=n)


def modulate_dot(
    n: Tensor,
    rstd: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
) -> Tensor:
    """Return the tangent of y; tangents that are None are zero and cost nothing."""
    if x_dot is None:
        y_dot = torch.zeros_like(n) if scale_dot is None else n * scale_dot
    else:
        y_dot = _project_out(x_dot, n).mul_(rstd).mul_(1 + scale)
        if scale_dot is not None:
            y_dot.addcmul_(n, scale_dot)
    return y_dot if shift_dot is None else y_dot.add_(shift_dot)


def modulate_bar(
    y_bar: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift_shape: torch.Size,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cotangents of x, shift and scale; no elements for a shift whose is y_bar.

    A library op must not return its input, and a copy would be a pass over memory: `Op` puts y_bar
    there (`passes`).
    """
    n = x - mean
    n = n.sub_(n.mean(-1, keepdim=True)).mul_(rstd)
    (of_token,) = pick(rows, scale)
    x_bar = _project_out(torch.addcmul(y_bar, y_bar, of_token), n).mul_(rstd)
    scale_bar = add_up(n.mul_(y_bar), scale.shape, rows).contiguous()
    passed = rows is None and shift_shape == x.shape
    shift_bar = y_bar.new_empty(0) if passed else add_up(y_bar, shift_shape, rows)
    return x_bar, shift_bar, scale_bar


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Return True if the C++ kernels serve x (B, N, C) and what has a row per token or sample.

    The last of `others` are the rows to pick, or None.
    """
    if x.ndim != 3 or x.dtype not in _native.DTYPES or x.numel() == 0:
        return False
    *rest, rows = others
    shapes = x.shape, (x.shape[0], 1, x.shape[2])
    return all(
        t is not None and t.dtype == x.dtype and (t.shape in shapes or rows is not None)
        for t in rest
    )


# --- Rows of modulations to pick


def pick(rows: Tensor | None, *modulations: Any) -> list[Any]:
    """Return of modulations (B, S, C), or None, the rows that tokens ask for, (B, N, C)."""
    return [m if m is None or rows is None else m.index_select(1, rows) for m in modulations]


def add_up(bar: Tensor, shape: torch.Size, rows: Tensor | None) -> Tensor:
    """Return the cotangent of a modulation from that of what tokens got of it, (B, N, C)."""
    if rows is None:
        return bar.sum_to_size(shape)
    return bar.new_zeros(shape).index_add_(1, rows, bar)


def spread(op: str, x: Any, rows: Any, h: Any = None, **modulations: Any) -> tuple[Any, ...]:
    """Return rows and modulations as `Op` takes them: all (B, S, C) where rows are picked.

    Args:
        op: Name of the op.
        x: (B, N, C), or a tuple, and so are all that follow.
        rows: (N,), or None; or a tuple.
        h: Of the shape of x, or None.
        modulations: (B or 1, S, C) by name; where no rows are picked they are left as they are.

    Raises:
        ValueError: The shapes do not fit.
    """
    if isinstance(x, (tuple, list)):
        given = {"rows": rows, "h": h, **modulations}
        for name, ts in given.items():
            if ts is not None and not (isinstance(ts, (tuple, list)) and len(ts) == len(x)):
                needs = f"{name} for each of {len(x)} streams"
                raise ValueError(f"mfmjt.kernels.{op} needs {needs}.")
        found = [
            spread(op, one, **{n: ts if ts is None else ts[i] for n, ts in given.items()})
            for i, one in enumerate(x)
        ]
        return tuple(zip(*found, strict=True))
    if rows is None:
        return None, *modulations.values()
    _op.check_tensors(op, {"h": h}, x=x, rows=rows, **modulations)
    if h is not None and h.shape != x.shape:
        _op.check(False, op, "h of the shape of x", x=x, h=h)
    ms = list(modulations.values())
    fits = x.ndim == 3 and rows.shape == x.shape[1:2] and rows.dtype in (torch.int32, torch.int64)
    fits = fits and all(t.is_floating_point() and t.ndim == 3 for t in (x, *ms))
    fits = fits and all(m.shape[0] in (1, len(x)) and m.shape[2] == x.shape[2] for m in ms)
    counts = {m.shape[1] for m in ms if m.ndim == 3}
    fits = fits and len(counts - {1}) <= 1
    _op.check(
        fits,
        op,
        "rows (N,) of integers for modulations (B or 1, S, C)",
        x=x,
        rows=rows,
        **modulations,
    )
    if counts == {1}:
        return None, *(m.expand(len(x), 1, -1) for m in ms)
    return rows, *(m.expand(len(x), max(counts), -1) for m in ms)
