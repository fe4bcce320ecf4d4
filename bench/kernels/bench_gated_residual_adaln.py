"""`gated_residual_adaln` at the width and lengths of the latent stream, modulated per token."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Cost, Input, four_calls, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln, gated_residual_adaln_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Cases of a scale; where ops are checked, gate and shift are one for all tokens."""
    found = []
    for s in shapes(scale):
        rows = (s.batch, s.length, s.dim)
        one = (s.batch, 1, s.dim) if scale == "check" else rows
        n = s.batch * s.length * s.dim
        sizes = {"x": rows, "h": rows, "gate": one, "shift": one, "scale": rows}
        found.append(
            Case(
                op="gated_residual_adaln",
                name=s.name,
                model=s.model,
                batch=s.batch,
                length=s.length,
                inputs={name: Input(size) for name, size in sizes.items()},
                function=gated_residual_adaln,
                reference=gated_residual_adaln_ref,
                flops=Cost(0),
                elements=Cost(7 * n, 7 * n, 11 * n),
                terms=max(s.length, s.dim),
                headline=s.headline,
            )
        )
    return found + [four_calls(case) for case in found[:1] if scale == "cpu"]


def providers(case: Case) -> list[Provider]:
    """Liger's layer norm between PyTorch's gated sum and modulation."""

    def with_liger(
        x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = liger("layer_norm", "LigerLayerNormFunction")
        ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        total = x + gate * h
        return total, norm.apply(total, ones, zeros, 1e-6) * (1 + scale) + shift

    return [Provider("liger_layer_norm", with_liger, devices=("cuda",))]
