"""`qk_norm_rope` on the latent stream's projections."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.cases import Case, Cost, Input, four_calls, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

__all__ = ["cases", "providers"]

EPS = 2**-23


@functools.lru_cache
def _rope(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 100 ** torch.linspace(0, 1, width // 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def cases(scale: str) -> list[Case]:
    """Cases of a scale."""
    found = []
    for s in shapes(scale):
        width = s.dim // s.heads
        n = s.batch * s.length * s.dim
        found.append(
            Case(
                op="qk_norm_rope",
                name=s.name,
                model=s.model,
                batch=s.batch,
                length=s.length,
                inputs={
                    "qkv": Input((s.batch, s.length, 3, s.heads, width)),
                    "q_weight": Input((width,), moves=False),
                    "k_weight": Input((width,), moves=False),
                    "rope": Input(
                        (s.length, width // 2, 2),
                        constant=functools.partial(_rope, s.length, width),
                    ),
                },
                function=qk_norm_rope,
                reference=qk_norm_rope_ref,
                flops=Cost(0),
                elements=Cost(6 * n, 6 * n, 8 * n),
                terms=s.batch * s.length * s.heads,
                headline=s.headline,
            )
        )
    return found + [four_calls(case) for case in found[:1] if scale == "cpu"]


def providers(case: Case) -> list[Provider]:
    """Liger's RMS norm, then PyTorch's rotation: its own turns halves, ours adjacent pairs."""

    def with_liger(
        qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm = liger("rms_norm", "LigerRMSNormFunction")
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]

        def one(x: Tensor, weight: Tensor) -> Tensor:
            x = norm.apply(x, weight, EPS, 0.0, "llama", False)
            even, odd = x[..., 0::2], x[..., 1::2]
            turned = (even * cos - odd * sin, even * sin + odd * cos)
            return torch.stack(turned, dim=-1).flatten(-2).to(qkv.dtype)

        q, k, v = qkv.unbind(2)
        return one(q, q_weight), one(k, k_weight), v

    return [Provider("liger_rms_norm", with_liger, devices=("cuda",))]
