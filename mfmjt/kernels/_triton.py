"""Names of `mfmjt.kernels.triton` for op files that still hold their Triton kernels."""

from __future__ import annotations

import importlib
from typing import Any

from mfmjt.kernels._backends import AVAILABLE, INTERPRETED, ON_CPU

if AVAILABLE:
    from mfmjt.kernels.triton import cdiv, fma, jit, power_of_2, rows, target, tl, wide
else:
    cdiv = fma = power_of_2 = rows = target = tl = wide = None  # type: ignore[assignment]

    def jit(kernel):
        return kernel


def lazily(op: str, part: str, formula: Any) -> Any:
    """Return launcher `part` of `mfmjt.kernels.triton.<op>`, or the formula where it declines."""

    def launch(*args: Any) -> Any:
        found = getattr(importlib.import_module(f"mfmjt.kernels.triton.{op}"), part)(*args)
        return formula(*args) if found is NotImplemented else found

    return launch


__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "ON_CPU",
    "cdiv",
    "fma",
    "jit",
    "lazily",
    "power_of_2",
    "rows",
    "target",
    "tl",
    "wide",
]
