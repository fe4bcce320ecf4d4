"""Device functions that kernels share: choices among streams, strided tensors, precision."""

from __future__ import annotations

from mfmjt.kernels._backends import INTERPRETED
from mfmjt.kernels.triton import jit, tl

__all__ = [
    "at",
    "await_launches",
    "choose",
    "choose_field",
    "choose_view",
    "fma",
    "locate",
    "put",
    "wide",
]

_ROUNDS_PRODUCTS = tl.constexpr(INTERPRETED)


@jit
def await_launches(EARLY: tl.constexpr):
    """Wait for the launches before this one, if it began early, and let the next one begin early.

    A kernel does this first, so whatever it reads is there, and whatever it overwrites was read.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wide(x):
    """Return x in the dtype of sums: float32, or float64 for float64."""
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
def choose_field(tuples, i: tl.constexpr, stream):
    """Return field i of one of a tuple of tuples, likewise."""
    chosen = tuples[0][i]
    for s in tl.static_range(1, len(tuples)):
        chosen = tl.where(stream == s, tuples[s][i], chosen)
    return chosen


@jit
def choose_view(views, stream):
    """Return (pointer, sample, token, head) of one of a tuple of `View`s."""
    return (
        choose_field(views, 0, stream),
        choose_field(views, 1, stream),
        choose_field(views, 2, stream),
        choose_field(views, 3, stream),
    )


@jit
def at(views, stream, sample, token, head=0):
    """Return pointers to the first channels of rows of one of a tuple of `View`s."""
    pointer = choose_field(views, 0, stream)
    pointer += sample * choose_field(views, 1, stream)
    pointer += token * choose_field(views, 2, stream)
    return pointer + head * choose_field(views, 3, stream)


@jit
def put(tensors, stream, place, values, inside):
    """Store values into one of a tuple of dense tensors; nothing where there is None."""
    if tensors is not None:
        tl.store(choose(tensors, stream) + place, values, inside)
