"""Launchers of `gated_residual_adaln`: the kernels of `norm` and `norm_bwd` with a gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mfmjt.kernels.triton.launching import of_one
from mfmjt.kernels.triton.norm import forward
from mfmjt.kernels.triton.norm_bwd import backward

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


def fwd_streams(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    eps: float,
    rows: list[Tensor | None],
) -> Any:
    """Compute sums, results and statistics of all streams."""
    return forward((hs, gates), xs, shifts, scales, None, eps, rows)


def jvp_streams(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    x_dots: list[Tensor | None],
    h_dots: list[Tensor | None],
    gate_dots: list[Tensor | None],
    shift_dots: list[Tensor | None],
    scale_dots: list[Tensor | None],
    eps: float,
    rows: list[Tensor | None],
) -> Any:
    """Compute sums, results, their tangents and statistics of all streams."""
    dots = (x_dots, h_dots, gate_dots, shift_dots, scale_dots)
    return forward((hs, gates), xs, shifts, scales, dots, eps, rows)


def bwd_streams(
    total_bars: list[Tensor | None],
    y_bars: list[Tensor | None],
    totals: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    means: list[Tensor],
    rstds: list[Tensor],
    rows: list[Tensor | None],
) -> Any:
    """Compute the cotangents of all streams."""
    return backward(total_bars, y_bars, totals, (hs, gates), shifts, scales, means, rstds, rows)


fwd, jvp, bwd = of_one(fwd_streams, jvp_streams, bwd_streams)
