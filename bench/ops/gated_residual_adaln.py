"""`gated_residual_adaln` at the width and lengths of the latent stream, modulated per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.case import Case, Cost, modulations, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln, gated_residual_adaln_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    return [
        s.case(
            "gated_residual_adaln",
            {"x": s.rows, "h": s.rows, "gate": first, "shift": first, "scale": second},
            name=name,
            function=gated_residual_adaln,
            reference=gated_residual_adaln_ref,
            elements=Cost(7, 7, 11).times(math.prod(s.rows)),
            terms=max(s.length, s.dim),
        )
        for s in shapes(scale)
        for name, first, second in modulations(s, scale)
    ]


def providers(case: Case) -> list[Provider]:
    """Return Liger's layer norm between PyTorch's gated sum and modulation."""

    def with_liger(
        x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = liger("layer_norm", "LigerLayerNormFunction")
        ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        total = x + gate * h
        return total, norm.apply(total, ones, zeros, 1e-6) * (1 + scale) + shift

    return [Provider("liger_layer_norm", with_liger, devices=("cuda",))]
