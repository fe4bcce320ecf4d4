"""Names of `mfmjt.kernels.triton` for op files that still hold their Triton kernels."""

from __future__ import annotations

from mfmjt.kernels._backends import AVAILABLE, INTERPRETED, ON_CPU

if AVAILABLE:
    from mfmjt.kernels.triton import cdiv, fma, jit, power_of_2, rows, target, tl, wide
else:
    cdiv = fma = power_of_2 = rows = target = tl = wide = None  # type: ignore[assignment]

    def jit(kernel):
        return kernel


__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "ON_CPU",
    "cdiv",
    "fma",
    "jit",
    "power_of_2",
    "rows",
    "target",
    "tl",
    "wide",
]
