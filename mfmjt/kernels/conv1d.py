"""Convolution along the tokens of channels-last sequences, same padding.

    value      y = x * W + b
    tangent    y_dot = x_dot * W
    cotangent  x_bar = y_bar * W flipped,  W_bar = correlation of x and y_bar,  b_bar = sum y_bar
    of both    x_dot_bar = y_dot_bar * W flipped, and W_bar has that of x_dot and y_dot_bar too

x (B, N, C), W (O, C, K) as published, K odd; zeros beyond both ends. As for `linear`, the dual op
does two convolutions where PyTorch's forward mode does three, and keeps x and W alone. Stored in
the dtype of x, summed in float32 (float64 for float64).

In Triton it is a matrix product without an im2col: rows are tokens, and the contraction runs over
taps and channels. A launch reads W as (K, O, C), a copy that moves 2 O C K elements. W_bar is a
product over tokens for each tap, cut into parts that are added up in a fixed order.

On a CPU, ATen does the work: a (B, N, C) tensor is a channels-last image of height one. ATen then
rearranges W, so its conv1d over transposes does it where W is larger than x and y together, and
without a tangent PyTorch keeps its own backward there. Else x_bar is a convolution too, and W_bar
one product of y_bar and the windows of x: together they take three quarters of ATen's time.

`fast=True` lets a CPU compute a value that nobody differentiates by Toom and Cook's method
(Winograd's, in one dimension): taps in segments of 4, outputs in tiles of 4, both taken at the
points 0, 1, -1, 1/2, -1/2, 2 and infinity. Kernels of 3, 7 and 11 taps cost 6, 13 and 20 products
for 4 outputs instead of 12, 28 and 44. A product is U V with V = B x and U = G w, an output A (U V)
and, with n terms in the longest sum (channels times segments), |error| <= (n + 13) eps R, where
R = |A| (|G| |w|) (|B| |x|): for white signals 4 times the error of a direct sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _backends, _jvp_rows, _op
from mfmjt.kernels._op import MaybeTensors, Tensors
from mfmjt.kernels.cpu import conv1d as _cpu
from mfmjt.kernels.cpu.product import windows

__all__ = ["conv1d", "conv1d_ref"]


def conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Compute `conv1d` in plain PyTorch; the definition of correct."""
    padding = dilation * (weight.shape[-1] // 2)
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, dilation=dilation)
    return y.transpose(1, 2)


def _image(x: Tensor) -> Tensor:
    """Return (B, N, C) as (B, C, 1, N), channels last."""
    return x.transpose(1, 2).unsqueeze(2)


def _sequence(x: Tensor) -> Tensor:
    """Return (B, C, 1, N) as (B, N, C)."""
    return x.squeeze(2).transpose(1, 2)


def _weight_is_larger(x: Tensor, weight: Tensor) -> bool:
    """Return True if the weight has more elements than what it reads and writes."""
    outs, channels, _ = weight.shape
    return weight.numel() > max(1, x.shape[0] * x.shape[1] * (channels + outs))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    if _weight_is_larger(x, weight):
        return conv1d_ref(x, weight, bias, dilation)
    return _filtered(x, weight.unsqueeze(2), bias, dilation)


def _filtered(x: Tensor, filters: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve with filters (O, C, 1, K) of an image."""
    padding = dilation * (filters.shape[-1] // 2)
    y = F.conv2d(_image(x), filters, bias, padding=(0, padding), dilation=(1, dilation))
    return _sequence(y)


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return _convolve(x, weight, bias, dilation).contiguous()


def _jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_dot: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    filters = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # once for both
    y = _filtered(x, filters, bias, dilation).contiguous()
    if x_dot is None:
        return y, torch.zeros_like(y)
    return y, _filtered(x_dot, filters, None, dilation).contiguous()


def _bwd(
    y_bar: Tensor, x: Tensor, weight: Tensor, dilation: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x_bar, weight_bar, bias_bar = (x.new_empty(0) for _ in needs)
    if needs[0]:
        x_bar = _x_bar(y_bar, weight, dilation)
    if needs[1]:
        weight_bar = _weight_bar(y_bar, x, weight.shape[2], dilation)
    if needs[2]:
        bias_bar = y_bar.sum((0, 1), dtype=_op.work_dtype(y_bar)).to(y_bar.dtype)
    return x_bar, weight_bar, bias_bar


def _jvp_bwd(
    y_bar: Tensor,
    y_dot_bar: Tensor,
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor,
    dilation: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_bar, weight_bar, bias_bar = _bwd(y_bar, x, weight, dilation, needs[:3])
    wanted = [needs[3], needs[1], False]
    x_dot_bar, of_x_dot, _ = _bwd(y_dot_bar, x_dot, weight, dilation, wanted)
    return x_bar, weight_bar.add_(of_x_dot), bias_bar, x_dot_bar


def _x_bar(y_bar: Tensor, weight: Tensor, dilation: int) -> Tensor:
    if _weight_is_larger(y_bar, weight.transpose(0, 1)):
        x = y_bar.new_empty(1).expand(*y_bar.shape[:2], weight.shape[1])  # values do not matter
        padding = dilation * (weight.shape[2] // 2)
        x_bar, _, _ = torch.ops.aten.convolution_backward(
            *(y_bar.transpose(1, 2), x.transpose(1, 2), weight, None),
            *([1], [padding], [dilation], False, [0], 1, [True, False, False]),
        )
        return x_bar.transpose(1, 2).contiguous()
    # Of a wide image ATen's convolution is up to 1.8 times as fast as its gradient.
    filters = weight.transpose(0, 1).flip(2).unsqueeze(2)
    return _filtered(y_bar, filters, None, dilation).contiguous()


def _weight_bar(y_bar: Tensor, x: Tensor, taps: int, dilation: int) -> Tensor:
    """Return a product of one tensor and the windows of the other, that of fewer channels."""
    outs, channels = y_bar.shape[2], x.shape[2]
    if channels <= outs:
        product = y_bar.reshape(-1, outs).t() @ windows(x, taps, dilation).flatten(0, 1)
        return product.view(outs, taps, channels).transpose(1, 2).contiguous()
    product = windows(y_bar, taps, dilation).flatten(0, 1).t() @ x.reshape(-1, channels)
    return product.view(taps, outs, channels).flip(0).permute(1, 2, 0).contiguous()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Leave a value to PyTorch, with its own gradient, where ours is not faster."""
    if _backends.AVAILABLE and (x.is_cuda or _backends.ON_CPU):
        return NotImplemented
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if learns and x.dtype == torch.float32 and not _weight_is_larger(x, weight):
        return NotImplemented
    return _convolve(x, weight, bias, dilation)


def _check(x: Tensor, weight: Tensor, bias: Any, dilation: int) -> None:
    _op.check_tensors("conv1d", {"bias": bias}, x=x, weight=weight)
    fits = x.ndim == 3 and weight.ndim == 3 and x.shape[2] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    # PyTorch's own does not notice another device: it gives whatever is in memory
    fits = fits and x.device == weight.device == (x if bias is None else bias).device
    if not (fits and weight.shape[2] % 2 == 1 and dilation >= 1):
        needs = f"x (B, N, C), bias (O,), dilation {dilation} >= 1, weight (O, C, K) with K odd"
        _op.check(False, "conv1d", needs, x=x, weight=weight, bias=bias)


_conv1d = _op.Op(
    "conv1d",
    _fwd,
    _jvp,
    _bwd,
    check=_check,
    reference=conv1d_ref,
    plain=_plain,
    autocasts="x, weight and bias of one floating dtype",
    streams=True,
    jvp_bwd=_jvp_bwd,
)


def conv1d(
    x: Tensors,
    weight: Tensors,
    bias: MaybeTensors = None,
    dilation: int = 1,
    *,
    fast: bool = False,
) -> Tensors:
    """Convolve along the tokens, differentiable in both modes; autocasts as PyTorch's does.

    Args:
        x: `(B, N, C)`. Or a tuple of streams, and so are weight and bias; sizes may differ.
        weight: `(O, C, K)`, K odd; must not carry a tangent.
        bias: `(O,)` or None; must not carry a tangent.
        dilation: Tokens between two taps, at least 1.
        fast: The value may err 4 times as much as a plain convolution in float32 does (above), if
            that saves time: on a CPU with AVX2, 16 channels or more, 3, 7, 11 or 15 taps, 512
            tokens or more. It then reads and writes `(B, C, N)`, so vocoders pass the transpose of
            that. No effect elsewhere, nor where a gradient or a tangent is wanted.

    Returns:
        `(B, N, O)`; tokens before the first and after the last count as zero. For a tuple of
        streams a tuple, on a GPU in one launch.

    Raises:
        ValueError: The shapes do not fit, K is even, the dilation is below 1, or dtypes differ.
        NotImplementedError: weight or bias carries a tangent.
    """
    if fast and isinstance(x, Tensor):
        _check(x, weight, bias, dilation)
        fast = _cpu.pays(x, weight, bias, dilation)
    return _jvp_rows.product(_cpu.fast if fast else _conv1d, x, weight, bias, dilation)
