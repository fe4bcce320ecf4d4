"""`linear` as the projection of the latent stream to q, k and v.

The product is the vendor's; what is ours is that a tangent costs one product more and not two.
"""

from __future__ import annotations

from bench.cases import Case, Cost, Input, shapes
from mfmjt.kernels.linear import linear, linear_ref

__all__ = ["cases"]


def cases(scale: str) -> list[Case]:
    """Cases of a scale."""
    found = []
    for s in shapes(scale):
        rows, wide = s.batch * s.length, 3 * s.dim
        product = 2 * rows * s.dim * wide
        moved = rows * (s.dim + wide)
        weight = s.dim * wide
        found.append(
            Case(
                op="linear",
                name=s.name,
                model=s.model,
                batch=s.batch,
                length=s.length,
                inputs={
                    "x": Input((s.batch, s.length, s.dim)),
                    "weight": Input((wide, s.dim), moves=False, scale=s.dim**-0.5),
                    "bias": Input((wide,), moves=False),
                },
                function=linear,
                reference=linear_ref,
                flops=Cost(product, product, 2 * product),
                elements=Cost(moved + weight, moved, moved + rows * s.dim + 2 * weight),
                terms=max(rows, wide),
                headline=s.headline,
            )
        )
    return found
