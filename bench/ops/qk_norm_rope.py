"""`qk_norm_rope` on the latent stream's projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.case import Case, Cost, Input, rotation, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

__all__ = ["cases", "providers"]

EPS = 2**-23


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale; where ops are compiled, also without a rotation."""
    found = []
    for s in shapes(scale):
        width = s.dim // s.heads
        ropes = {s.name: {"rope": rotation(s.length, width)}}
        if scale == "aot":
            ropes = {f"{s.name} text": {}, **ropes}
        for name, rope in ropes.items():
            found.append(
                s.case(
                    "qk_norm_rope",
                    {
                        "qkv": (s.batch, s.length, 3, s.heads, width),
                        "q_weight": Input((width,), moves=False),
                        "k_weight": Input((width,), moves=False),
                        **rope,
                    },
                    name=name,
                    function=qk_norm_rope,
                    reference=qk_norm_rope_ref,
                    elements=Cost(6, 6, 8).times(math.prod(s.rows)),
                    terms=s.batch * s.length * s.heads,
                )
            )
    return found


def providers(case: Case) -> list[Provider]:
    """Return Liger's RMS norm, then PyTorch's rotation: Liger rotates halves, we adjacent pairs."""

    def with_liger(
        qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm = liger("rms_norm", "LigerRMSNormFunction")
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]

        def one(x: Tensor, weight: Tensor) -> Tensor:
            x = norm.apply(x, weight, EPS, 0.0, "llama", False)
            even, odd = x[..., 0::2], x[..., 1::2]
            rotated = (even * cos - odd * sin, even * sin + odd * cos)
            return torch.stack(rotated, dim=-1).flatten(-2).to(qkv.dtype)

        q, k, v = qkv.unbind(2)
        return one(q, q_weight), one(k, k_weight), v

    return [Provider("liger_rms_norm", with_liger, devices=("cuda",))]
