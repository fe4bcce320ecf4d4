"""What the formulas of `joint_attention` and its CPU kernels share: padding, blocks, softmax.

Matmuls are PyTorch's, on blocks of heads and of query rows, so that no (N, M) matrix grows with N.
What lies between them is one pass over a block (`softmax`, `softmax_bar`; in C++ where built).
Where a CPU multiplies bfloat16 faster than float32, S, P, S_dot and W are rounded to it, as
PyTorch's own attention rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels import _native, precision
from mfmjt.kernels._op import work_dtype

__all__ = [
    "Heads",
    "additive",
    "joined",
    "multiplies_bfloat16",
    "parted",
    "softmax",
    "softmax_bar",
    "tangents",
    "valid_keys",
    "without_padding",
]

BLOCK = 2**21  # bytes of S in one block of heads and query rows: those of a cache

_softmax_in_cpp = _native.op("joint_attention_softmax")
_softmax_bar_in_cpp = _native.op("joint_attention_softmax_bar")


def valid_keys(keys: Sequence[Tensor], lengths: Sequence[Tensor | None]) -> Tensor | None:
    """Return a mask (B, M), True where a key counts; None where every key does."""
    if all(length is None for length in lengths):
        return None
    rows = []
    for key, length in zip(keys, lengths, strict=True):
        position = torch.arange(key.shape[1], device=key.device)
        limit = key.shape[1] if length is None else length.to(key.device)[:, None]
        rows.append((position < limit).expand(key.shape[0], -1))
    return torch.cat(rows, dim=1)


def without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return x (B, M, H, D) with zeros for padding, be it NaN: 0 * NaN must not reach a result."""
    return x if valid is None else torch.where(valid[:, :, None, None], x, 0)


def additive(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what masks S when added to it, (B, M).

    It is finite, so that a row without any key stays finite.
    """
    if valid is None:
        return None
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return bias.masked_fill_(~valid, torch.finfo(dtype).min)


def tangents(streams: Sequence[Tensor], dots: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Return the tangents of streams, zeros for those that are None; None if all are."""
    if all(dot is None for dot in dots):
        return None
    pairs = zip(streams, dots, strict=True)
    return [torch.zeros_like(x) if dot is None else dot for x, dot in pairs]


def joined(streams: Sequence[Tensor] | None, valid: Tensor | None = None) -> Any:
    """Return all tokens in one tensor (B, tokens, H, D), padding zero; None of None.

    Rows of a head are dense: PyTorch's flash attention for CPUs reads them as such, whatever the
    last stride says.

    Args:
        streams: (B, tokens, H, D) each.
        valid: Mask of the tokens that count.
    """
    if streams is None:
        return None
    x = streams[0] if len(streams) == 1 else torch.cat(tuple(streams), dim=1)
    return without_padding(x if x.stride(-1) == 1 else x.contiguous(), valid)


def parted(x: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """Return the streams of a tensor of all tokens, each in memory of its own."""
    if len(streams) == 1:
        return [x.contiguous()]
    parts = x.split([s.shape[1] for s in streams], dim=1)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def multiplies_bfloat16(like: Tensor) -> bool:
    """Return True for bfloat16 on a CPU that multiplies it faster than float32."""
    return like.dtype == torch.bfloat16 and like.is_cpu and torch.bfloat16 not in precision.SLOW


class Heads:
    """(B, tokens, H, D) tensors as the (B H, tokens, D) batches that bmm wants, and back.

    Attributes:
        dtype: Of the matmuls: bfloat16 where a CPU multiplies it faster, else that of sums. What
            lies between matmuls is computed in the dtype of sums all the same.
        block: Elements of a block of S.
    """

    def __init__(self, like: Tensor) -> None:
        self.batch, _, self.heads, self.width = like.shape
        self.dtype = torch.bfloat16 if multiplies_bfloat16(like) else work_dtype(like)
        self.block = max(1, BLOCK // self.dtype.itemsize)

    def gather(self, streams: Sequence[Tensor] | None, valid: Tensor | None = None) -> Any:
        """Return all tokens of the streams as batches, padding zero; None of None."""
        if streams is None:
            return None
        tokens = sum(x.shape[1] for x in streams)
        shape = (self.batch, self.heads, tokens, self.width)
        batches = torch.empty(shape, dtype=self.dtype, device=streams[0].device)
        for to, x in zip(batches.split([x.shape[1] for x in streams], dim=2), streams, strict=True):
            to.copy_(x.transpose(1, 2))
        if valid is not None:
            batches.masked_fill_(~valid[:, None, :, None], 0)
        return batches.flatten(0, 1)

    def scatter(
        self, x: Tensor, streams: Sequence[Tensor], valid: Tensor | None = None
    ) -> list[Tensor]:
        """Return batches as streams like these, padding zero."""
        whole = x.unflatten(0, (self.batch, self.heads)).transpose(1, 2)
        return parted(without_padding(whole.to(streams[0].dtype), valid), streams)

    def additive(self, valid: Tensor | None) -> Tensor | None:
        """Return what masks S when added to it, (B H, M)."""
        bias = additive(valid, self.dtype)
        return None if bias is None else bias.repeat_interleave(self.heads, 0)

    def without_mean(self, x: Tensor) -> Tensor:
        """Subtract the mean over tokens if it dominates.

        It shifts each row of S or S_dot by a constant, which softmax cancels; rows of W sum to
        zero, so that W v is the same. In bfloat16 it would cost the digits of the rest. A small
        mean stays: subtracting it would only round.
        """
        if self.dtype != torch.bfloat16:
            return x
        ones = x.new_ones(1, 1, x.shape[1]).expand(x.shape[0], 1, -1)  # matmuls sum faster
        total = torch.bmm(ones, x)
        large = 2 * total.abs() > torch.bmm(ones, x.abs())
        return x - total.mul_(large).div_(x.shape[1])

    def blocks(
        self, queries: int, keys: int, matrices: int, device: torch.device
    ) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Yield slices of heads and of rows, and buffers (heads, rows, M) for their matrices."""
        total = self.batch * self.heads
        rows = max(1, min(queries, self.block // keys))
        heads = max(1, min(total, self.block // (rows * keys)))
        buffer = torch.empty((matrices, heads * rows * keys), dtype=self.dtype, device=device)
        for head in range(0, total, heads):
            for row in range(0, queries, rows):
                shape = (min(heads, total - head), min(rows, queries - row), keys)
                parts = [x[: math.prod(shape)].view(shape) for x in buffer]
                yield slice(head, head + heads), slice(row, row + rows), parts


def _is_for_cpp(*scores: Tensor | None) -> bool:
    """Return True for what C++ turns: formulas run on any device, and with the extension off."""
    present = [s for s in scores if s is not None]
    return _native.in_use and present[0].is_cpu and _native.floats(*present)


def softmax(s: Tensor, s_dot: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Turn scores q k^T into P and, where given, their tangents into W, in place.

    Args:
        s: (G, R, M).
        s_dot: Likewise, or None.
        bias: (G, M), added to scale s, or None.
        scale: Factor of s and of s_dot.

    Returns:
        The log of each row's sum, (G, R).
    """
    if _softmax_in_cpp is not None and _is_for_cpp(s, s_dot):
        lse: Tensor = _softmax_in_cpp(s, s_dot, bias, scale)
        return lse
    p = s.to(work_dtype(s)).mul_(scale)
    if bias is not None:
        p.add_(bias[:, None])
    top = p.amax(-1, keepdim=True)
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    p.div_(total)
    if s_dot is not None:
        moved = s_dot.to(p.dtype).mul_(scale)
        center = (p * moved).sum(-1, keepdim=True)
        s_dot.copy_(moved.sub_(center).mul_(p))
    s.copy_(p)
    return total.log_().add_(top)[..., 0]


def softmax_bar(s: Tensor, p_bar: Tensor, bias: Tensor | None, lse: Tensor, scale: float) -> Tensor:
    """Turn scores q k^T into P, and the cotangent of P into that of the scores, in place.

    Args:
        s: (G, R, M).
        p_bar: Likewise.
        bias: (G, M), or None.
        lse: The log of each row's sum, (G, R).
        scale: Factor of s.

    Returns:
        P, which is s.
    """
    if _softmax_bar_in_cpp is not None and _is_for_cpp(s, p_bar):
        in_place: Tensor = _softmax_bar_in_cpp(s, p_bar, bias, lse, scale)
        return in_place
    p = s.to(work_dtype(s)).mul_(scale)
    if bias is not None:
        p.add_(bias[:, None])
    p.sub_(lse[..., None]).exp_()
    bar = p_bar.to(p.dtype)
    center = (p * bar).sum(-1, keepdim=True)
    p_bar.copy_(bar.sub_(center).mul_(p).mul_(scale))
    return s.copy_(p)
