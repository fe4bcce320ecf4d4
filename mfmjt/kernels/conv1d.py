"""Convolution along the tokens of channels-last sequences, same padding.

    value      y = x * W + b
    tangent    y_dot = x_dot * W
    cotangent  x_bar = y_bar * W flipped,  W_bar = correlation of x and y_bar,  b_bar = sum y_bar

x (B, N, C), W (O, C, K) as published, K odd; zeros beyond both ends. As for `linear`, the dual op
does two convolutions where PyTorch's forward mode does three, and keeps x and W alone. Stored in
the dtype of x, summed in float32 (float64 for float64).

In Triton it is a matrix product without an im2col: rows are tokens, and the contraction runs over
taps and channels. A launch reads W as (K, O, C), a copy that moves 2 O C K elements. W_bar is a
product over tokens for each tap, cut into parts that are added up in a fixed order.

On a CPU, ATen does the work: a (B, N, C) tensor is a channels-last image of height one. ATen then
rearranges W, so its conv1d over transposes does it where W is larger than x and y together. W_bar
is one product of y_bar and the windows of x. Without a tangent PyTorch keeps its own backward.

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

from mfmjt.kernels import _jvp_rows, _native, _op, _triton, _tuning
from mfmjt.kernels._triton import cdiv, jit, tl

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


def _filters_over_activations(x: Tensor, weight: Tensor) -> float:
    """Elements of the filters over those of what they read and write."""
    outs, channels, _ = weight.shape
    return weight.numel() / max(1, x.shape[0] * x.shape[1] * (channels + outs))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    if _filters_over_activations(x, weight) > 1:
        return conv1d_ref(x, weight, bias, dilation)
    return _filtered(x, weight.unsqueeze(2), bias, dilation)


def _filtered(x: Tensor, filters: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The same by filters (O, C, 1, K) of an image."""
    padding = dilation * (filters.shape[-1] // 2)
    y = F.conv2d(_image(x), filters, bias, padding=(0, padding), dilation=(1, dilation))
    return _sequence(y)


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return _convolve(x, weight, bias, dilation).contiguous()


def _jvp(
    x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    filters = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # once for both
    y, y_dot = _filtered(x, filters, bias, dilation), _filtered(x_dot, filters, None, dilation)
    return y.contiguous(), y_dot.contiguous()


def _bwd_x(y_bar: Tensor, weight: Tensor, dilation: int) -> Tensor:
    x = y_bar.new_empty(1).expand(*y_bar.shape[:2], weight.shape[1])  # its values do not matter
    padding = dilation * (weight.shape[2] // 2)
    if _filters_over_activations(y_bar, weight) > 1:
        x_bar, _, _ = torch.ops.aten.convolution_backward(
            *(y_bar.transpose(1, 2), x.transpose(1, 2), weight, None),
            *([1], [padding], [dilation], False, [0], 1, [True, False, False]),
        )
        return x_bar.transpose(1, 2).contiguous()
    x_bar, _, _ = torch.ops.aten.convolution_backward(
        *(_image(y_bar), _image(x), weight.unsqueeze(2), None),
        *([1, 1], [0, padding], [1, dilation], False, [0, 0], 1, [True, False, False]),
    )
    return _sequence(x_bar).contiguous()


def _bwd_weight(y_bar: Tensor, x: Tensor, taps: int, dilation: int) -> Tensor:
    outs, channels = y_bar.shape[2], x.shape[2]
    if channels <= outs:
        product = y_bar.reshape(-1, outs).t() @ _windows(x, taps, dilation)
        return product.view(outs, taps, channels).transpose(1, 2).contiguous()
    product = _windows(y_bar, taps, dilation).t() @ x.reshape(-1, channels)
    return product.view(taps, outs, channels).flip(0).permute(1, 2, 0).contiguous()


def _windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """Each token's K neighbours in a row, (B N, K C)."""
    (samples, tokens, channels), reach = x.shape, dilation * (taps // 2)
    x = F.pad(x, (0, 0, reach, reach)).contiguous()
    strides = (x.stride(0), channels, dilation * channels, 1)
    windows = x.as_strided((samples, tokens, taps, channels), strides)
    return windows.reshape(samples * tokens, taps * channels)


@jit
def _conv1d_fwd_kernel(
    x,
    x_dot,  # None where no tangent is wanted
    weight,  # (taps, outs, channels), contiguous
    bias,  # None, or added to y alone
    y,  # (rows, outs), contiguous
    y_dot,
    n_rows,
    tokens,
    channels,
    outs,
    taps,
    dilation,  # negative for the gradient
    x_sample,
    x_token,
    x_dot_sample,
    x_dot_token,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs of one block of rows are neighbours: they read the same x.
    out_blocks = tl.cdiv(outs, BLOCK_OUTS)
    block = tl.program_id(0) // out_blocks
    source, source_sample, source_token, result = x, x_sample, x_token, y
    if x_dot is not None:
        value_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
        is_dot = block >= value_blocks
        block = tl.where(is_dot, block - value_blocks, block)
        source = tl.where(is_dot, x_dot, x)
        source_sample = tl.where(is_dot, x_dot_sample, x_sample)
        source_token = tl.where(is_dot, x_dot_token, x_token)
        result = tl.where(is_dot, y_dot, y)

    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sample = row // tokens
    token = row - sample * tokens
    first = source + (sample * source_sample + token * source_token)[:, None]
    token = token.to(tl.int32)
    out = (tl.program_id(0) % out_blocks) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    filters = weight + out[None, :].to(tl.int64) * channels

    total = tl.zeros(
        (BLOCK_ROWS, BLOCK_OUTS), tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    )
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    # One loop over taps and channels, so that loads run ahead from one tap to the next.
    for step in range(taps * channel_blocks):
        tap = step // channel_blocks
        channel = (step % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        shift = (tap - taps // 2) * dilation
        at = token + shift
        inside = (row < n_rows) & (at >= 0) & (at < tokens)
        moved = first + (shift.to(tl.int64) * source_token + channel)[None, :]
        a = tl.load(moved, inside[:, None] & (channel < channels)[None, :], 0.0)
        filter = filters + (tap.to(tl.int64) * outs * channels + channel)[:, None]
        b = tl.load(filter, (channel < channels)[:, None] & (out < outs)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)

    if bias is not None:
        biased = outs
        if x_dot is not None:
            biased = tl.where(is_dot, 0, outs)
        total += tl.load(bias + out, out < biased, 0.0).to(total.dtype)[None, :]
    inside = (row < n_rows)[:, None] & (out < outs)[None, :]
    tl.store(result + row[:, None] * outs + out[None, :], total, inside)


@jit
def _conv1d_bwd_weight_kernel(
    y_bar,
    x,
    parts,  # (splits, taps, outs, channels), contiguous, in the dtype of sums
    samples,
    tokens,
    channels,
    outs,
    taps,
    dilation,
    y_sample,
    y_token,
    x_sample,
    x_token,
    steps,  # blocks of tokens that one split adds up
    BLOCK_OUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    out = (tl.program_id(0) // channel_blocks) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    tap, split = tl.program_id(1), tl.program_id(2)
    shift = (tap - taps // 2) * dilation
    total = tl.zeros((BLOCK_OUTS, BLOCK_CHANNELS), parts.dtype.element_ty)
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    last = tl.minimum((split + 1) * steps, samples * token_blocks)
    for step in range(split * steps, last):
        sample = (step // token_blocks).to(tl.int64)
        token = (step % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        at = token + shift
        from_y = y_bar + sample * y_sample + token[None, :].to(tl.int64) * y_token
        from_x = x + sample * x_sample + at[:, None].to(tl.int64) * x_token
        inside = (token < tokens) & (at >= 0) & (at < tokens)
        a = tl.load(from_y + out[:, None], (out < outs)[:, None] & inside[None, :], 0.0)
        b = tl.load(from_x + channel[None, :], inside[:, None] & (channel < channels)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    part = (split.to(tl.int64) * taps + tap) * outs + out[:, None]
    inside = (out < outs)[:, None] & (channel < channels)[None, :]
    tl.store(parts + part * channels + channel[None, :], total, inside)


def _vectors(x: Tensor) -> Tensor:
    """X itself where its channels are whole vectors in memory, else a copy padded by zeros.

    Element by element a tile takes more registers than there are and many times as long: one more
    pass over x is cheap. The network's own 20 channels of latent are the case that matters.
    """
    samples, tokens, channels = x.shape
    starts = [stride for n, stride in zip(x.shape, x.stride()[:2], strict=False) if n > 1]
    dense = x.stride(2) == 1 and channels % 16 == 0 and all(start % 16 == 0 for start in starts)
    if dense and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(samples, tokens, cdiv(channels, 16) * 16)
    padded[..., :channels] = x
    return padded


def _starts(x: Tensor) -> list[int]:
    """Strides of samples and of tokens; 0 where there is only one, so that it counts as aligned."""
    return [stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride()[:2], strict=False)]


def _precision() -> str:
    """How float32 is multiplied: in full on AMD, by three products in tf32, as exact, elsewhere."""
    return "ieee" if _triton.target()[0] == "hip" else "tf32x3"


def _no_matrix_units(x: Tensor) -> bool:
    """float64 on a GPU is left to PyTorch: no network trains in it."""
    return x.dtype == torch.float64 and not _triton.INTERPRETED


def _launch(
    xs: tuple[Tensor, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    ys: tuple[Tensor, Tensor | None],
    dilation: int,
) -> None:
    """Convolve x and, if there is one, x_dot with `weight`, (K, O, C)."""
    if ys[0].numel() == 0:
        return
    x, x_dot = _vectors(xs[0]), None if xs[1] is None else _vectors(xs[1])
    weight = _vectors(weight.contiguous())
    (samples, tokens, channels), (taps, outs, _) = x.shape, weight.shape
    n_rows = samples * tokens
    kinds = 1 if x_dot is None else 2
    blocks, num_warps, num_stages = _tuning.conv1d(kinds * n_rows, outs, x.element_size())
    block_rows, block_outs, block_channels = blocks
    starts = (*_starts(x), *((0, 0) if x_dot is None else _starts(x_dot)))
    _conv1d_fwd_kernel[(kinds * cdiv(n_rows, block_rows) * cdiv(outs, block_outs),)](
        *(x, x_dot, weight, bias, *ys),
        *(n_rows, tokens, channels, outs, taps, dilation, *starts),
        BLOCK_ROWS=block_rows,
        BLOCK_OUTS=block_outs,
        BLOCK_CHANNELS=block_channels,
        PRECISION=_precision(),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _fwd_triton(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    if _no_matrix_units(x):
        return _fwd(x, weight, bias, dilation)
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    _launch((x, None), weight.permute(2, 0, 1), bias, (y, None), dilation)
    return y


def _jvp_triton(
    x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    if _no_matrix_units(x):
        return _jvp(x, x_dot, weight, bias, dilation)
    y, y_dot = (x.new_empty(*x.shape[:2], weight.shape[0]) for _ in range(2))
    _launch((x, x_dot), weight.permute(2, 0, 1), bias, (y, y_dot), dilation)
    return y, y_dot


def _bwd_x_triton(y_bar: Tensor, weight: Tensor, dilation: int) -> Tensor:
    if _no_matrix_units(y_bar):
        return _bwd_x(y_bar, weight, dilation)
    x_bar = y_bar.new_empty(*y_bar.shape[:2], weight.shape[1])
    _launch((y_bar, None), weight.permute(2, 1, 0), None, (x_bar, None), -dilation)
    return x_bar


def _bwd_weight_triton(y_bar: Tensor, x: Tensor, taps: int, dilation: int) -> Tensor:
    if _no_matrix_units(x):
        return _bwd_weight(y_bar, x, taps, dilation)
    shape = (y_bar.shape[2], x.shape[2], taps)
    if x.numel() == 0 or y_bar.numel() == 0:
        return x.new_zeros(shape)
    y_bar, x = _vectors(y_bar), _vectors(x)
    (samples, tokens, channels), outs = x.shape, y_bar.shape[2]
    blocks, num_warps, num_stages, splits = _tuning.conv1d_weight(
        samples, tokens, outs, channels, taps, x.element_size()
    )
    block_outs, block_channels, block_tokens = blocks
    parts = x.new_empty(splits, taps, outs, channels, dtype=_op.work_dtype(x))
    grid = (cdiv(outs, block_outs) * cdiv(channels, block_channels), taps, splits)
    _conv1d_bwd_weight_kernel[grid](
        *(y_bar, x, parts, samples, tokens, channels, outs, taps, dilation),
        *(*_starts(y_bar), *_starts(x), cdiv(samples * cdiv(tokens, block_tokens), splits)),
        BLOCK_OUTS=block_outs,
        BLOCK_CHANNELS=block_channels,
        BLOCK_TOKENS=block_tokens,
        PRECISION=_precision(),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    whole = parts.sum(0)[:, : shape[0], : shape[1]]
    return x.new_empty(shape).copy_(whole.permute(1, 2, 0))


def _fwd_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


_fwd_op = _op.define(
    "conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt dilation) -> Tensor",
    _fwd,
    _fwd_fake,
    cpu=_fwd,
    triton=_fwd_triton,
)
_jvp_op = _op.define(
    "conv1d_jvp(Tensor x, Tensor x_dot, Tensor weight, Tensor? bias, SymInt dilation) "
    "-> (Tensor, Tensor)",
    _jvp,
    lambda x, x_dot, *others: (_fwd_fake(x, *others), _fwd_fake(x, *others)),
    triton=_jvp_triton,
)
_bwd_x_op = _op.define(
    "conv1d_bwd_x(Tensor y_bar, Tensor weight, SymInt dilation) -> Tensor",
    _bwd_x,
    lambda y_bar, weight, dilation: y_bar.new_empty(*y_bar.shape[:2], weight.shape[1]),
    triton=_bwd_x_triton,
)
_bwd_weight_op = _op.define(
    "conv1d_bwd_weight(Tensor y_bar, Tensor x, SymInt taps, SymInt dilation) -> Tensor",
    _bwd_weight,
    lambda y_bar, x, taps, dilation: x.new_empty(y_bar.shape[2], x.shape[2], taps),
    triton=_bwd_weight_triton,
)


def _backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cotangents of x, weight and bias; bias is the last argument but one of an op."""
    x, weight = ctx.saved_tensors
    dilation, wants = ctx.constants, ctx.needs_input_grad
    work = _op.work_dtype(y_bar)
    return (
        _bwd_x_op(y_bar, weight, dilation) if wants[0] else None,
        _bwd_weight_op(y_bar, x, weight.shape[2], dilation) if wants[-3] else None,
        y_bar.sum((0, 1), dtype=work).to(y_bar.dtype) if wants[-2] else None,
    )


def _jvp_backward(
    ctx: Any, y_bar: Tensor | None, y_dot_bar: Tensor | None
) -> tuple[Tensor | None, ...]:
    y_bar = _op.refuse_gradient(y_bar, y_dot_bar)
    assert y_bar is not None
    x_bar, weight_bar, bias_bar = _backward(ctx, y_bar)
    return x_bar, None, weight_bar, bias_bar, None


_op.backward_of(
    _fwd_op,
    lambda ctx, y_bar: (*_backward(ctx, y_bar), None),
    saves=lambda inputs, outputs: inputs[:2],
    outputs=1,
    constants=lambda inputs: inputs[3],
)
_op.backward_of(
    _jvp_op,
    _jvp_backward,
    saves=lambda inputs, outputs: (inputs[0], inputs[2]),
    outputs=2,
    constants=lambda inputs: inputs[4],
)


# The value by Toom and Cook's method; for inference, hence without a backward.


def _toom(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve (B, C, N) to (B, O, N)."""
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv1d(x, weight, bias, padding=padding, dilation=dilation).contiguous()


_toom_op = _op.define(
    "conv1d_toom(Tensor x, Tensor weight, Tensor? bias, SymInt dilation) -> Tensor",
    _toom,
    lambda x, weight, bias, dilation: x.new_empty(x.shape[0], weight.shape[0], x.shape[2]),
    cpu=_native.kernel("conv1d_toom", _toom),
)


def _pays_to_be_fast(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> bool:
    """Return whether no gradient is wanted and samples make up for transforming the weights."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and x.shape[1] >= 512
        and x.numel() >= 2**16
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not torch.is_autocast_enabled("cpu")
        and _native.takes("conv1d_toom", x.transpose(1, 2), weight, bias, dilation)
    )


def _check_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    needs = "x, weight and bias of one floating dtype"
    fits = alike and x.is_floating_point()
    _op.check(fits, "conv1d", needs, x=x, weight=weight, bias=bias)


def _value(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, fast: bool) -> Tensor:
    if fast and _pays_to_be_fast(x, weight, bias, dilation):
        return _toom_op(x.transpose(1, 2), weight, bias, dilation).transpose(1, 2)
    if _triton.AVAILABLE and (x.is_cuda or _triton.ON_CPU):
        x, weight, bias = _op.autocast(x, weight, bias)
        _check_alike(x, weight, bias)
        return _fwd_op(x, weight, bias, dilation)
    return _convolve(x, weight, bias, dilation)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    fast: bool = False,
) -> Tensor:
    """Convolution along the tokens, differentiable in both modes; autocasts as PyTorch's does.

    Args:
        x: `(B, N, C)`.
        weight: `(O, C, K)`, K odd; must not carry a tangent.
        bias: `(O,)` or None; must not carry a tangent.
        dilation: Tokens between two taps, at least 1.
        fast: The value may err 4 times as much as a plain convolution in float32 does (above), if
            that saves time: on a CPU with AVX2, 16 channels or more, 3, 7, 11 or 15 taps, 512
            tokens or more. It then reads and writes `(B, C, N)`, so vocoders pass the transpose of
            that. No effect elsewhere, nor where a gradient or a tangent is wanted.

    Returns:
        `(B, N, O)`; tokens before the first and after the last count as zero.

    Raises:
        ValueError: The shapes do not fit, K is even, the dilation is below 1, or dtypes differ.
        NotImplementedError: weight or bias carries a tangent.
    """
    _op.check_tensors("conv1d", {"bias": bias}, x=x, weight=weight)
    fits = x.ndim == 3 and weight.ndim == 3 and x.shape[2] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    # PyTorch's own does not notice another device: it gives whatever is in memory
    fits = fits and x.device == weight.device == (x if bias is None else bias).device
    if not (fits and weight.shape[2] % 2 == 1 and dilation >= 1):
        needs = f"x (B, N, C), bias (O,), dilation {dilation} >= 1, weight (O, C, K) with K odd"
        _op.check(False, "conv1d", needs, x=x, weight=weight, bias=bias)
    if _op.use_reference():
        return conv1d_ref(x, weight, bias, dilation)

    def run(values: Any, dots: Any) -> Any:
        x, weight, bias = values
        y = _jvp_rows.known(weight, (*x.shape[:2], weight.shape[0]))
        if y is not None:
            of_dot = None if dots is None else _op.autocast(dots[0], weight)
            return (y,) if of_dot is None else (y, _fwd_op(*of_dot, None, dilation))
        if dots is None:
            return (_jvp_rows.made(weight, _value(x, weight, bias, dilation, fast)),)
        x, x_dot, weight, bias = _op.autocast(x, dots[0], weight, bias)
        _check_alike(x, weight, bias)
        return _jvp_op(x, x_dot, weight, bias, dilation)

    return _op.dual(run, (x,), "conv1d", {"weight": weight, "bias": bias})[0]
