"""What Triton kernels share: where they are compiled for, strided tensors, a few device functions.

The package is imported where Triton runs, and only there: `mfmjt.kernels._backends` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mfmjt.kernels._backends import INTERPRETED

__all__ = [
    "View",
    "cdiv",
    "choose",
    "choose_view",
    "filled",
    "fma",
    "jit",
    "locate",
    "one_stream",
    "power_of_2",
    "rows",
    "target",
    "tl",
    "wide",
]

_ROUNDS_PRODUCTS = tl.constexpr(INTERPRETED)

jit: Any = triton.jit


class View(NamedTuple):
    """A strided tensor as a kernel reads it, channels dense.

    Attributes:
        pointer: The tensor, or None where there is none.
        sample: Elements from one sample to the next; None where all samples share what is there.
        token: Elements from one token (or row) to the next; None likewise.
        head: Elements from one head to the next; None likewise.
    """

    pointer: Tensor | None
    sample: int | None = None
    token: int | None = None
    head: int | None = None


@jit
def wide(x):
    """The same numbers in the dtype of sums: float32, or float64 for float64."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@jit
def fma(x, y, z):
    """Return x y + z, rounded once; Triton's interpreter has no instruction for that."""
    if _ROUNDS_PRODUCTS:
        return (x.to(tl.float64) * y + z).to(x.dtype)
    return tl.fma(x, y, z)


@jit
def locate(counts, tile, BLOCK: tl.constexpr):
    """Return the stream that a tile lies in, where the tile starts there, and the stream's count.

    `counts` are the tokens of each stream; each is cut into tiles of BLOCK, the last one shorter.
    """
    stream, local, count = 0, tile, counts[0]
    passed = tl.cdiv(counts[0], BLOCK)
    for s in tl.static_range(1, len(counts)):
        here = tile >= passed
        stream = tl.where(here, s, stream)
        local = tl.where(here, tile - passed, local)
        count = tl.where(here, counts[s], count)
        passed += tl.cdiv(counts[s], BLOCK)
    return stream, local * BLOCK, count


@jit
def choose(values, stream):
    """Return one of a tuple of pointers, or of numbers, by a stream's number known at run time."""
    chosen = values[0]
    for s in tl.static_range(1, len(values)):
        chosen = tl.where(stream == s, values[s], chosen)
    return chosen


@jit
def choose_view(views, stream):
    """Return (pointer, sample, token, head) of one of a tuple of `View`s, likewise.

    A stride stays None where it is for all of them, and counts as 0 where it is for some.
    """
    pointer, sample, token, head = views[0]
    for s in tl.static_range(1, len(views)):
        here = stream == s
        pointer = tl.where(here, views[s].pointer, pointer)
        if views[s].sample is not None:
            sample = tl.where(here, views[s].sample, 0 if sample is None else sample)
        elif sample is not None:
            sample = tl.where(here, 0, sample)
        if views[s].token is not None:
            token = tl.where(here, views[s].token, 0 if token is None else token)
        elif token is not None:
            token = tl.where(here, 0, token)
        if views[s].head is not None:
            head = tl.where(here, views[s].head, 0 if head is None else head)
        elif head is not None:
            head = tl.where(here, 0, head)
    return pointer, sample, token, head


def target() -> tuple[str, Any]:
    """Return what kernels are compiled for: ("cuda", 90) for sm_90, ("hip", "gfx942")."""
    if INTERPRETED:
        return "cuda", 90
    return _target_of(triton.runtime.driver.active.get_current_device())


@functools.cache  # asked at every launch, and the driver asks the device anew each time
def _target_of(device: Any) -> tuple[str, Any]:
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch


def one_stream(launcher: Callable[..., Any], *args: Any) -> Any:
    """Call a launcher of lists of streams with one stream, and return its results."""
    found = launcher(*([x] if x is None or isinstance(x, Tensor) else x for x in args))
    if found is NotImplemented:
        return found
    return tuple([ys[0] for ys in found]) if isinstance(found, tuple) else found[0]


def filled(tensors: Sequence[Tensor | None], xs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return tensors with zeros of the shapes of `xs` for those that are None; None if all are."""
    if all(t is None for t in tensors):
        return None
    return [
        x.new_zeros(x.shape[-1:]).expand(x.shape) if t is None else t
        for t, x in zip(tensors, xs, strict=True)
    ]


def cdiv(n: int, block: int) -> int:
    """Return how many blocks cover n."""
    return -(-n // block)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is not less than n (and not less than 1)."""
    return 1 << max(0, n - 1).bit_length()


def rows(x: Tensor) -> Tensor:
    """Return (..., C) as (rows, C) with dense channels; a view where the strides allow."""
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()
