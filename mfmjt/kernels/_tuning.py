"""Launch configurations of the Triton kernels: blocks, warps and pipeline stages.

Functions of sizes and of the GPU's compute capability, checked without a GPU: every configuration
that they can return for the network's shapes compiles for sm_80, sm_90, sm_100 and gfx942 without
spills (`python -m bench.aot`). None has been tuned on a GPU yet.
"""

from __future__ import annotations

from mfmjt.kernels._triton import cdiv, power_of_2

__all__ = ["REDUCING_PROGRAMS", "elementwise", "heads", "sum_of_rows"]


def elementwise(rows: int, width: int) -> tuple[int, int, int]:
    """Block of rows, block of columns and warps of an element-wise kernel over (rows, width).

    A thread has 8 elements of every tensor, 16 bytes of bf16: with 16, five float32 tensors spill
    on sm_80. Of the column blocks the one that covers the width with the fewest idle lanes.
    """
    widest = min(1024, power_of_2(width))
    blocks = [b for b in (1024, 512, 256, 128) if b <= widest] or [widest]
    block_cols = min(blocks, key=lambda b: cdiv(width, b) * b)
    return min(power_of_2(rows), 1024 // block_cols), block_cols, 4


def conv1d(rows: int, outs: int, element_size: int) -> tuple[tuple[int, int, int], int, int]:
    """Blocks of rows, outputs and channels, warps and stages of a convolution of (rows, outs)."""
    return (64, 64, 32), 4, 2


def conv1d_weight(
    samples: int, tokens: int, outs: int, channels: int, taps: int, element_size: int
) -> tuple[tuple[int, int, int], int, int, int]:
    """Blocks of outputs, channels and tokens, warps, stages and splits of a weight's gradient."""
    return (64, 64, 32), 4, 2, 2


def heads(width: int) -> tuple[int, int, int]:
    """Block of rows, block of columns and warps of a kernel over heads of that width.

    A thread has 8 elements of every tensor, and a warp whole heads.
    """
    block_width = max(16, power_of_2(width))
    return max(1, 1024 // block_width), block_width, 4


REDUCING_PROGRAMS = 1024
"""Most programs of a kernel that leaves one row of partial sums each: 8 per multiprocessor and
more, and so few rows that adding them up takes no time."""


def sum_of_rows(n: int) -> tuple[int, int, int]:
    """Block of rows, block of columns and warps of a sum over n short rows of partial sums."""
    return min(128, max(16, power_of_2(n))), 16, 4
