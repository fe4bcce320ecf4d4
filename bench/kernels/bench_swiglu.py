"""`swiglu` at the width of the latent stream's feed-forward."""

from __future__ import annotations

from torch import Tensor

from bench.cases import Case, Cost, Input, four_calls, shapes
from bench.providers import Provider, liger
from mfmjt.kernels.swiglu import swiglu, swiglu_ref

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Cases of a scale."""
    found = []
    for s in shapes(scale):
        rows = (s.batch, s.length, s.hidden)
        n = s.batch * s.length * s.hidden
        found.append(
            Case(
                op="swiglu",
                name=s.name,
                model=s.model,
                batch=s.batch,
                length=s.length,
                inputs={"gate": Input(rows), "up": Input(rows)},
                function=swiglu,
                reference=swiglu_ref,
                flops=Cost(0),
                elements=Cost(3 * n, 3 * n, 5 * n),
                terms=1,
                headline=s.headline,
            )
        )
    return found + [four_calls(case) for case in found[:1] if scale == "cpu"]


def providers(case: Case) -> list[Provider]:
    """Liger's SwiGLU."""

    def with_liger(gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = liger("swiglu", "LigerSiLUMulFunction").apply(gate, up)
        return y

    return [Provider("liger", with_liger, devices=("cuda",))]
