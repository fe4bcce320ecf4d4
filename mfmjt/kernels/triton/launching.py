"""What launchers share: lists of streams as a kernel takes them, new tensors, the launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.kernels.triton import target, tl

__all__ = [
    "View",
    "alike",
    "dense",
    "empty",
    "filled",
    "launch",
    "of_one",
    "present",
    "strides",
    "views",
]

EARLY: frozenset[int] = frozenset()
"""Compute capabilities, 90 or 100, on which a kernel of inference begins while the one before it
ends (programmatic dependent launch). Empty until a measurement says that it is right and pays."""
_ZERO = tl.constexpr(0)  # a kernel that knows it loads what tokens share once


class View(NamedTuple):
    """A strided tensor as a kernel reads it, channels dense.

    Attributes:
        pointer: The tensor.
        sample: Elements from one sample to the next; 0 where all samples share what is there.
        token: Elements from one token (or row) to the next; 0 likewise.
        head: Elements from one head to the next; 0 likewise.
    """

    pointer: Tensor
    sample: int | tl.constexpr = _ZERO
    token: int | tl.constexpr = _ZERO
    head: int | tl.constexpr = _ZERO


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel; lists, and lists in them, become the tuples that Triton takes.

    One that takes EARLY begins early where that pays.
    """
    if "EARLY" in kernel.arg_names:
        early = target()[1] in EARLY
        options |= {"EARLY": early} | ({"launch_pdl": True} if early else {})
    kernel[grid](*map(_tuples, args), **options)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def of_one(*launchers: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return launchers of one stream, from those of lists of streams."""
    return [functools.partial(_one_stream, launcher) for launcher in launchers]


def _one_stream(launcher: Callable[..., Any], *args: Any) -> Any:
    found = launcher(*([x] if x is None or isinstance(x, Tensor) else x for x in args))
    if found is NotImplemented:
        return found
    return tuple([ys[0] for ys in found]) if isinstance(found, tuple) else found[0]


def alike(*lists: Sequence[Tensor | None] | None) -> bool:
    """Return True if no tensor is empty and those of a list have one dtype, as a launch needs."""
    for tensors in filter(None, lists):
        given = [t for t in tensors if t is not None]
        if len({t.dtype for t in given}) > 1 or not all(t.numel() for t in given):
            return False
    return True


def empty(xs: Sequence[Tensor]) -> list[Tensor]:
    """Return new contiguous tensors of the shapes and dtypes of `xs`."""
    return [x.new_empty(x.shape) for x in xs]


def filled(tensors: Sequence[Tensor | None], xs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return tensors with zeros of the shapes of `xs` for those that are None; None if all are."""
    if all(t is None for t in tensors):
        return None
    return [
        x.new_zeros(x.shape[-1:]).expand(x.shape) if t is None else t
        for t, x in zip(tensors, xs, strict=True)
    ]


def present(tensors: Sequence[Tensor | None]) -> Any:
    """Return contiguous tensors of one dtype, another's where one is absent, and which are there.

    The second is 1 or 0 for each: 1 is a constant to Triton, and costs nothing where all are there.
    Returns None where all are absent.
    """
    given = [t for t in tensors if t is not None]
    if not given:
        return None
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in given])
    filled = [(given[0] if t is None else t).to(dtype).contiguous() for t in tensors]
    return tuple(filled), tuple([int(t is not None) for t in tensors])


def dense(x: Tensor) -> Tensor:
    """Return x with its channels one after the other; a copy where they are not."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> list[int]:
    """Return those of all axes but the last; 0 where there is only one, which counts as aligned."""
    return [d if n > 1 else 0 for d, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def views(tensors: Sequence[Tensor] | None) -> list[View] | None:
    """Return (N, C), (B, N, C) or (B, N, H, C) of each stream as kernels read them."""
    return None if tensors is None else list(map(_view, tensors))


def _view(x: Tensor) -> View:
    x = dense(x)
    steps = [d or _ZERO for d in strides(x)]
    return View(x, *steps) if x.ndim > 2 else View(x, _ZERO, *steps)
