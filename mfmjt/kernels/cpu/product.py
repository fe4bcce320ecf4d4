"""Products over windows of tokens with what ATen has; on a CPU, of weights as it likes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.kernels import _backends, precision
from mfmjt.kernels.cpu import winograd

__all__ = ["blocked", "product", "windows"]

_ROWS = 512  # for which a weight is arranged: tokens of a guided step


def blocked(data: Tensor) -> Tensor | None:
    """Return a weight (O, K, C) as this CPU multiplies it fastest; None if that is as it lies.

    With AVX-512 that is oneDNN's own layout, opaque; `torch.compile` calls this freezing, and the
    products are 1.2 to 1.7 times as fast in float32 as those of F.linear. With AVX2 they are 1.1
    times as slow, and three taps are for `winograd`.
    """
    if type(data) is not Tensor or not data.is_cpu or data.numel() == 0 or _backends.ON_CPU:
        return None
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        fits = data.shape[1] == 3 and data.dtype == torch.float32
        return winograd.transform(data) if fits else None
    if data.dtype not in {torch.float32, torch.bfloat16} - precision.SLOW:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(data.flatten(1), _ROWS)
    except (AttributeError, RuntimeError):  # not this build of PyTorch's
        return None


def product(x: Tensor, data: Tensor, arranged: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the windows of x (B, N, C) times a weight (O, K, C), with a bias (O,) or (N, O).

    Args:
        x: On any device.
        data: The weight.
        arranged: What `blocked` made of it, or None.
        bias: Added to the product, or None.
    """
    if precision.is_slow(x):
        return precision.in_float32(product, (x, data, None, bias), 1)
    if arranged is not None and not arranged.is_mkldnn:
        y = winograd.convolve(x, arranged)
        return y if bias is None else y.add_(bias)
    flat = bias if bias is not None and bias.ndim == 1 and bias.dtype == x.dtype else None
    # Rows of all samples in one matrix: matmul makes a product of each, and copies the weight.
    rows = windows(x, data.shape[1]).flatten(0, 1)
    if arranged is None or rows.shape[0] == 0:
        y = F.linear(rows, data.flatten(1), flat)
    else:
        y = torch.ops.mkldnn._linear_pointwise(rows, arranged, flat, "none", [], "")
    y = y.unflatten(0, x.shape[:2])
    return y if bias is None or flat is not None else y.add_(bias)


def windows(x: Tensor, taps: int, dilation: int = 1) -> Tensor:
    """Return the tokens around every token of (B, N, C), (B, N, K C); zeros beyond the ends."""
    if taps == 1:
        return x
    (batch, tokens, channels), reach = x.shape, dilation * (taps // 2)
    padded = F.pad(x, (0, 0, reach, reach))
    sample, token, channel = padded.stride()
    size, stride = (batch, tokens, taps, channels), (sample, token, dilation * token, channel)
    return padded.as_strided(size, stride).reshape(batch, tokens, taps * channels)
