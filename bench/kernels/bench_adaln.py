"""`adaln` at the width and lengths of the latent stream, modulated per token.

Eager layer norm and modulation pass over memory about six times, with a tangent fifteen times; a
fused kernel reads x, shift and scale and writes y, and the tangent doubles that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Cost, Input, four_calls, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.adaln import adaln, adaln_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Cases of a scale; where ops are checked, the shift is one for all tokens of a sample."""
    found = []
    for s in shapes(scale):
        rows = (s.batch, s.length, s.dim)
        shift = (s.batch, 1, s.dim) if scale == "check" else rows
        n = s.batch * s.length * s.dim
        found.append(
            Case(
                op="adaln",
                name=s.name,
                model=s.model,
                batch=s.batch,
                length=s.length,
                inputs={"x": Input(rows), "shift": Input(shift), "scale": Input(rows)},
                function=adaln,
                reference=adaln_ref,
                flops=Cost(0),
                elements=Cost(4 * n, 4 * n, 6 * n),
                terms=max(s.length, s.dim),
                headline=s.headline,
            )
        )
    return found + [four_calls(case) for case in found[:1] if scale == "cpu"]


def providers(case: Case) -> list[Provider]:
    """Liger's layer norm, then PyTorch's modulation: no library has the two in one."""

    def with_liger(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        norm = liger("layer_norm", "LigerLayerNormFunction")
        ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        return norm.apply(x, ones, zeros, 1e-6) * (1 + scale) + shift

    return [Provider("liger_layer_norm", with_liger, devices=("cuda",))]
