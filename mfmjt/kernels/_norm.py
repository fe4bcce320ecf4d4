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

from mfmjt.kernels import _backends, _dual, _native, _op

__all__ = [
    "add",
    "check_rows",
    "checked",
    "infer",
    "modulate",
    "modulate_bar",
    "modulate_dot",
    "normalise",
    "normalised_and_modulated",
    "pick",
    "takes",
]

_normalise_bar = torch.ops.aten.native_layer_norm_backward.default


def checked(op: str, *names: str) -> Callable[..., None]:
    """Return the check of an op of x (B, N, C), and of h of its shape and modulations by name."""

    def check(x: Tensor, *others: Any) -> None:
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


def normalised_and_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y by PyTorch's functions, in one pass less over memory than the reference."""
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
    y_bar: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, shift_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cotangents of x, shift and scale; no elements for a shift whose is y_bar.

    A library op must not return its input, and a copy would be a pass over memory: `Op` puts y_bar
    there (`passes`).
    """
    n = x - mean
    n = n.sub_(n.mean(-1, keepdim=True)).mul_(rstd)
    x_bar = _project_out(torch.addcmul(y_bar, y_bar, scale), n).mul_(rstd)
    scale_bar = n.mul_(y_bar).sum_to_size(scale.shape).contiguous()
    shift_bar = y_bar.new_empty(0) if shift_shape == x.shape else y_bar.sum_to_size(shift_shape)
    return x_bar, shift_bar, scale_bar


def takes(x: Tensor, *others: Tensor) -> bool:
    """Return True if the C++ kernels serve x (B, N, C) and what has a row per token or sample."""
    if x.ndim != 3 or x.dtype not in _native.DTYPES or x.numel() == 0:
        return False
    shapes = x.shape, (x.shape[0], 1, x.shape[2])
    return all(t.dtype == x.dtype and t.shape in shapes for t in others)


# --- Rows of modulations to pick


def check_rows(op: str, x: Any, rows: Any, h: Any = None, **modulations: Any) -> None:
    """Raise unless `rows` (N,) picks of modulations (B or 1, S, C); or tuples, of every stream."""
    if isinstance(x, (tuple, list)):
        given = {"rows": rows, "h": h, **modulations}
        for name, ts in given.items():
            if ts is not None and not (isinstance(ts, (tuple, list)) and len(ts) == len(x)):
                needs = f"{name} for each of {len(x)} streams"
                raise ValueError(f"mfmjt.kernels.{op} needs {needs}.")
        for i, one in enumerate(x):
            check_rows(op, one, **{n: None if ts is None else ts[i] for n, ts in given.items()})
        return
    _op.check_tensors(op, {"rows": rows, "h": h}, x=x, **modulations)
    if h is not None and h.shape != x.shape:
        _op.check(False, op, "h of the shape of x", x=x, h=h)
    fits = x.ndim == 3
    if rows is not None:
        fits = fits and rows.shape == x.shape[1:2] and rows.dtype in (torch.int32, torch.int64)
    for m in modulations.values():
        fits = fits and m.ndim == 3 and m.shape[0] in (1, x.shape[0]) and m.shape[2] == x.shape[2]
        fits = fits and (rows is not None or m.shape[1] in (1, x.shape[1]))
    needs = "rows (N,) of integers, or S of 1 or N, and modulations (B or 1, S, C)"
    _op.check(fits, op, needs, x=x, rows=rows, **modulations)


def pick(x: Any, rows: Any, *modulations: Any) -> list[Any]:
    """Return modulations (B or 1, S, C), or tuples of them, with the rows that tokens ask for."""
    if not isinstance(x, Tensor):
        return [tuple(pick(*one)[0] for one in zip(x, rows, m, strict=True)) for m in modulations]
    picked = [
        m if rows is None or m.shape[1] == 1 else m.index_select(1, rows) for m in modulations
    ]
    return [m if m.shape[0] == x.shape[0] else m.expand(x.shape[0], -1, -1) for m in picked]


def infer(x: Any, added: Any, shift: Any, scale: Any, rows: Any, eps: float) -> Any:
    """Compute by the kernel that picks rows itself, of one stream or of several.

    Args:
        x: One or a tuple, as all that follow.
        added: h and gate, or None.
        shift: (B or 1, S, C).
        scale: Likewise.
        rows: (N,), or None in a tuple.
        eps: Added to the variance.

    Returns:
        The sum and the result; None where there is no such kernel or a derivative is wanted.
    """
    one = isinstance(x, Tensor)
    given = (x, *(added or ((), ())), shift, scale, rows)
    lists = [[t] if isinstance(t, Tensor) else list(t) for t in given]
    tensors = [t for ts in lists[:5] for t in ts]
    served = _backends.AVAILABLE and (_backends.ON_CPU or tensors[0].is_cuda)
    if _op.use_reference() or not served:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if any(_dual.split(t)[1] is not None for t in tensors):
        return None
    results = _by_rows(*lists, eps)
    return [ys[0] if one and ys else tuple(ys) for ys in results]


def _picked(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    totals, ys = [], []
    for i, (x, row) in enumerate(zip(xs, rows, strict=True)):
        work = _op.work_dtype(x)
        shift, scale = (m.to(work) for m in pick(x, row, shifts[i], scales[i]))
        if hs:
            total = add(x.to(work), hs[i].to(work), pick(x, row, gates[i])[0].to(work))
            x = total.to(x.dtype)
            totals.append(x)
        ys.append(modulate(normalise(x.to(work), eps)[0], shift, scale).to(x.dtype))
    return totals, ys


_launched = _op.backend("triton", "norm", "by_rows", _picked)
_by_rows = _op.register(
    "norm_by_rows(Tensor[] xs, Tensor[] hs, Tensor[] gates, Tensor[] shifts, Tensor[] scales, "
    "Tensor?[] rows, float eps) -> (Tensor[], Tensor[])",
    _picked,
    cpu=_launched if _backends.ON_CPU else None,
    gpu=_launched,
)
