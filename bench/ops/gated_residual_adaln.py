"""`gated_residual_adaln` at the width and lengths of the latent stream, modulated per token."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Cost, norm_cases
from bench.providers import Provider, liger
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln, gated_residual_adaln_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    op, reference = gated_residual_adaln, gated_residual_adaln_ref
    return norm_cases("gated_residual_adaln", scale, op, reference, Cost(7, 7, 11), "x", "h")


def providers(case: Case) -> list[Provider]:
    """Return Liger's layer norm between PyTorch's gated sum and modulation."""
    if "rows" in case.inputs:
        return []

    def with_liger(
        x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = liger("layer_norm", "LigerLayerNormFunction")
        ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        total = x + gate * h
        return total, norm.apply(total, ones, zeros, 1e-6) * (1 + scale) + shift

    return [Provider("liger_layer_norm", with_liger, devices=("cuda",))]
