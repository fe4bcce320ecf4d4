"""Triton kernels of `conv1d`: value, value with tangent, and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, target, tl, tuning

__all__ = ["bwd", "fwd", "jvp"]


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
    return "ieee" if target()[0] == "hip" else "tf32x3"


def _no_matrix_units(x: Tensor) -> bool:
    """float64 on a GPU is left to PyTorch: no network trains in it."""
    return x.dtype == torch.float64 and not INTERPRETED


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
    blocks, num_warps, num_stages = tuning.conv1d(kinds * n_rows, outs, x.element_size())
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


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Any:
    """Launch the value."""
    if _no_matrix_units(x):
        return NotImplemented
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    _launch((x, None), weight.permute(2, 0, 1), bias, (y, None), dilation)
    return y


def jvp(x: Tensor, weight: Tensor, bias: Tensor | None, x_dot: Tensor | None, dilation: int) -> Any:
    """Launch value and tangent."""
    if _no_matrix_units(x) or x_dot is None:
        return NotImplemented
    y, y_dot = (x.new_empty(*x.shape[:2], weight.shape[0]) for _ in range(2))
    _launch((x, x_dot), weight.permute(2, 0, 1), bias, (y, y_dot), dilation)
    return y, y_dot


def bwd(y_bar: Tensor, x: Tensor, weight: Tensor, dilation: int, needs: list[bool]) -> Any:
    """Launch the gradients that are needed."""
    if _no_matrix_units(x):
        return NotImplemented
    x_bar, weight_bar, bias_bar = (x.new_empty(0) for _ in needs)
    if needs[0]:
        x_bar = y_bar.new_empty(x.shape)
        _launch((y_bar, None), weight.permute(2, 1, 0), None, (x_bar, None), -dilation)
    if needs[1]:
        weight_bar = _bwd_weight(y_bar, x, weight.shape[2], dilation)
    if needs[2]:
        bias_bar = y_bar.sum((0, 1), dtype=work_dtype(x)).to(x.dtype)
    return x_bar, weight_bar, bias_bar


def _bwd_weight(y_bar: Tensor, x: Tensor, taps: int, dilation: int) -> Tensor:
    shape = (y_bar.shape[2], x.shape[2], taps)
    if x.numel() == 0 or y_bar.numel() == 0:
        return x.new_zeros(shape)
    y_bar, x = _vectors(y_bar), _vectors(x)
    (samples, tokens, channels), outs = x.shape, y_bar.shape[2]
    blocks, num_warps, num_stages, splits = tuning.conv1d_weight(
        samples, tokens, outs, channels, taps, x.element_size()
    )
    block_outs, block_channels, block_tokens = blocks
    parts = x.new_empty(splits, taps, outs, channels, dtype=work_dtype(x))
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
