"""Matrix product with a weight; tangents are more rows of the same product.

    value      y = x W^T + b
    tangent    y_dot = x_dot W^T
    cotangent  x_bar = y_bar W,  W_bar = y_bar^T x,  b_bar = sum over rows of y_bar

x (..., C), W (O, C), b (O). PyTorch's own forward mode does a third product, of x with a zero
tangent of W that it makes up, and keeps x_dot for backward. Here the dual op multiplies the rows of
x and those of x_dot by W and keeps x and W alone.

The products are the vendor's, and there are two of them. One over [x; x_dot] would need both in one
piece of memory: then the tape, which holds x, holds x_dot too and doubles what training keeps, or
both are copied first. All there is to win is a launch and W read once more, from the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _jvp_rows, _op

__all__ = ["linear", "linear_ref"]


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch `linear`; the definition of correct."""
    return F.linear(x, weight, bias)


def _jvp(x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    rows, rows_dot = x.reshape(-1, x.shape[-1]), x_dot.reshape(-1, x.shape[-1])
    y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return y.view(shape), torch.mm(rows_dot, weight.t()).view(shape)


_jvp_op = _op.define(
    "linear_jvp(Tensor x, Tensor x_dot, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", _jvp
)


def _backward(
    ctx: Any, y_bar: Tensor | None, y_dot_bar: Tensor | None
) -> tuple[Tensor | None, ...]:
    y_bar = _op.refuse_gradient(y_bar, y_dot_bar)
    assert y_bar is not None
    x, weight = ctx.saved_tensors
    wants_x, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    rows = y_bar.reshape(-1, y_bar.shape[-1])
    return (
        torch.mm(rows, weight).view(x.shape) if wants_x else None,
        None,
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1])) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
    )


_op.backward_of(_jvp_op, _backward, saves=lambda inputs, outputs: (inputs[0], inputs[2]), outputs=2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer x W^T + b, differentiable in both modes; autocasts as PyTorch's does.

    Args:
        x: `(..., C)`.
        weight: `(O, C)`; must not carry a tangent.
        bias: `(O,)` or None; must not carry a tangent.

    Returns:
        `(..., O)`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
        NotImplementedError: weight or bias carries a tangent.
    """
    _op.check_tensors("linear", {"bias": bias}, x=x, weight=weight)
    fits = x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    # What PyTorch's own product does not notice: it gives whatever is in memory
    fits = fits and x.device == weight.device == (x if bias is None else bias).device
    if not fits:
        needs = "x (..., C), weight (O, C), bias (O,), all on one device"
        _op.check(False, "linear", needs, x=x, weight=weight, bias=bias)
    if _op.use_reference():
        return linear_ref(x, weight, bias)

    def run(values: Any, dots: Any) -> Any:
        x, weight, bias = values
        y = _jvp_rows.known(weight, (*x.shape[:-1], weight.shape[0]))
        if y is not None:
            return (y,) if dots is None else (y, F.linear(dots[0], weight))
        if dots is None:
            return (_jvp_rows.made(weight, F.linear(x, weight, bias)),)
        return _jvp_op(*_op.autocast(x, dots[0], weight, bias))

    return _op.dual(run, (x,), "linear", {"weight": weight, "bias": bias})[0]
