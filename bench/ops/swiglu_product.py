"""`swiglu_product` as the first half of the latent stream's feed-forward, two convolutions."""

from __future__ import annotations

from torch import Tensor

from bench.case import Case, Cost, Input, shapes
from bench.providers import OURS, Provider
from mfmjt.kernels.conv1d import conv1d
from mfmjt.kernels.swiglu import swiglu
from mfmjt.kernels.swiglu_product import swiglu_product, swiglu_product_ref

__all__ = ["cases", "providers"]

TAPS = 3


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    found = []
    for s in shapes(scale):
        n, depth = s.batch * s.length, TAPS * s.dim
        filters = Input((s.hidden, s.dim, TAPS), moves=False, scale=depth**-0.5)
        moved, weights = n * (s.dim + s.hidden), 2 * s.hidden * depth
        found.append(
            s.case(
                "swiglu_product",
                {"x": s.rows, "gate_weight": filters, "up_weight": filters},
                function=swiglu_product,
                reference=swiglu_product_ref,
                flops=Cost(1, 1, 2).times(4 * n * depth * s.hidden),
                # Backward reads both products as well, or makes them once more
                elements=Cost(moved + weights, moved, 2 * moved + n * s.hidden + 2 * weights),
                terms=max(n, 2 * TAPS * s.hidden, depth),
            )
        )
    return found


def providers(case: Case) -> list[Provider]:
    """Return what it takes the place of: two convolutions, and then the activation."""

    def apart(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
        return swiglu(conv1d(x, gate_weight), conv1d(x, up_weight))

    return [Provider(f"{OURS}_apart", apart, devices=("cuda",))]
