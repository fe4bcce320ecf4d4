"""The Triton kernel of layer norm and modulation: value and tangent, over streams.

It serves `adaln` and `gated_residual_adaln`: the gated sum, tangents and rows to pick may each be
absent. A program keeps a block of whole rows in registers. Rows are counted over all samples of a
stream, and a launch has programs of all its streams, which share batch, width and dtype. Where
streams differ in these, rows are wider than 8192 or nothing is in them, ops go stream by stream or
run their formulas; so they do where a modulation is neither (B, 1, C) nor (B, N, C).

Rows are centred twice: what rounding left in the mean goes with the second, so that a large offset
costs no digits and a constant row is normalised to zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import (
    View,
    cdiv,
    choose,
    choose_view,
    filled,
    jit,
    locate,
    tl,
    tuning,
)

__all__ = ["MAX_WIDTH", "by_rows", "columns", "forward", "load", "mean", "meta", "views"]

MAX_WIDTH = 8192  # channels of a row that fits into the registers of one program


@jit
def columns(SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the columns of a block, (K, 1, V): see `tuning.norm`."""
    segment = tl.arange(0, SEGMENTS)[:, None, None] * BLOCK
    return segment + tl.arange(0, BLOCK)[None, None, :]


@jit
def load(view, sample, token, col, inside, WORK: tl.constexpr):
    """Load a block (K, R, V) of a view's rows in the dtype of sums, zero outside."""
    pointer, sample_stride, token_stride, _ = view
    at = pointer + (token * 0 + col)
    if sample_stride is not None:
        at += sample * sample_stride
    if token_stride is not None:
        at += token * token_stride
    return tl.load(at, inside, 0.0).to(WORK)


@jit
def mean(block, width):
    """Return the means of rows (K, R, V), zero outside, as (1, R, 1)."""
    return (tl.sum(tl.sum(block, 0), 1) / width)[None, :, None]


@jit
def _norm_fwd_kernel(
    xs,  # for each stream a `View`, as for the next nine
    hs,  # None where nothing is added, and so are gates
    gates,
    shifts,
    scales,
    x_dots,  # this and the next four None where they are zero
    h_dots,
    gate_dots,
    shift_dots,
    scale_dots,
    picks,  # for each stream the row that modulates a token, or None for row n of token n; or None
    totals,  # None where nothing is added
    total_dots,
    ys,
    y_dots,  # None where no tangent is wanted
    means,  # None where no gradient will be, and so are rstds
    rstds,
    counts,  # rows of each stream, tokens of all its samples
    tokens,
    width,
    EPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    STORED: tl.constexpr = ys[0].dtype.element_ty
    WORK: tl.constexpr = tl.float64 if tl.float64 == STORED else tl.float32
    stream, start, count = locate(counts, tl.program_id(0), BLOCK_ROWS)
    row = (start + tl.arange(0, BLOCK_ROWS))[None, :, None]
    col = columns(SEGMENTS, BLOCK_COLS)
    exists = row < count
    inside = exists & (col < width)
    length = choose(tokens, stream)
    sample = (row // length).to(tl.int64)
    token = row.to(tl.int64) - sample * length
    out = row.to(tl.int64) * width + col
    of = token  # the row of modulations
    if picks is not None:
        for s in tl.static_range(len(ys)):
            if picks[s] is not None:
                picked = tl.load(picks[s] + token, exists & (stream == s), 0).to(tl.int64)
                of = tl.where(stream == s, picked, of)
    x = load(choose_view(xs, stream), sample, token, col, inside, WORK)
    if hs is not None:
        h = load(choose_view(hs, stream), sample, token, col, inside, WORK)
        gate = load(choose_view(gates, stream), sample, of, col, inside, WORK)
        total = (x + gate * h).to(STORED)  # what is normalised is what is stored
        tl.store(choose(totals, stream) + out, total, inside)
        x = total.to(WORK)
    x_dot = None
    if x_dots is not None:
        x_dot = load(choose_view(x_dots, stream), sample, token, col, inside, WORK)
    if total_dots is not None:
        if x_dot is None:
            x_dot = tl.zeros_like(x)
        if h_dots is not None:
            x_dot += gate * load(choose_view(h_dots, stream), sample, token, col, inside, WORK)
        if gate_dots is not None:
            x_dot += h * load(choose_view(gate_dots, stream), sample, of, col, inside, WORK)
        tl.store(choose(total_dots, stream) + out, x_dot, inside)
    centre = mean(x, width)
    x = tl.where(inside, x - centre, 0.0)
    rest = mean(x, width)  # what rounding left in it
    variance = mean(x * x, width) - rest * rest
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
    if means is not None:
        tl.store(choose(means, stream) + row, centre + rest, exists)
        tl.store(choose(rstds, stream) + row, rstd, exists)
    n = x * rstd - rest * rstd
    factor = 1 + load(choose_view(scales, stream), sample, of, col, inside, WORK)
    y = n * factor + load(choose_view(shifts, stream), sample, of, col, inside, WORK)
    tl.store(choose(ys, stream) + out, y, inside)
    if y_dots is not None:
        y_dot = tl.zeros_like(n)
        if x_dot is not None:
            x_dot -= mean(x_dot, width)
            projection = rstd * mean(x * x_dot, width)  # x, unlike n, is zero outside
            y_dot += (x_dot - n * projection) * (rstd * factor)
        if scale_dots is not None:
            y_dot += n * load(choose_view(scale_dots, stream), sample, of, col, inside, WORK)
        if shift_dots is not None:
            y_dot += load(choose_view(shift_dots, stream), sample, of, col, inside, WORK)
        tl.store(choose(y_dots, stream) + out, y_dot, inside)


def fits(xs: Sequence[Tensor], *modulations: Sequence[Tensor], picked: bool = False) -> bool:
    """Return True if one launch serves these streams, with modulations per sample or per token."""
    first = xs[0]
    if first.ndim != 3 or not 0 < first.shape[2] <= MAX_WIDTH:
        return False
    batch, _, width = first.shape
    for x in xs:
        if x.ndim != 3 or x.shape[::2] != (batch, width) or x.dtype != first.dtype or not x.numel():
            return False
    for ms in modulations:
        for x, m in zip(xs, ms, strict=True):
            shapes = (x.shape, (batch, 1, width))
            if m.dtype != ms[0].dtype or not (m.shape in shapes or (picked and m.ndim == 3)):
                return False
    return True


def views(tensors: Sequence[Tensor] | None) -> tuple[View, ...] | None:
    """Return rows (B or 1, N or 1, C) of each stream as the kernels read them."""
    return None if tensors is None else tuple(map(_view, tensors))


def _view(x: Tensor) -> View:
    x = x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
    sample, token = (d if n > 1 else 0 for n, d in zip(x.shape[:2], x.stride()[:2], strict=True))
    return View(x, sample or None, token or None)


def meta(width: int, tokens: int, element_size: int, teams: int) -> dict[str, Any]:
    """Return the sizes of a block, see `tuning.norm`, and warps and registers of its launch."""
    segments, block_rows, block_cols, num_warps = tuning.norm(width, tokens, element_size, teams)
    blocks = {"SEGMENTS": segments, "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols}
    return {**blocks, "num_warps": num_warps, **tuning.registers(num_warps)}


def forward(
    added: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    xs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    dots: Sequence[Sequence[Tensor | None] | None] | None,
    eps: float,
    picks: Sequence[Tensor | None] | None = None,
) -> Any:
    """Run the kernel.

    Args:
        added: h and gate of each stream, or None.
        xs: (B, N, C) of each stream.
        shifts: (B, 1, C) or (B, N, C) of each stream; (B or 1, S, C) where rows are picked.
        scales: Likewise.
        dots: Tangents of x, h, gate, shift and scale, those of h and gate None where nothing is
            added; or None where no tangent is wanted.
        eps: Added to the variance.
        picks: (N,) integers for each stream, or None; then there are no statistics.

    Returns:
        Of each stream: totals, their tangents, results, their tangents, means and rstds; None for
        what was not asked for. Or NotImplemented.
    """
    hs, gates = added or (None, None)
    modulations = [shifts, scales] if gates is None else [gates, shifts, scales]
    if not fits(xs, *modulations, picked=picks is not None):
        return NotImplemented

    def alike() -> list[Tensor]:
        return [x.new_empty(x.shape) for x in xs]

    def statistics() -> list[Tensor] | None:
        shape = [(*x.shape[:2], 1) for x in xs]
        dtype = work_dtype(xs[0])
        return None if picks else [xs[0].new_empty(s, dtype=dtype) for s in shape]

    moves = dots is not None
    likes = (xs, hs, gates, shifts, scales)
    tangents = [
        None if d is None or like is None else views(filled(d, like))
        for d, like in zip(dots or (None,) * 5, likes, strict=True)
    ]
    results = (
        None if hs is None else alike(),
        alike() if moves and hs is not None else None,
        alike(),
        alike() if moves else None,
        statistics(),
        statistics(),
    )
    counts = tuple(x.shape[0] * x.shape[1] for x in xs)
    sizes = meta(xs[0].shape[2], max(counts), xs[0].element_size(), 1)
    _norm_fwd_kernel[(sum(cdiv(n, sizes["BLOCK_ROWS"]) for n in counts),)](
        *map(views, likes),
        *tangents,
        None if picks is None else tuple(p if p is None else p.contiguous() for p in picks),
        *(None if result is None else tuple(result) for result in results),
        counts,
        tuple(x.shape[1] for x in xs),
        xs[0].shape[2],
        EPS=eps,
        **sizes,
    )
    return results


def by_rows(
    xs: list[Tensor],
    hs: list[Tensor],
    gates: list[Tensor],
    shifts: list[Tensor],
    scales: list[Tensor],
    rows: list[Tensor | None],
    eps: float,
) -> Any:
    """Run the kernel of inference, with rows of modulations to pick."""
    found = forward((hs, gates) if hs else None, xs, shifts, scales, None, eps, rows)
    return found if found is NotImplemented else (found[0] or [], found[2])
