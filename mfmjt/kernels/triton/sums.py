"""The second step of sums that many programs share: their parts are added up in a fixed order."""

from __future__ import annotations

from torch import Tensor

from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.launching import launch

__all__ = ["Sum", "add_up"]

Sum = tuple[Tensor, int, Tensor]
"""Parts (B, n, C), n, and the result (B, 1, C)."""


@jit
def _sum_kernel(sums, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK_COLS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    for i in tl.static_range(len(sums)):
        parts, count, result = sums[i]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), parts.dtype.element_ty)
        for start in range(0, count, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)[:, None]
            at = parts + (sample * count + row) * width + col[None, :]
            total += tl.load(at, (row < count) & (col[None, :] < width), 0.0)
        tl.store(result + sample * width + col, tl.sum(total, 0), col < width)


def add_up(sums: list[Sum]) -> None:
    """Write the results of sums of equal B and C, in one launch."""
    if sums:
        samples, _, width = sums[0][0].shape
        options = tuning.sums(max(count for _, count, _ in sums), width)
        grid = (samples * cdiv(width, options["BLOCK_COLS"]),)
        launch(_sum_kernel, grid, sums, width, **options)
