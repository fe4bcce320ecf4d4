"""What the formulas of `joint_attention` and its CPU kernels share: masks, blocks, softmax.

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
    "Hidden",
    "additive",
    "cleaned",
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
BLOCK_OF_GPU = 2**28  # there a block is some launches, and should fill the device
CAUSAL_ROWS = 64  # of a block where later keys are skipped

_INFINITY = float("inf")

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


def cleaned(
    keys: Tensor | None, values: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return keys and values (G, M, D) with zeros for NaN and infinity, and where those were.

    A hidden key must not reach a result by 0 * NaN in a product. Which keys were not finite,
    (G, M, 1), is None where all were; the scores of such a key are to be NaN, for whoever sees it.
    """
    given = [x for x in (keys, values) if x is not None]
    if all(bool(x.sum().isfinite()) for x in given):  # a sum shows what is not
        return keys, values, None
    bad = [~x.isfinite() for x in given]
    clean = iter([x.masked_fill(b, 0) for x, b in zip(given, bad, strict=True)])
    keys, values = (None if x is None else next(clean) for x in (keys, values))
    marks = torch.stack([b.any(-1, keepdim=True) for b in bad]).any(0)
    return keys, values, marks


class Heads:
    """(B, tokens, H, D) tensors as the (G, rows, D) batches that bmm wants, and back.

    G counts pairs of a sample and a head of keys, of which there may be fewer than of queries: the
    rows of all queries' heads that share keys then follow one another.

    Attributes:
        dtype: Of the matmuls: bfloat16 where a CPU multiplies it faster, else that of sums. What
            lies between matmuls is computed in the dtype of sums all the same.
        heads: Of keys.
        groups: Heads of queries for each of keys.
        block: Elements of a block of S.
    """

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.batch, _, self.heads, _ = keys.shape
        self.device = keys.device
        self.groups = queries.shape[2] // self.heads
        self.dtype = torch.bfloat16 if multiplies_bfloat16(queries) else work_dtype(queries)
        self.block = max(1, (BLOCK if keys.is_cpu else BLOCK_OF_GPU) // self.dtype.itemsize)

    def gather(self, streams: Sequence[Tensor] | None, valid: Tensor | None = None) -> Any:
        """Return all tokens of the streams as batches, padding zero; None of None."""
        if streams is None:
            return None
        tokens = sum(x.shape[1] for x in streams)
        heads, width = streams[0].shape[2:]
        shape = (self.batch, heads, tokens, width)
        batches = torch.empty(shape, dtype=self.dtype, device=streams[0].device)
        for to, x in zip(batches.split([x.shape[1] for x in streams], dim=2), streams, strict=True):
            to.copy_(x.transpose(1, 2))
        if valid is not None:
            batches.masked_fill_(~valid[:, None, :, None], 0)
        return batches.view(self.batch * self.heads, heads // self.heads * tokens, width)

    def scatter(
        self, x: Tensor, streams: Sequence[Tensor], valid: Tensor | None = None
    ) -> list[Tensor]:
        """Return batches as streams like these, padding zero."""
        heads, tokens = streams[0].shape[2], sum(s.shape[1] for s in streams)
        whole = x.view(self.batch, heads, tokens, x.shape[-1]).transpose(1, 2)
        return parted(without_padding(whole.to(streams[0].dtype), valid), streams)

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

    def is_one_block(self, queries: int, keys: int, causal: bool) -> bool:
        """Return True if `blocks` takes all rows of a pair at a time."""
        return self.groups == 1 and not causal and queries * keys <= self.block

    def blocks(
        self, queries: int, keys: int, matrices: int, causal: bool
    ) -> Iterator[tuple[slice, slice, int, list[Tensor]]]:
        """Yield slices of pairs and of rows, keys from the first on, and buffers for matrices.

        The rows of a block are of one head of queries. The keys are all, or, in causal order, those
        that a row sees. The buffers are (pairs, rows, keys).
        """
        total = self.batch * self.heads
        rows = max(1, min(queries, self.block // keys, CAUSAL_ROWS if causal else queries))
        pairs = max(1, min(total, self.block // (rows * keys)))
        buffer = torch.empty((matrices, pairs * rows * keys), dtype=self.dtype, device=self.device)
        for pair in range(0, total, pairs):
            for group in range(0, self.groups * queries, queries) if queries else ():
                for row in range(0, queries, rows):
                    last = min(row + rows, queries)
                    seen = min(last, keys) if causal else keys
                    shape = (min(pairs, total - pair), last - row, seen)
                    parts = [x[: math.prod(shape)].view(shape) for x in buffer]
                    block = slice(group + row, group + last)
                    yield slice(pair, pair + shape[0]), block, seen, parts


class Hidden:
    """What hides keys from queries, or adds to scores: a mask, padding, causal order.

    Args:
        heads: The batches.
        mask: (B or 1, H or 1, N or 1, M or 1), False or -inf for what is hidden; or None.
        valid: (B, M), False for padding; or None.
        causal: Key j is hidden from query i where j > i.
        queries: N.
    """

    def __init__(
        self, heads: Heads, mask: Tensor | None, valid: Tensor | None, causal: bool, queries: int
    ) -> None:
        self.heads, self.mask, self.valid = heads, mask, valid
        self.causal, self.queries, self.device = causal, queries, heads.device

    def block(self, pairs: slice, rows: slice, keys: int) -> Tensor | None:
        """Return what is added to scale S of a block, -inf for what is hidden; None for nothing.

        Its axes are those of the block, or 1 where it is the same all along; keys are always all.
        """
        bias = self._masked(pairs, rows, keys)
        if self.valid is not None:
            hidden = ~self.valid[self._pairs(pairs) // self.heads.heads, None, :keys]
            bias = hidden.new_zeros(hidden.shape, dtype=self.heads.dtype) if bias is None else bias
            bias = bias.masked_fill(hidden, -_INFINITY)
        if self.causal:
            first, count = rows.start % self.queries, rows.stop - rows.start
            row = torch.arange(first, first + count, device=self.device)[:, None]
            later = (row < torch.arange(keys, device=self.device))[None]
            bias = later.new_zeros(later.shape, dtype=self.heads.dtype) if bias is None else bias
            bias = bias.masked_fill(later, -_INFINITY)
        return None if bias is None else bias.expand(-1, -1, keys).contiguous()

    def add_gradient(
        self, mask_bar: Tensor, s_bar: Tensor, pairs: slice, rows: slice, scale: float
    ) -> None:
        """Add a block's part to the gradient of the mask; s_bar is that of S, scale included."""
        sizes, part = mask_bar.shape, s_bar.to(mask_bar.dtype) / scale
        part = part if sizes[2] > 1 else part.sum(1, keepdim=True)
        part = part if sizes[3] > 1 else part.sum(2, keepdim=True)
        to = self._part_of(mask_bar, rows, s_bar.shape[2])
        for one, pair in zip(part, range(pairs.start, pairs.stop), strict=True):
            sample, head = self._of(mask_bar, pair, rows)
            to[sample, head] += one

    def _pairs(self, pairs: slice) -> Tensor:
        return torch.arange(pairs.start, pairs.stop, device=self.device)

    def _of(self, mask: Tensor, pair: Any, rows: slice) -> tuple[Any, Any]:
        """Return where a mask has the sample and the queries' head of a pair."""
        heads, groups = self.heads.heads, self.heads.groups
        head = pair % heads * groups + rows.start // self.queries
        return pair // heads * (mask.shape[0] > 1), head * (mask.shape[1] > 1)

    def _part_of(self, mask: Tensor, rows: slice, keys: int) -> Tensor:
        """Return the rows and keys of a block."""
        first = rows.start % self.queries
        row = slice(first, first + rows.stop - rows.start) if mask.shape[2] > 1 else slice(None)
        return mask[:, :, row, : min(keys, mask.shape[3])]

    def _masked(self, pairs: slice, rows: slice, keys: int) -> Tensor | None:
        if self.mask is None:
            return None
        part = self._part_of(self.mask, rows, keys)
        same = self.mask.shape[0] == self.mask.shape[1] == 1
        part = part[0] if same else part[self._of(self.mask, self._pairs(pairs), rows)]
        if part.dtype != torch.bool:
            return part.to(self.heads.dtype)
        zeros = part.new_zeros(part.shape, dtype=self.heads.dtype)
        return zeros.masked_fill_(~part, -_INFINITY)


def _is_for_cpp(*scores: Tensor | None) -> bool:
    """Return True for what C++ turns: formulas run on any device, and with the extension off."""
    present = [s for s in scores if s is not None]
    return _native.in_use and present[0].is_cpu and _native.floats(*present)


def softmax(s: Tensor, s_dot: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Turn scores q k^T into P and, where given, their tangents into W, in place.

    Args:
        s: (G, R, M).
        s_dot: Likewise, or None.
        bias: (G or 1, R or 1, M), added to scale s, or None. Where it is -inf P and W are zero,
            whatever the scores are.
        scale: Factor of s and of s_dot.

    Returns:
        The log of each row's sum, (G, R); zero where all is hidden.
    """
    if _softmax_in_cpp is not None and _is_for_cpp(s, s_dot):
        lse: Tensor = _softmax_in_cpp(s, s_dot, bias, scale)
        return lse
    p, hidden = _biased(s, bias, scale)
    top = p.amax(-1, keepdim=True)
    if hidden is not None:
        top.masked_fill_(top == -_INFINITY, 0)
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    if hidden is not None:
        total.masked_fill_(total == 0, 1)
    p.div_(total)
    if s_dot is not None:
        moved = s_dot.to(p.dtype).mul_(scale)
        if hidden is not None:
            moved.masked_fill_(hidden, 0)
        center = (p * moved).sum(-1, keepdim=True)
        s_dot.copy_(moved.sub_(center).mul_(p))
    s.copy_(p)
    return total.log_().add_(top)[..., 0]


def softmax_bar(s: Tensor, p_bar: Tensor, bias: Tensor | None, lse: Tensor, scale: float) -> Tensor:
    """Turn scores q k^T into P, and the cotangent of P into that of the scores, in place.

    Args:
        s: (G, R, M).
        p_bar: Likewise.
        bias: As `softmax` has it.
        lse: The log of each row's sum, (G, R).
        scale: Factor of s.

    Returns:
        P, which is s.
    """
    if _softmax_bar_in_cpp is not None and _is_for_cpp(s, p_bar):
        in_place: Tensor = _softmax_bar_in_cpp(s, p_bar, bias, lse, scale)
        return in_place
    p, _ = _biased(s, bias, scale)
    p.sub_(lse[..., None]).exp_()
    bar = p_bar.to(p.dtype)
    center = (p * bar).sum(-1, keepdim=True)
    p_bar.copy_(bar.sub_(center).mul_(p).mul_(scale))
    return s.copy_(p)


def _biased(s: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Return scale s + bias in the dtype of sums, -inf where the bias is, and where that is."""
    p = s.to(work_dtype(s)).mul_(scale)
    if bias is None:
        return p, None
    hidden = bias == -_INFINITY
    return p.add_(bias).masked_fill_(hidden, -_INFINITY), hidden
