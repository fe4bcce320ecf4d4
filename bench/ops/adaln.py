"""`adaln` at the width and lengths of the latent stream, modulated per token.

Eager layer norm and modulation pass over memory about six times, with a tangent fifteen times; a
fused kernel reads x, shift and scale and writes y, and the tangent doubles that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Cost, norm_cases
from bench.providers import Provider, liger
from mfmjt.kernels.adaln import adaln, adaln_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    return norm_cases("adaln", scale, adaln, adaln_ref, Cost(4, 4, 6), "x")


def providers(case: Case) -> list[Provider]:
    """Return Liger's layer norm, then PyTorch's modulation: no library has the two in one."""
    if "rows" in case.inputs:
        return []

    def with_liger(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        norm = liger("layer_norm", "LigerLayerNormFunction")
        ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        return norm.apply(x, ones, zeros, 1e-6) * (1 + scale) + shift

    return [Provider("liger_layer_norm", with_liger, devices=("cuda",))]
