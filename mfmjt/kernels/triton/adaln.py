"""Launchers of `adaln`: the kernels of `norm` and `norm_bwd` where nothing is added."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from mfmjt.kernels.triton import one_stream
from mfmjt.kernels.triton.norm import forward
from mfmjt.kernels.triton.norm_bwd import backward

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


def fwd_streams(xs: list[Tensor], shifts: list[Tensor], scales: list[Tensor], eps: float) -> Any:
    """Compute results and statistics of all streams."""
    found = forward(None, xs, shifts, scales, None, eps)
    return found if found is NotImplemented else (found[2], *found[4:])


def jvp_streams(
    xs: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    x_dots: list[Tensor | None],
    shift_dots: list[Tensor | None],
    scale_dots: list[Tensor | None],
    eps: float,
) -> Any:
    """Compute results, tangents and statistics of all streams."""
    dots = (x_dots, None, None, shift_dots, scale_dots)
    found = forward(None, xs, shifts, scales, dots, eps)
    return found if found is NotImplemented else found[2:]


def bwd_streams(
    y_bars: list[Tensor],
    xs: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    means: list[Tensor],
    rstds: list[Tensor],
) -> Any:
    """Compute the cotangents of all streams."""
    return backward(None, y_bars, xs, None, shifts, scales, means, rstds)


fwd = functools.partial(one_stream, fwd_streams)
jvp = functools.partial(one_stream, jvp_streams)
bwd = functools.partial(one_stream, bwd_streams)
