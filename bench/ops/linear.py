"""`linear` as the projection of the latent stream to q, k and v.

The product is the vendor's; what is ours is that a tangent costs one product more and not two.
"""

from __future__ import annotations

from bench.case import Case, Cost, Input, shapes
from mfmjt.kernels.linear import linear, linear_ref

__all__ = ["cases"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    found = []
    for s in shapes(scale):
        n, outs = s.batch * s.length, 3 * s.dim
        moved, weight = n * (s.dim + outs), outs * s.dim
        found.append(
            s.case(
                "linear",
                {
                    "x": s.rows,
                    "weight": Input((outs, s.dim), moves=False, scale=s.dim**-0.5),
                    "bias": Input((outs,), moves=False),
                },
                function=linear,
                reference=linear_ref,
                flops=Cost(1, 1, 2).times(2 * n * s.dim * outs),
                elements=Cost(moved + weight, moved, moved + n * s.dim + 2 * weight),
                terms=max(n, outs),
            )
        )
    return found
