"""Launch configurations of the Triton kernels: blocks, warps and pipeline stages.

Functions of sizes and of the GPU's compute capability, checked without a GPU: every configuration
that they can return for the network's shapes compiles for sm_80, sm_90, sm_100 and gfx942 without
spills (`python -m bench.aot`). None has been tuned on a GPU yet.
"""

from __future__ import annotations

from mfmjt.kernels._triton import power_of_2

__all__ = ["elementwise"]


def elementwise(rows: int, width: int) -> tuple[int, int, int]:
    """Block of rows, block of columns and warps of an element-wise kernel over (rows, width)."""
    block_cols = min(1024, power_of_2(width))
    block_rows = min(power_of_2(rows), max(1, 2048 // block_cols))
    return block_rows, block_cols, 4
