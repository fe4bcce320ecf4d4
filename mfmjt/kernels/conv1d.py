"""Convolution along the tokens of channels-last sequences, same padding.

    value      y = x * W + b
    tangent    y_dot = x_dot * W
    cotangent  x_bar = y_bar * W flipped,  W_bar = correlation of x and y_bar,  b_bar = sum y_bar

x (B, N, C), W (O, C, K) as published, K odd; zeros beyond both ends. As for `linear`, the dual op
does two convolutions where PyTorch's forward mode does three, and keeps x and W alone.

A (B, N, C) tensor *is* a channels-last image of height one, so conv2d takes it as it lies and no
transpose is made. One thread of a Zen 4 server, float32, ms forward / forward and backward:
    (B, N, C -> O), K = 3      conv2d           conv1d, transposed   K shifted GEMMs   im2col
    (48, 80, 128 -> 256)        7.5 / 21.7      13.0 / 35.7          8.3 / 26.2        8.7 / 37.6
    (16, 250, 128 -> 256)       7.5 / 23.7      10.1 / 29.4          8.7 / 29.8        9.4 / 31.8
    (2, 250, 448 -> 1280)      19.9 / 58.6      19.1 / 58.9         22.9 / 77.6       22.7 / 61.5
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _ext, _op

__all__ = ["conv1d", "conv1d_ref"]


def conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Plain PyTorch `conv1d`; the definition of correct."""
    padding = dilation * (weight.shape[-1] // 2)
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, dilation=dilation)
    return y.transpose(1, 2)


def _image(x: Tensor) -> Tensor:
    """(B, N, C) as (B, C, 1, N), channels last."""
    return x.transpose(1, 2).unsqueeze(2)


def _sequence(x: Tensor) -> Tensor:
    """(B, C, 1, N) as (B, N, C)."""
    return x.squeeze(2).transpose(1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    image, filters = _image(x), weight.unsqueeze(2)
    y = F.conv2d(image, filters, bias, padding=(0, padding), dilation=(1, dilation))
    return _sequence(y)


def _jvp(
    x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    y = _convolve(x, weight, bias, dilation)
    return y.contiguous(), _convolve(x_dot, weight, None, dilation).contiguous()


def _fake(
    x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv1d(x, weight, bias, padding=padding, dilation=dilation).contiguous()


# (B, C, N) as vocoders have it, where the CPU has a kernel for few channels.
_fwd_op = _op.define(
    "conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt dilation) -> Tensor",
    _fwd,
    lambda x, weight, bias, dilation: x.new_empty(x.shape[0], weight.shape[0], x.shape[2]),
)
_jvp_op = _op.define(
    "conv1d_jvp(Tensor x, Tensor x_dot, Tensor weight, Tensor? bias, SymInt dilation) "
    "-> (Tensor, Tensor)",
    _jvp,
    _fake,
)


def _backward(
    ctx: Any, y_bar: Tensor | None, y_dot_bar: Tensor | None
) -> tuple[Tensor | None, ...]:
    y_bar = _op.refuse_gradient(y_bar, y_dot_bar)
    assert y_bar is not None
    x, weight = ctx.saved_tensors
    dilation = ctx.constants
    wants_x, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    x_bar, weight_bar, bias_bar = torch.ops.aten.convolution_backward(
        _image(y_bar),
        _image(x),
        weight.unsqueeze(2),
        [weight.shape[0]],
        [1, 1],
        [0, dilation * (weight.shape[-1] // 2)],
        [1, dilation],
        False,
        [0, 0],
        1,
        [wants_x, wants_weight, wants_bias],
    )
    return (
        _sequence(x_bar) if wants_x else None,
        None,
        weight_bar.squeeze(2) if wants_weight else None,
        bias_bar,
        None,
    )


_op.backward_of(
    _jvp_op,
    _backward,
    saves=lambda inputs, outputs: (inputs[0], inputs[2]),
    outputs=2,
    constants=lambda inputs: inputs[4],
)


def _is_vocoder_like(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """Few channels of many samples, channels-first: where the C++ kernel beats oneDNN.

    Below 2^16 elements the call of a library op costs more than is won.
    """
    return (
        x.device.type == "cpu"
        and x.numel() >= 2**16
        and not x.is_contiguous()
        and x.transpose(1, 2).is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and _ext.takes("conv1d_fwd", x.transpose(1, 2), weight, bias, dilation)
    )


def _fwd_backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dilation, (outs, _, taps) = ctx.constants, weight.shape
    bars = torch.ops.aten.convolution_backward(
        *(y_bar, x, weight, [outs], [1], [dilation * (taps // 2)], [dilation]),
        *(False, [0], 1, ctx.needs_input_grad[:3]),
    )
    return *bars, None


_op.backward_of(
    _fwd_op,
    _fwd_backward,
    saves=lambda inputs, outputs: inputs[:2],
    outputs=1,
    constants=lambda inputs: inputs[3],
)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Convolution along the tokens, differentiable in both modes; autocasts as PyTorch's does.

    Args:
        x: `(B, N, C)`.
        weight: `(O, C, K)`, K odd; must not carry a tangent.
        bias: `(O,)` or None; must not carry a tangent.
        dilation: Tokens between two taps.

    Returns:
        `(B, N, O)`; tokens before the first and after the last count as zero.

    Raises:
        ValueError: The shapes do not fit or K is even.
        NotImplementedError: weight or bias carries a tangent.
    """
    fits = x.ndim == 3 and weight.ndim == 3 and x.shape[2] == weight.shape[1]
    if not (fits and weight.shape[2] % 2 == 1):
        needs = "x (B, N, C) and weight (O, C, K) with K odd"
        _op.check(False, "conv1d", needs, x=x, weight=weight)
    if _op.use_reference():
        return conv1d_ref(x, weight, bias, dilation)
    _op.refuse_tangent("conv1d", weight=weight, bias=bias)
    x, x_dot = _op.split(x)
    if x_dot is None:
        if _is_vocoder_like(x, weight, bias, dilation):
            return _fwd_op(x.transpose(1, 2), weight, bias, dilation).transpose(1, 2)
        return _convolve(x, weight, bias, dilation)
    return _op.join(*_jvp_op(*_op.autocast(x, x_dot, weight, bias), dilation))
