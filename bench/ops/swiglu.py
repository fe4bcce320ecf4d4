"""`swiglu` at the width of the latent stream's feed-forward."""

from __future__ import annotations

import math

from torch import Tensor

from bench.case import Case, Cost, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.swiglu import swiglu, swiglu_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    found = []
    for s in shapes(scale):
        rows = (s.batch, s.length, s.hidden)
        found.append(
            s.case(
                "swiglu",
                {"gate": rows, "up": rows},
                function=swiglu,
                reference=swiglu_ref,
                elements=Cost(3, 3, 5).times(math.prod(rows)),
                terms=1,
            )
        )
    return found


def providers(case: Case) -> list[Provider]:
    """Return Liger's SwiGLU."""

    def with_liger(gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = liger("swiglu", "LigerSiLUMulFunction").apply(gate, up)
        return y

    return [Provider("liger", with_liger, devices=("cuda",))]
