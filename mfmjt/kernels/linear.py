"""Matrix product with a weight; tangents are more rows of the same product.

    value      y = x W^T + b
    tangent    y_dot = x_dot W^T
    cotangent  x_bar = y_bar W,  W_bar = y_bar^T x,  b_bar = sum over rows of y_bar
    of both    x_dot_bar = y_dot_bar W,  W_bar = y_bar^T x + y_dot_bar^T x_dot

x (..., C), W (O, C), b (O). PyTorch's own forward mode does a third product, of x with a zero
tangent of W that it makes up, and keeps x_dot for backward. Here the dual op multiplies the rows of
x and those of x_dot by W and keeps x and W alone.

The products are the vendor's, and there are two of them. One over [x; x_dot] would need both in one
piece of memory: then the tape, which holds x, holds x_dot too and doubles what training keeps, or
both are copied first. All there is to win is a launch and W read once more, from the L2 cache. For
the same reason streams are multiplied one after the other: no library has a product of rows of
several tensors by a weight each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _jvp_rows, _op
from mfmjt.kernels._op import Tensors

__all__ = ["linear", "linear_ref"]


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` in plain PyTorch; the definition of correct."""
    return F.linear(x, weight, bias)


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


def _jvp(x: Tensor, weight: Tensor, bias: Tensor | None, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    rows, rows_dot = x.reshape(-1, x.shape[-1]), x_dot.reshape(-1, x.shape[-1])
    y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return y.view(shape), torch.mm(rows_dot, weight.t()).view(shape)


def _bwd(
    y_bar: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x_bar, weight_bar, bias_bar = (x.new_empty(0) for _ in needs)
    rows = y_bar.reshape(-1, y_bar.shape[-1])
    if needs[0]:
        x_bar = torch.mm(rows, weight).view(x.shape)
    if needs[1]:
        weight_bar = torch.mm(rows.t(), x.reshape(-1, x.shape[-1]))
    if needs[2]:
        bias_bar = rows.sum(0)
    return x_bar, weight_bar, bias_bar


def _jvp_bwd(
    y_bar: Tensor,
    y_dot_bar: Tensor,
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_bar, weight_bar, bias_bar = _bwd(y_bar, x, weight, needs[:3])
    x_dot_bar, of_x_dot, _ = _bwd(y_dot_bar, x_dot, weight, [needs[3], needs[1], False])
    return x_bar, weight_bar.add_(of_x_dot), bias_bar, x_dot_bar


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _op.check_tensors("linear", {"bias": bias}, x=x, weight=weight)
    fits = x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    # What PyTorch's own product does not notice: it gives whatever is in memory
    fits = fits and x.device == weight.device == (x if bias is None else bias).device
    if not fits:
        needs = "x (..., C), weight (O, C), bias (O,), all on one device"
        _op.check(False, "linear", needs, x=x, weight=weight, bias=bias)


# A value is PyTorch's own, with its own gradient
_linear = _op.Op(
    "linear",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=linear_ref,
    plain=linear_ref,
    autocasts="x, weight and bias of one dtype",
    jvp_bwd=_jvp_bwd,
)


def linear(x: Tensors, weight: Tensors, bias: _op.MaybeTensors = None) -> Tensors:
    """Return x W^T + b, differentiable in both modes; autocasts as PyTorch's does.

    Args:
        x: `(..., C)`. Or a tuple of streams, and so are weight and bias; sizes may differ.
        weight: `(O, C)`; must not carry a tangent.
        bias: `(O,)` or None; must not carry a tangent.

    Returns:
        `(..., O)`; for a tuple of streams a tuple.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
        NotImplementedError: weight or bias carries a tangent.
    """
    if isinstance(x, tuple):
        biases = [None] * len(x) if bias is None else bias
        return tuple([linear(*stream) for stream in zip(x, weight, biases, strict=True)])
    return _jvp_rows.product(_linear, x, weight, bias)
