"""Launchers of `swiglu_product`: gated units of `product`, and the gradient of both their weights.

Value and tangent are one launch, which also leaves both products for the gradient. That is one
element-wise kernel, one product for x_bar of all convolutions, and for each stream one for its two
weights; of linear layers these are the vendor's. Float64 is left to the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels.triton.conv1d import weight_sums
from mfmjt.kernels.triton.launching import filled, of_one
from mfmjt.kernels.triton.product import project, project_gated, takes
from mfmjt.kernels.triton.swiglu import bwd_into

__all__ = ["bwd", "bwd_streams", "fwd", "fwd_streams", "jvp", "jvp_streams"]


def _packed(gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Return both weights as one (2 O, C, K)."""
    both = torch.cat((gate_weight, up_weight))
    return both[..., None] if both.ndim == 2 else both


def _of_windows(gate_weights: list[Tensor], up_weights: list[Tensor]) -> list[Tensor]:
    """Return the weights of all streams as `product` reads them, (2 O, K, C)."""
    return [w.transpose(1, 2) for w in map(_packed, gate_weights, up_weights)]


def fwd_streams(x: list[Tensor], gate_weight: list[Tensor], up_weight: list[Tensor]) -> Any:
    """Launch the values."""
    if not takes(x):
        return NotImplemented
    return project_gated(x, _of_windows(gate_weight, up_weight), keep=True)


def jvp_streams(
    x: list[Tensor],
    gate_weight: list[Tensor],
    up_weight: list[Tensor],
    x_dot: list[Tensor | None],
) -> Any:
    """Launch values and tangents."""
    if not takes(x):
        return NotImplemented
    return project_gated(x, _of_windows(gate_weight, up_weight), filled(x_dot, x), keep=True)


def bwd_streams(
    y_bar: list[Tensor],
    x: list[Tensor],
    gate_weight: list[Tensor],
    up_weight: list[Tensor],
    both: list[Tensor],
    needs: list[bool],
) -> Any:
    """Launch the gradients that are needed; those of weights one stream after the other."""
    if not takes(x) or not takes(both):
        return NotImplemented
    x_bar, gate_bar, up_bar = ([t.new_empty(0) for t in x] for _ in needs)
    bar = [t.new_empty(t.shape) for t in both]
    bwd_into(y_bar, both, bar)
    weights = list(map(_packed, gate_weight, up_weight))
    if needs[0]:
        x_bar = _x_bars(bar, weights)
    if needs[1] or needs[2]:
        triples = zip(bar, x, weights, strict=True)
        sums = [_weight_sums(b, t, w.shape[2]).chunk(2) for b, t, w in triples]
        gate_bar, up_bar = (
            [w.new_empty(w.shape).copy_(s.view_as(w)) for w, s in zip(ws, halves, strict=True)]
            for ws, halves in zip((gate_weight, up_weight), zip(*sums, strict=True), strict=True)
        )
    return x_bar, gate_bar, up_bar


def _x_bars(bars: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    convs = [i for i, w in enumerate(weights) if w.shape[2] > 1]
    turned = [weights[i].flip(2).permute(1, 2, 0) for i in convs]
    biases: list[Tensor | None] = [None] * len(convs)
    given = [bars[i] for i in convs], turned, biases, [0] * len(convs), False
    ys = project(*given) if convs else []
    found = dict(zip(convs, ys, strict=True))
    return [
        found[i] if i in found else bar @ w[..., 0]
        for i, (bar, w) in enumerate(zip(bars, weights, strict=True))
    ]


def _weight_sums(bar: Tensor, x: Tensor, taps: int) -> Tensor:
    if taps > 1:
        return weight_sums(bar, x, taps)
    return torch.mm(bar.flatten(0, 1).t(), x.flatten(0, 1))[..., None]


fwd, jvp, bwd = of_one(fwd_streams, jvp_streams, bwd_streams)
