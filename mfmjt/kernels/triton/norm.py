"""The Triton kernel of layer norm and modulation: value and tangent, over streams.

It serves `adaln` and `gated_residual_adaln`: the gated sum, tangents and rows to pick may each be
absent. A program keeps a block of whole rows in registers. Rows are counted over all samples of a
stream, and a launch has programs of all its streams, which share batch, width and dtype. Where
streams differ in these, rows are wider than 8192 or nothing is in them, ops go stream by stream or
run their formulas; so they do where a modulation is neither (B, 1, C) nor (B, N, C) and its rows
are not picked.

Rows are centred twice: what rounding left in the mean goes with the second, so that a large offset
costs no digits and a constant row is normalised to zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import at, await_launches, choose, locate, put
from mfmjt.kernels.triton.launching import alike, empty, filled, launch, present, views

__all__ = ["MAX_WIDTH", "columns", "fits", "forward", "load", "mean"]

MAX_WIDTH = 8192  # channels of a row that fits into the registers of one program


@jit
def columns(SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the columns of a block, (K, 1, V): see `tuning.norm`."""
    segment = tl.arange(0, SEGMENTS)[:, None, None] * BLOCK
    return segment + tl.arange(0, BLOCK)[None, None, :]


@jit
def load(tensors, stream, sample, token, col, inside, WORK: tl.constexpr):
    """Load a block (K, R, V) of rows of one of a tuple of `View`s, zero outside, in dtype WORK."""
    pointers = at(tensors, stream, sample, token) + (token * 0 + col)
    return tl.load(pointers, inside, 0.0).to(WORK)


@jit
def mean(block, width):
    """Return the means of rows (K, R, V), zero outside, as (1, R, 1)."""
    return (tl.sum(tl.sum(block, 0), 1) / width)[None, :, None]


@jit
def _norm_fwd_kernel(
    xs,  # for each stream a `View`, as for the next nine
    hs,  # None where nothing is added, and so are gates; of PARTS to add up the first
    gates,
    shifts,
    scales,
    x_dots,  # this and the next four None where they are zero
    h_dots,
    gate_dots,
    shift_dots,
    scale_dots,
    picks,  # (rows that modulate tokens, 1 for each stream that has them); or None
    totals,  # None where nothing is added
    total_dots,
    ys,
    y_dots,  # None where no tangent is wanted
    means,
    rstds,
    counts,  # rows of each stream, tokens of all its samples
    tokens,
    width,
    EPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_launches(EARLY)
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
        rows, given = picks
        picked = exists & (choose(given, stream) == 1)
        of = tl.where(picked, tl.load(choose(rows, stream) + token, picked, 0).to(tl.int64), token)
    x = load(xs, stream, sample, token, col, inside, WORK)
    if hs is not None:
        h = load(hs, stream, sample, token, col, inside, WORK)
        for part in tl.static_range(1, PARTS):
            h += load(hs, stream, sample, token, col + part * count * width, inside, WORK)
        gate = load(gates, stream, sample, of, col, inside, WORK)
        total = (x + gate * h).to(STORED)  # what is normalised is what is stored
        put(totals, stream, out, total, inside)
        x = total.to(WORK)
    x_dot = None
    if x_dots is not None:
        x_dot = load(x_dots, stream, sample, token, col, inside, WORK)
    if total_dots is not None:
        if x_dot is None:
            x_dot = tl.zeros_like(x)
        if h_dots is not None:
            x_dot += gate * load(h_dots, stream, sample, token, col, inside, WORK)
        if gate_dots is not None:
            x_dot += h * load(gate_dots, stream, sample, of, col, inside, WORK)
        put(total_dots, stream, out, x_dot, inside)
    centre = mean(x, width)
    x = tl.where(inside, x - centre, 0.0)
    rest = mean(x, width)  # what rounding left in it
    variance = mean(x * x, width) - rest * rest
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
    put(means, stream, row, centre + rest, exists)
    put(rstds, stream, row, rstd, exists)
    n = x * rstd - rest * rstd
    factor = 1 + load(scales, stream, sample, of, col, inside, WORK)
    y = n * factor + load(shifts, stream, sample, of, col, inside, WORK)
    put(ys, stream, out, y, inside)
    if y_dots is not None:
        y_dot = tl.zeros_like(n)
        if x_dot is not None:
            x_dot -= mean(x_dot, width)
            projection = rstd * mean(x * x_dot, width)  # x, unlike n, is zero outside
            y_dot += (x_dot - n * projection) * (rstd * factor)
        if scale_dots is not None:
            y_dot += n * load(scale_dots, stream, sample, of, col, inside, WORK)
        if shift_dots is not None:
            y_dot += load(shift_dots, stream, sample, of, col, inside, WORK)
        put(y_dots, stream, out, y_dot, inside)


def fits(
    xs: Sequence[Tensor], picks: Sequence[Tensor | None], *modulations: Sequence[Tensor]
) -> bool:
    """Return True if one launch serves these streams, with modulations per sample or per token."""
    if xs[0].ndim != 3 or xs[0].shape[2] > MAX_WIDTH or not alike(xs, *modulations):
        return False
    batch, _, width = xs[0].shape
    if any(x.ndim != 3 or x.shape[::2] != (batch, width) for x in xs):
        return False
    return all(
        m.shape in (x.shape, (batch, 1, width)) or (pick is not None and m.ndim == 3)
        for ms in modulations
        for x, pick, m in zip(xs, picks, ms, strict=True)
    )


def forward(
    added: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    xs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    dots: Sequence[Sequence[Tensor | None] | None] | None,
    eps: float,
    picks: Sequence[Tensor | None],
) -> Any:
    """Run the kernel.

    Args:
        added: h and gate of each stream, or None; where no tangent is wanted h may be in parts
            that add up to it, (P, B, N, C) in the dtype of sums.
        xs: (B, N, C) of each stream.
        shifts: (B, 1, C) or (B, N, C) of each stream; (B, S, C) where rows are picked.
        scales: Likewise.
        dots: Tangents of x, h, gate, shift and scale, those of h and gate None where nothing is
            added; or None where no tangent is wanted.
        eps: Added to the variance.
        picks: For each stream (N,) the rows to pick, or None.

    Returns:
        Of each stream: totals, their tangents, results, their tangents, means and rstds, without
        those of what is None. Or NotImplemented.
    """
    hs, gates = added or (None, None)
    modulations = [shifts, scales] if gates is None else [gates, shifts, scales]
    if not fits(xs, picks, *modulations):
        return NotImplemented
    partial = hs if hs is not None and hs[0].ndim == 4 else None
    if partial is not None:
        hs = [h[0] for h in partial]
    moving = (xs, hs, gates, shifts, scales)
    tangents = [
        None if dot is None or x is None else views(filled(dot, x))
        for dot, x in zip(dots or (None,) * 5, moving, strict=True)
    ]
    work = work_dtype(xs[0])
    means = [x.new_empty((*x.shape[:2], 1), dtype=work) for x in xs]
    results = (
        None if hs is None else empty(xs),
        None if hs is None or dots is None else empty(xs),
        empty(xs),
        None if dots is None else empty(xs),
        means,
        empty(means),
    )
    operands: list[Any] = list(map(views, moving))
    if partial is not None:  # the first begins where all do
        operands[1] = [v._replace(pointer=h) for v, h in zip(operands[1], partial, strict=True)]
    counts, width = [x.shape[0] * x.shape[1] for x in xs], xs[0].shape[2]
    options = tuning.norm(width, max(counts), xs[0].element_size(), 1)
    launch(
        _norm_fwd_kernel,
        (sum(cdiv(n, options["BLOCK_ROWS"]) for n in counts),),
        *operands,
        *tangents,
        present(picks),
        *results,
        counts,
        [x.shape[1] for x in xs],
        width,
        EPS=eps,
        PARTS=1 if partial is None else len(partial[0]),
        **options,
    )
    return tuple([ys for ys in results if ys is not None])
