"""SwiGLU of two products with weights, of convolutions or linear layers: one launch on a GPU.

    value      g = x W1^T,  u = x W2^T,  s = g sigmoid(g),  y = s u
    tangent    s' = sigmoid(g) + s (1 - sigmoid(g)),  y_dot = s' (x_dot W1^T) u + s (x_dot W2^T)
    cotangent  u_bar = y_bar s,  g_bar = y_bar u s';  then that of a product with [W1; W2]

x (B, N, C); W1 and W2 (O, C, K), where a product is the convolution of same padding, K odd, or
(O, C). Stored in the dtype of x, summed in float32 (float64 for float64), activated before g and u
are rounded. Kept for backward: x, both weights, and [g, u] in one tensor: as much as `conv1d` and
`swiglu` keep.

A GPU's kernel writes y and [g, u] from the sums in its registers, where `swiglu` after `conv1d`
reads g and u once more; backward has one product for x_bar and one for both weights. A CPU calls
`conv1d`, `linear` and `swiglu`: there is no epilogue to join, and `jvp_rows` knows their products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _backends, _op
from mfmjt.kernels._op import Tensors
from mfmjt.kernels._second_order import of_reference
from mfmjt.kernels.conv1d import conv1d
from mfmjt.kernels.cpu.product import windows
from mfmjt.kernels.linear import linear
from mfmjt.kernels.swiglu import swiglu

__all__ = ["swiglu_product", "swiglu_product_ref"]


def swiglu_product_ref(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Compute `swiglu_product` in plain PyTorch; the definition of correct."""
    if gate_weight.ndim == 2:
        return F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight)
    padding = gate_weight.shape[2] // 2
    gate, up = (F.conv1d(x.mT, weight, padding=padding).mT for weight in (gate_weight, up_weight))
    return F.silu(gate) * up


def _windows_weight(gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Return both weights as one over windows, (2 O, K C)."""
    both = torch.cat((gate_weight, up_weight))
    return both if both.ndim == 2 else both.transpose(1, 2).flatten(1)


def _taps(weight: Tensor) -> int:
    return weight.shape[2] if weight.ndim == 3 else 1


def _activated(both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return silu(g) u, silu(g) and silu'(g) u of [g, u]."""
    gate, up = both.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    s = gate * sigmoid
    return s * up, s, (sigmoid + s * (1 - sigmoid)) * up


def _fwd(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = _windows_weight(gate_weight, up_weight)
    both = F.linear(windows(x, _taps(gate_weight)), weight).contiguous()
    y, _, _ = _activated(both.to(_op.work_dtype(x)))
    return y.to(x.dtype), both


def _jvp(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, x_dot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight, taps = _windows_weight(gate_weight, up_weight), _taps(gate_weight)
    both, work = F.linear(windows(x, taps), weight).contiguous(), _op.work_dtype(x)
    gate_dot, up_dot = F.linear(windows(x_dot, taps), weight).to(work).chunk(2, dim=-1)
    y, s, slope = _activated(both.to(work))
    return y.to(x.dtype), (slope * gate_dot + s * up_dot).to(x.dtype), both


def _bwd(
    y_bar: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    both: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    x_bar, gate_weight_bar, up_weight_bar = (x.new_empty(0) for _ in needs)
    work, taps = _op.work_dtype(x), _taps(gate_weight)
    _, s, slope = _activated(both.to(work))
    bar = (y_bar.to(work).repeat(1, 1, 2) * torch.cat((slope, s), dim=-1)).to(x.dtype)
    if needs[0]:
        turned = torch.cat((gate_weight, up_weight))
        turned = turned.flip(2).permute(1, 2, 0).flatten(1) if turned.ndim == 3 else turned.t()
        x_bar = F.linear(windows(bar, taps), turned).contiguous()
    if needs[1] or needs[2]:
        product = bar.flatten(0, 1).t() @ windows(x, taps).flatten(0, 1)
        if gate_weight.ndim == 3:
            product = product.unflatten(1, (taps, -1)).transpose(1, 2)
        halves = (half.clone(memory_format=torch.contiguous_format) for half in product.chunk(2))
        gate_weight_bar, up_weight_bar = halves
    return x_bar, gate_weight_bar, up_weight_bar


def _check(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    _op.check_tensors("swiglu_product", x=x, gate_weight=gate_weight, up_weight=up_weight)
    fits = gate_weight.ndim in (2, 3) and gate_weight.shape == up_weight.shape and x.ndim > 0
    fits = fits and (x.ndim == 3 or gate_weight.ndim == 2)
    fits = fits and x.shape[-1] == gate_weight.shape[1] and _taps(gate_weight) % 2 == 1
    fits = fits and x.device == gate_weight.device == up_weight.device
    if not fits:
        needs = (
            "x (B, N, C) and two weights alike (O, C, K) with K odd, or x (..., C) and (O, C), on "
            "one device"
        )
        named = {"x": x, "gate_weight": gate_weight, "up_weight": up_weight}
        _op.check(False, "swiglu_product", needs, **named)


_swiglu_product = _op.Op(
    "swiglu_product",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=swiglu_product_ref,
    autocasts="x and both weights of one floating dtype",
    streams=True,
    jvp_bwd=of_reference(swiglu_product_ref, _jvp, "y"),
)


def _fuses(x: Tensor) -> bool:
    """Return True where a kernel has the activation in its epilogue."""
    return _backends.AVAILABLE and (x.is_cuda or _backends.ON_CPU)


def _products(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Multiply all streams by their weights, all convolutions at once."""
    ys: dict[int, Tensor] = {}
    kinds: tuple[tuple[int, Callable[..., Any]], ...] = ((3, conv1d), (2, linear))
    for ndim, op in kinds:
        alike = [i for i, weight in enumerate(weights) if weight.ndim == ndim]
        if alike:
            given = tuple([xs[i] for i in alike]), tuple([weights[i] for i in alike])
            ys |= zip(alike, op(*given), strict=True)
    return tuple([ys[i] for i in range(len(xs))])


def swiglu_product(x: Tensors, gate_weight: Tensors, up_weight: Tensors) -> Tensors:
    """Return silu(x W1^T) (x W2^T), differentiable in both modes; autocasts as a product does.

    Args:
        x: `(B, N, C)`, or `(..., C)` for linear layers. Or a tuple of streams, and so are the
            weights; sizes may differ.
        gate_weight: W1, `(O, C, K)` of a convolution of same padding, K odd, or `(O, C)` of a
            linear layer; must not carry a tangent.
        up_weight: W2, likewise, of the same shape.

    Returns:
        `(B, N, O)`, or `(..., O)`; for a tuple of streams a tuple, on a GPU in one launch.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or K is even.
        NotImplementedError: A weight carries a tangent.
    """
    given: Any = (x, gate_weight, up_weight)
    xs, gates, ups = given if isinstance(x, tuple) else [(arg,) for arg in given]
    for stream in zip(xs, gates, ups, strict=True):
        _check(*stream)
    if _fuses(xs[0]):
        rows = [t if t.ndim == 3 else t.reshape(1, -1, t.shape[-1]) for t in xs]
        pairs = zip(_swiglu_product(tuple(rows), gates, ups), xs, strict=True)
        ys = tuple([y.view(*t.shape[:-1], y.shape[2]) for y, t in pairs])
    else:
        ys = swiglu(_products(xs, gates), _products(xs, ups))
    result: Any = ys if isinstance(x, tuple) else ys[0]
    found: Tensors = result
    return found
