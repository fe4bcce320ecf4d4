"""What the Triton kernels of both layer norms with modulation share: blocks of whole rows.

The Triton kernels keep a block of whole rows in registers. Tensors are seen as (B, N, C), "samples"
and "tokens", by strides (`Layout`): a modulation that is the same for all tokens of a sample is
read once per block of rows. Its cotangent is summed in two steps, over the rows of a program and
then over programs in a fixed order. Rows of more than 8192 channels run the formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, tl, tuning

__all__ = [
    "MAX_WIDTH",
    "Cotangent",
    "Launch",
    "Layout",
    "Rows",
    "backward_norm",
    "columns",
    "finish",
    "first_row",
    "fits_kernel",
    "forward_norm",
    "load_rows",
    "load_shared",
    "load_unless",
    "store_sum",
]

MAX_WIDTH = 8192  # channels of a row that fits into the registers of one program


def fits_kernel(x: Tensor) -> bool:
    """Return whether the kernels take x; what is empty or wider runs the formulas."""
    return x.numel() > 0 and x.shape[-1] <= MAX_WIDTH


# --- What runs on the device


class Rows(NamedTuple):
    """A tensor seen as (B, N, C), as kernels take it.

    Attributes:
        pointer: The tensor; None for a tangent or cotangent that is zero.
        sample: Elements from one sample to the next.
        token: Elements from one token to the next; None where all tokens of a sample share a row.
        channel: 1; None where all channels share a number.
    """

    pointer: Any
    sample: int
    token: int | None
    channel: int | None


@jit
def first_row(tokens, chunk):
    """Sample and first row of this program."""
    chunks = tl.cdiv(tokens, chunk)
    program = tl.program_id(0)
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64) * chunk


@jit
def columns(SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a block, (K, 1, V): see `tuning.norm`."""
    segment = tl.arange(0, SEGMENTS)[:, None, None] * BLOCK
    return segment + tl.arange(0, BLOCK)[None, None, :]


@jit
def load_rows(source, sample, row, col, tokens, width, WORK: tl.constexpr):
    """A block (K, R, V) of a `Rows` in the dtype of sums, zero outside."""
    row = row[None, :, None]
    at = source.pointer + sample * source.sample
    at += row * 0 if source.token is None else row * source.token
    at += col * 0 if source.channel is None else col * source.channel
    # What tokens share is read for rows outside too: they may be those of the program's first turn.
    inside = row * 0 + col < width if source.token is None else (row < tokens) & (col < width)
    return tl.load(at, inside, 0.0).to(WORK)


@jit
def load_shared(source, sample, row, col, tokens, width, WORK: tl.constexpr):
    """The same, of what all tokens of a sample share; None for anything else."""
    if source.pointer is None:
        block = None
    elif source.token is None:
        block = load_rows(source, sample, row, col, tokens, width, WORK)
    else:
        block = None
    return block


@jit
def load_unless(shared, source, sample, row, col, tokens, width, WORK: tl.constexpr):
    """What `load_shared` returned, or else what `load_rows` does."""
    if shared is not None:
        return shared
    return load_rows(source, sample, row, col, tokens, width, WORK)


@jit
def _mean_of_rows(block, width):
    """(K, R, V), zero outside, to (1, R, 1)."""
    return (tl.sum(tl.sum(block, 0), 1) / width)[None, :, None]


@jit
def forward_norm(
    x,  # (K, R, V)
    x_dot,  # None where it is zero
    shift,  # this and the next three are `Rows`
    scale,
    shift_dot,
    scale_dot,
    shared_shift,  # this and the next three are `load_shared` of these four
    shared_scale,
    shared_shift_dot,
    shared_scale_dot,
    y,
    y_dot,  # None where no tangent is wanted
    mean,
    rstd,
    sample,
    row,  # (R,)
    col,  # (K, 1, V)
    tokens,
    width,
    EPS: tl.constexpr,
):
    """Normalise and modulate a block of rows, with its tangent; store both and the statistics."""
    work: tl.constexpr = mean.dtype.element_ty
    inside = (row[None, :, None] < tokens) & (col < width)
    centre = _mean_of_rows(x, width)
    x = tl.where(inside, x - centre, 0.0)
    rest = _mean_of_rows(x, width)  # what rounding left in it
    variance = _mean_of_rows(x * x, width) - rest * rest
    over_std = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
    token = sample * tokens + row
    tl.store(mean + token, tl.reshape(centre + rest, row.shape), row < tokens)
    tl.store(rstd + token, tl.reshape(over_std, row.shape), row < tokens)
    n = x * over_std - rest * over_std
    factor = 1 + load_unless(shared_scale, scale, sample, row, col, tokens, width, work)
    out = token[None, :, None] * width + col
    value = n * factor + load_unless(shared_shift, shift, sample, row, col, tokens, width, work)
    tl.store(y + out, value, inside)
    if y_dot is not None:
        dot = tl.zeros_like(n)
        if x_dot is not None:
            x_dot -= _mean_of_rows(x_dot, width)
            share = over_std * _mean_of_rows(x * x_dot, width)  # x, unlike n, is zero outside
            dot += (x_dot - n * share) * (over_std * factor)
        if scale_dot.pointer is not None:
            dot += n * load_unless(
                shared_scale_dot, scale_dot, sample, row, col, tokens, width, work
            )
        if shift_dot.pointer is not None:
            dot += load_unless(shared_shift_dot, shift_dot, sample, row, col, tokens, width, work)
        tl.store(y_dot + out, dot, inside)


@jit
def backward_norm(y_bar, x, mean, rstd, factor, sample, row, col, tokens, width):
    """From the cotangent of a block of y: n and the cotangent of x, all (K, R, V)."""
    inside = (row[None, :, None] < tokens) & (col < width)
    token = sample * tokens + row
    centre = tl.load(mean + token, row < tokens, 0.0)[None, :, None]
    over_std = tl.load(rstd + token, row < tokens, 0.0)[None, :, None]
    x = tl.where(inside, x - centre, 0.0)
    rest = _mean_of_rows(x, width)
    n_bar = y_bar * factor
    mean_bar = _mean_of_rows(n_bar, width)
    share = over_std * (_mean_of_rows(n_bar * x, width) - rest * mean_bar)
    n = x * over_std - rest * over_std
    return n, over_std * (n_bar - mean_bar - n * share)


@jit
def store_sum(sums, block, col, width):
    """Put the sum over the rows of a block (K, R, V) where the second step finds it."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(sums + program * width + col, tl.sum(block, 1, keep_dims=True), col < width)


@jit
def _sum_kernel(pairs, chunks, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The second step: for each (sums (B, chunks, C), result (B, C)), the sum over chunks."""
    blocks = tl.cdiv(width, BLOCK_COLS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    for i in tl.static_range(len(pairs)):
        sums, result = pairs[i]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), sums.dtype.element_ty)
        for start in range(0, chunks, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)[:, None]
            at = sums + (sample * chunks + row) * width + col[None, :]
            total += tl.load(at, (row < chunks) & (col[None, :] < width), 0.0)
        tl.store(result + sample * width + col, tl.sum(total, 0), col < width)


# --- What launchers share


class Launch(NamedTuple):
    """How a kernel over all rows is launched.

    Attributes:
        chunk: Rows of a program, which takes a block of them at a time.
        chunks: Programs of each sample.
        meta: Sizes of a block, see `tuning.norm`, and warps.
    """

    chunk: int
    chunks: int
    meta: dict[str, int]


class Layout:
    """How x (..., C) and what broadcasts to it are seen as (B, N, C), without copies in rank 3.

    Of x (B, N, C) the middle axis is that of tokens, of higher ranks the axes over which
    modulations smaller than x are shared: cotangents of modulations are sums over tokens.

    Attributes:
        samples: B.
        tokens: N.
        width: C.
        work: Dtype of statistics and sums.
    """

    def __init__(self, x: Tensor, *modulations: Tensor) -> None:
        self._shape, lead = x.shape, x.shape[:-1]
        smaller = [m for m in modulations if m.shape != x.shape]
        split = max(0, x.ndim - 2)
        if x.ndim > 3 and smaller:
            varying = [
                a for m in smaller for a, size in enumerate(self._padded(m)[:-1]) if size > 1
            ]
            split = min(split, max(varying, default=-1) + 1)
        self._lead = lead[:split]
        self._view_shape = (math.prod(lead[:split]), math.prod(lead[split:]), x.shape[-1])
        self.samples, self.tokens, self.width = self._view_shape
        # Single tokens, each with modulations of its own, are as good as one sample.
        self._swapped = self.tokens == 1 and not smaller
        if self._swapped:
            self.samples, self.tokens = 1, self.samples
        self.work = work_dtype(x)
        self._summed = bool(smaller)
        self._element_size = x.element_size()

    def launch(self, backward: bool = False) -> Launch:
        """How a kernel over all rows is launched."""
        blocks = tuning.norm(self.width, self.tokens, self._element_size, 4 if backward else 1)
        segments, block_rows, block_cols, num_warps = blocks
        rows = self.samples * self.tokens
        most = tuning.norm_chunk(rows, block_rows, backward and self._summed)
        chunks = cdiv(self.tokens, most)
        chunk = cdiv(self.tokens, chunks * block_rows) * block_rows
        meta = {"SEGMENTS": segments, "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
        meta |= {"num_warps": num_warps, **tuning.registers(num_warps)}
        return Launch(chunk, chunks, meta)

    def rows(self, t: Tensor | None) -> Rows:
        """What broadcasts to x, or None, for a kernel."""
        if t is None:
            return Rows(None, 0, None, None)
        if t.ndim != 3 or len(self._shape) != 3:
            t = t.expand(self._shape).reshape(self._view_shape)
        if t.shape[2] > 1 and t.stride(2) > 1:
            t = t.contiguous()
        strides = zip(t.shape, t.stride(), strict=True)
        sample, token, channel = (0 if size == 1 else stride for size, stride in strides)
        if self._swapped:
            sample, token = token, sample
        return Rows(t, sample, token or None, channel or None)

    def cotangent(self, m: Tensor, chunks: int, known: bool = False) -> Cotangent:
        """Memory for the cotangent of a modulation that `chunks` programs a sample compute.

        None, as `modulate_bar` has it, for one of the shape of x that is `known` without a kernel.
        """
        padded = self._padded(m)
        if m.shape == self._shape:
            return Cotangent(m, None if known else m.new_empty(m.shape))
        if padded[-1] == self.width and all(n == 1 for n in padded[len(self._lead) : -1]):
            sums = m.new_empty((self.samples, chunks, self.width), dtype=self.work)
            axes = len(self._shape) - 1 - len(self._lead)
            result = m.new_empty(
                (*self._lead, *(1,) * axes, self.width),
                dtype=m.dtype if m.numel() == self.samples * self.width else self.work,
            )
            return Cotangent(m, sums=sums, result=result)
        return Cotangent(m, whole=m.new_empty(self._shape, dtype=self.work))

    def _padded(self, m: Tensor) -> tuple[int, ...]:
        return (1,) * (len(self._shape) - m.ndim) + tuple(m.shape)


class Cotangent(NamedTuple):
    """A modulation's cotangent: where the kernel puts it, and what becomes of it.

    Attributes:
        modulation: What it is the cotangent of.
        whole: Of the shape of x, a row for each token, or None.
        sums: `(B, chunks, C)`, a row for each program, or None.
        result: `(B, C)` in the axes of x: where `finish` puts the sums over chunks.
    """

    modulation: Tensor
    whole: Tensor | None = None
    sums: Tensor | None = None
    result: Tensor | None = None


def finish(*cotangents: Cotangent) -> tuple[Tensor, ...]:
    """Run the second step of all sums, in one launch; returns the cotangents."""
    pairs = tuple((c.sums, c.result) for c in cotangents if c.sums is not None)
    if pairs:
        samples, chunks, width = pairs[0][0].shape
        block_rows, block_cols, num_warps = tuning.sums(chunks, width)
        _sum_kernel[(samples * cdiv(width, block_cols),)](
            pairs,
            chunks,
            width,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=num_warps,
        )
    return tuple(_finished(*c) for c in cotangents)


def _finished(
    m: Tensor, whole: Tensor | None, sums: Tensor | None, result: Tensor | None
) -> Tensor:
    found = result if whole is None else whole
    if found is None:
        return m.new_empty(0)
    # What is left: axes of samples that share a row, or of channels that share a number.
    found = found.view(m.shape) if found.numel() == m.numel() else found.sum_to_size(m.shape)
    return found.to(m.dtype)
