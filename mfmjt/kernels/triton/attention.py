"""What attention's Triton kernels share: tiles of heads that lie in several streams, the launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels._op import check
from mfmjt.kernels.triton import View, cdiv, jit, locate, target, tl, tuning

__all__ = [
    "add_products",
    "block_of",
    "by_streams",
    "dot",
    "empty",
    "is_left",
    "keys_of",
    "launch",
    "load",
    "packed",
    "store",
]


@jit
def at_head(stream, sample, head, WIDTH: tl.constexpr):
    """Return a pointer to the first token of a head, and elements from one token to the next.

    The strides of a stream are in units of 8 elements where heads are a multiple of 8 wide
    (`_view`): so Triton, which is told of multiples of 16 only, loads 8 elements at a time.
    """
    UNIT: tl.constexpr = 8 if WIDTH % 8 == 0 else 1
    pointer, sample_stride, token_stride, head_stride = stream
    return pointer + (sample * sample_stride + head * head_stride) * UNIT, token_stride * UNIT


@jit
def load(rows, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile (BLOCK, COLUMNS) from a column on, zeros where there is nothing.

    `rows` are (view of a stream, sample, head, first token, one past the last that counts).
    """
    stream, sample, head, start, limit = rows
    token = tl.arange(0, BLOCK)[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    inside = token < limit - start
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)
    pointer, stride = at_head(stream, sample, head, WIDTH)
    pointer += start * stride
    return tl.load(pointer + (token * stride + column), inside, 0.0)


@jit
def store(
    pointer, tile, place, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write a tile (BLOCK, COLUMNS) into a dense (B, count, H, WIDTH) result.

    `place` is (sample, head, H, first token, count).
    """
    sample, head, heads, start, count = place
    token = tl.arange(0, BLOCK)[:, None]
    column += tl.arange(0, COLUMNS)[None, :]
    inside = token < count - start
    if WIDTH % COLUMNS != 0:
        inside = inside & (column < WIDTH)
    pointer += ((sample * count + start) * heads + head) * WIDTH
    tl.store(pointer + (token * (heads * WIDTH) + column), tile, inside)


@jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b, in the dtype of total."""
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@jit
def add_products(total, a, b, WIDTH: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr):
    """Return total + a b^T, where a and b are rows for `load`, some columns at a time."""
    for column in range(0, WIDTH, COLUMNS):
        x = load(a, column, WIDTH, total.shape[0], COLUMNS)
        y = load(b, column, WIDTH, total.shape[1], COLUMNS)
        total = dot(x, tl.trans(y), total, PRECISION)
    return total


@jit
def keys_of(lengths, stream, tokens, sample):
    """Return how many keys of a sample count; they are the first of the stream."""
    limit = tokens
    if lengths[stream] is not None:
        limit = tl.minimum(tl.load(lengths[stream] + sample), limit).to(tl.int32)
    return limit


@jit
def block_of(tokens, heads, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return what this program computes: pair of sample and head, first column, stream, and place.

    `place` is (sample, head, H, first token, tokens of the stream).
    """
    tiles = 0
    for s in tl.static_range(len(tokens)):
        tiles += tl.cdiv(tokens[s], BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = pair // heads, pair % heads
    column = tl.program_id(1) * COLUMNS
    stream, first, count = locate(tokens, tl.program_id(0) % tiles, BLOCK)
    return pair, column, stream, (sample, head, heads, first, count)


def _strides(x: Tensor) -> list[int]:
    """Return the strides of samples, tokens and heads; 0 where there is only one."""
    return [d if n > 1 else 0 for d, n in zip(x.stride()[:3], x.shape[:3], strict=True)]


def _view(x: Tensor) -> View:
    unit = 8 if x.shape[3] % 8 == 0 else 1
    return View(x, *(d // unit for d in _strides(x)))


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether kernels read x where it lies, and the others (or None) by its strides.

    Heads are dense, 32 bits reach every element of a tile, and strides are whole units.
    """
    same = all(y is None or y.stride() == x.stride() for y in others)
    whole = x.shape[3] % 8 != 0 or all(d % 8 == 0 for d in _strides(x))
    return same and whole and x.stride(3) == 1 and x.stride(1) < 2**22


def packed(
    streams: Sequence[Tensor], dots: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return streams and their tangents: themselves where kernels read them, else contiguous."""
    pairs = zip(streams, dots or [None] * len(streams), strict=True)
    kept = [
        (x, dot) if _fits(x, dot) else (x.contiguous(), dot if dot is None else dot.contiguous())
        for x, dot in pairs
    ]
    return [x for x, _ in kept], [dot for _, dot in kept]


def launch(
    kernel: Any,
    part: str,
    streams: Sequence[Sequence[Tensor]],
    pointers: Sequence[Sequence[Tensor | None] | None],
    lengths: Sequence[Tensor | None],
    lse: Tensor,
    scale: float,
) -> None:
    """Run one kernel over all blocks of queries, or of keys for the gradients of keys.

    Args:
        kernel: The kernel.
        part: Its name in `tuning.attention`.
        streams: (B, tokens, H, D) as `packed` returned them: those of q, k, v, and of o_bar and o.
        pointers: Tensors whose strides the kernel knows; the parts of lse last.
        lengths: For each stream of keys, (B,) or None.
        lse: (B, H, all queries).
        scale: Factor of the scores.

    Raises:
        ValueError: Heads are too wide, or 32 bits do not count the elements of a sample.
    """
    first = streams[0][0]
    batch, _, heads, width = first.shape
    check(width <= 256, "joint_attention", "a head width up to 256 on a GPU", q=first)
    for name, group in zip(("q", "k", "v", "o_bar", "o"), streams, strict=False):
        for i, x in enumerate(group):
            needs = "less than 2**31 elements of a sample in each stream on a GPU"
            near = x.shape[1] * x.stride(1) < 2**31
            check(near, "joint_attention", needs, **{f"{name}[{i}]": x})
    queries, keys = (tuple(x.shape[1] for x in group) for group in streams[:2])
    tokens = keys if part == "bwd_kv" else queries
    if batch * heads * sum(tokens) == 0:
        return
    blocks, warps, stages = tuning.attention(
        part, batch * heads, tokens, width, first.element_size()
    )
    block_n, block_m, block_in, block_out = blocks
    tiles = sum(cdiv(n, block_m if part == "bwd_kv" else block_n) for n in tokens)
    kernel[(batch * heads * tiles, cdiv(width, block_out))](
        *(tuple(_view(x) for x in group) for group in streams),
        *(None if group is None else tuple(group) for group in pointers),
        queries,
        keys,
        tuple(None if n is None else n.contiguous() for n in lengths),
        lse.shape[2],
        heads,
        scale,
        scale * math.log2(math.e),
        WIDTH=width,
        PRECISION="tf32x3" if first.dtype.itemsize == 4 and target()[0] == "cuda" else "ieee",
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        num_warps=warps,
        num_stages=stages,
    )


def by_streams(lse: Tensor, q: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parts (B, H, N) of one number for each query, (B, H, all N); views."""
    return lse.split([x.shape[1] for x in q], dim=2)


def is_left(q: Sequence[Tensor]) -> bool:
    """Return whether the formulas compute it: Triton knows no matrix unit with float64."""
    return q[0].element_size() == 8 and not INTERPRETED


def empty(streams: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous tensors of the shapes of the streams."""
    return [s.new_empty(s.shape) for s in streams]
