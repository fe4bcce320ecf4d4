"""The Triton kernels of the gradient of layer norm and modulation, over streams.

One kernel serves `adaln` and `gated_residual_adaln`. A program takes a number of tokens of one
sample. What a modulation (B, 1, C) gets is summed in two steps: over the rows of a program, and
then over programs in a fixed order. Where tokens pick rows of modulations, a program takes some of
those rows and all their tokens, in order, so that no two programs add to one sum. Streams whose
modulations differ in kind, per sample, per token or picked, have a launch for each kind; the second
step is one launch for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, jit, tl, tuning
from mfmjt.kernels.triton.device import choose, locate, put
from mfmjt.kernels.triton.launching import empty, filled, launch, present, views
from mfmjt.kernels.triton.norm import columns, fits, load, mean
from mfmjt.kernels.triton.sums import Sum, add_up

__all__ = ["backward"]


@jit
def _tokens_of(pick, row, length, col, BLOCK: tl.constexpr):
    """Return the first and the last of `length` tokens that pick each of some rows, (1, R, 1).

    A row that none picks has its last token before its first. `col` are BLOCK numbers from 0 on.
    """
    first, last = row * 0 + length, row * 0 - 1
    for start in range(0, length, BLOCK):
        token = start + col
        found = tl.load(pick + token, token < length, -1).to(tl.int32) == row
        first = tl.minimum(first, _least(tl.where(found, token, length)))
        last = tl.maximum(last, -_least(tl.where(found, -token, 1)))
    return first, last


@jit
def _least(block):
    return tl.min(tl.min(block, 0), 1)[None, :, None]


@jit
def _norm_bwd_kernel(
    total_bars,  # for each stream a `View`, as for the next five; one of the first two may be None
    y_bars,
    xs,  # what was normalised
    hs,  # None where nothing was added, and so are gates
    gates,
    scales,
    means,
    rstds,
    x_bars,
    h_bars,
    bars,  # of gate, shift and scale, (B, N, C) each; that of shift is y_bar, and not written; or
    sums,  # (B, chunks, C), (B, S, C) if picked; the other is None, and both are where it is zero
    picks,  # for each stream the row that modulates a token; or None
    counts,  # programs of each stream
    tokens,
    chunks,  # programs of a sample
    sizes,  # tokens of a program, or rows of modulations
    picked_from,  # rows of modulations of a sample, where they are picked
    width,
    SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    WORK: tl.constexpr = means[0].dtype.element_ty
    stream, program, _ = locate(counts, tl.program_id(0), 1)
    length, size = choose(tokens, stream), choose(sizes, stream)
    chunk = choose(chunks, stream)
    sample = (program // chunk).to(tl.int64)
    first = (program % chunk).to(tl.int64) * size
    col = columns(SEGMENTS, BLOCK_COLS)
    zeros = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), WORK)
    gate_total, shift_total, scale_total = zeros, zeros, zeros
    of = (first + tl.arange(0, BLOCK_ROWS))[None, :, None]  # the row of modulations
    STEP: tl.constexpr = BLOCK_ROWS if picks is None else 1
    if picks is None:
        most = tl.minimum(size, length - first)
    else:
        pick = choose(picks, stream)
        begin, last = _tokens_of(pick, of.to(tl.int32), length, col, SEGMENTS * BLOCK_COLS)
        most = tl.max(last - begin, None) + 1
    for start in range(0, most, STEP):
        if picks is None:
            token = (first + start + tl.arange(0, BLOCK_ROWS))[None, :, None]
            exists = token < length
            of = token
        else:
            token = begin + start
            exists = token <= last
            exists = exists & (tl.load(pick + token, exists, -1) == of)
        inside = exists & (col < width)
        row = sample * length + token
        out = row * width + col
        x_bar = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), WORK)
        # All loads come before the first sum, which waits: so they are under way together.
        if y_bars is not None:
            x = load(xs, stream, sample, token, col, inside, WORK)
            y_bar = load(y_bars, stream, sample, token, col, inside, WORK)
            factor = 1 + load(scales, stream, sample, of, col, inside, WORK)
            rstd = tl.load(choose(rstds, stream) + row, exists, 0.0)
            x = tl.where(inside, x - tl.load(choose(means, stream) + row, exists, 0.0), 0.0)
        if total_bars is not None:
            total_bar = load(total_bars, stream, sample, token, col, inside, WORK)
        if hs is not None:
            h = load(hs, stream, sample, token, col, inside, WORK)
            gate = load(gates, stream, sample, of, col, inside, WORK)
        if y_bars is not None:
            rest = mean(x, width)
            n_bar = y_bar * factor
            mean_bar = mean(n_bar, width)
            projection = rstd * (mean(n_bar * x, width) - rest * mean_bar)
            n = x * rstd - rest * rstd
            x_bar = rstd * (n_bar - mean_bar - n * projection)
            scale_bar = y_bar * n
            put(bars[2], stream, out, scale_bar, inside)
            shift_total += y_bar
            scale_total += scale_bar
        if total_bars is not None:
            x_bar += total_bar
        put(x_bars, stream, out, x_bar, inside)
        if hs is not None:
            put(h_bars, stream, out, x_bar * gate, inside)
            gate_bar = x_bar * h
            put(bars[0], stream, out, gate_bar, inside)
            gate_total += gate_bar
    if picks is None:
        part = program.to(tl.int64) * width + col
        put(sums[0], stream, part, tl.sum(gate_total, 1, keep_dims=True), col < width)
        put(sums[1], stream, part, tl.sum(shift_total, 1, keep_dims=True), col < width)
        put(sums[2], stream, part, tl.sum(scale_total, 1, keep_dims=True), col < width)
    else:
        count = choose(picked_from, stream)
        part = (sample * count + of) * width + col
        inside = (of < count) & (col < width)
        put(sums[0], stream, part, gate_total, inside)
        put(sums[1], stream, part, shift_total, inside)
        put(sums[2], stream, part, scale_total, inside)


def backward(
    total_bars: Sequence[Tensor | None] | None,
    y_bars: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    added: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
    picks: Sequence[Tensor | None],
) -> Any:
    """Run the kernels.

    Args:
        total_bars: Cotangents of the sums, None where none arrived; None where nothing was added.
        y_bars: Cotangents of the results, likewise.
        xs: What was normalised.
        added: h and gate of each stream, or None.
        shifts: As in the forward pass.
        scales: Likewise.
        means: From the forward pass.
        rstds: Likewise.
        picks: As in the forward pass.

    Returns:
        Of each stream the cotangents of x, h, gate, shift and scale, without those of h and gate
        where nothing was added; no elements for a shift (B, N, C), whose cotangent is that of y. Or
        NotImplemented.
    """
    hs, gates = added or (None, None)
    modulations: tuple[Any, ...] = (gates, shifts, scales)
    if not fits(xs, picks, *filter(None, modulations)):
        return NotImplemented
    bars: list[Any] = [None if ms is None else empty(ms) for ms in modulations]
    _, shift_bars, scale_bars = bars
    for i, y_bar in enumerate(y_bars):
        if y_bar is None:  # the kernel may leave them as they are
            shift_bars[i].zero_()
            scale_bars[i].zero_()
        elif shifts[i].shape == xs[i].shape and picks[i] is None:
            shift_bars[i] = shifts[i].new_empty(0)
    x_bars, h_bars = empty(xs), hs and empty(hs)
    tensors: list[Any] = [ts and filled(ts, xs) for ts in (total_bars, y_bars)]
    tensors += [xs, hs, gates, scales, means, rstds, x_bars, h_bars, list(picks), *bars]
    per_token = [
        tuple([pick is None and bool(ms) and ms[i].shape == x.shape for ms in modulations])
        for i, (x, pick) in enumerate(zip(xs, picks, strict=True))
    ]
    found = [(whole, pick is not None) for whole, pick in zip(per_token, picks, strict=True)]
    sums: list[Sum] = []
    for kind in dict.fromkeys(found):
        group = [i for i, own in enumerate(found) if own == kind]
        sums += _first_step(kind[0], [ts and [ts[i] for i in group] for ts in tensors])
    add_up(sums)
    return tuple([ts for ts in (x_bars, h_bars, *bars) if ts is not None])


def _first_step(per_token: tuple[bool, ...], tensors: list[Any]) -> list[Sum]:
    """Launch for streams of one kind: `per_token` says which of gate, shift and scale are.

    Returns the sums over programs that are still to do.
    """
    total_bars, y_bars, xs, hs, gates, scales, means, rstds, x_bars, h_bars, picks, *bars = tensors
    picks = present(picks)
    samples, _, width = xs[0].shape
    tokens = [x.shape[1] for x in xs]
    taken = [scale.shape[1] for scale in scales] if picks else tokens
    options = tuning.norm(width, max(taken), xs[0].element_size(), 1 if picks else 4)
    rows = options["BLOCK_ROWS"]
    summed = not picks and not all(
        whole for whole, results in zip(per_token, bars, strict=True) if results
    )
    most = tuning.norm_chunk(samples * sum(tokens), rows, summed)
    chunks = [cdiv(n, most) for n in taken]
    sizes = [cdiv(n, chunk * rows) * rows for n, chunk in zip(taken, chunks, strict=True)]
    counts = [samples * chunk for chunk in chunks]
    sums: list[Sum] = []
    written: list[Any] = [None] * 3
    parts: list[Any] = [None] * 3
    for i, results in enumerate(bars):
        if results is None or (y_bars is None and i > 0):
            continue
        if per_token[i]:
            written[i] = results
        elif picks:
            parts[i] = results
        else:
            parts[i] = [
                bar.new_empty((samples, chunk, width), dtype=work_dtype(bar))
                for bar, chunk in zip(results, chunks, strict=True)
            ]
            sums += zip(parts[i], chunks, results, strict=True)
    launch(
        _norm_bwd_kernel,
        (sum(counts),),
        *map(views, (total_bars, y_bars, xs, hs, gates, scales)),
        *([t.contiguous() for t in ts] for ts in (means, rstds)),
        *(x_bars, h_bars, written, parts, picks and picks[0]),
        *(counts, tokens, chunks, sizes),
        taken if picks else None,
        width,
        **options,
    )
    return sums
