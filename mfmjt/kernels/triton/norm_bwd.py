"""The Triton kernels of the gradient of layer norm and modulation, over streams.

One kernel serves `adaln` and `gated_residual_adaln`. A program takes a number of tokens of one
sample. What a modulation (B, 1, C) gets is summed in two steps: over the rows of a program, and
then over programs in a fixed order. Streams whose modulations differ in kind, per sample or per
token, have a launch for each kind; the second step is one launch for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfmjt.kernels._op import work_dtype
from mfmjt.kernels.triton import cdiv, choose, choose_view, filled, jit, locate, tl, tuning
from mfmjt.kernels.triton.norm import columns, fits, load, mean, meta, views

__all__ = ["backward"]


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
    gate_bars,  # (B, N, C) each, or
    gate_sums,  # (B, chunks, C) each; the other is None
    shift_sums,  # None where the cotangent of shift is y_bar, or is zero
    scale_bars,  # as for gate, both None where it is zero
    scale_sums,
    counts,  # programs of each stream
    tokens,
    chunks,  # programs of a sample
    sizes,  # rows of a program
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
    for start in range(0, tl.minimum(size, length - first), BLOCK_ROWS):
        token = (first + start + tl.arange(0, BLOCK_ROWS))[None, :, None]
        exists = token < length
        inside = exists & (col < width)
        row = sample * length + token
        out = row * width + col
        x_bar = tl.zeros((SEGMENTS, BLOCK_ROWS, BLOCK_COLS), WORK)
        if y_bars is not None:
            x = load(choose_view(xs, stream), sample, token, col, inside, WORK)
            y_bar = load(choose_view(y_bars, stream), sample, token, col, inside, WORK)
            factor = 1 + load(choose_view(scales, stream), sample, token, col, inside, WORK)
            rstd = tl.load(choose(rstds, stream) + row, exists, 0.0)
            x = tl.where(inside, x - tl.load(choose(means, stream) + row, exists, 0.0), 0.0)
            rest = mean(x, width)
            n_bar = y_bar * factor
            mean_bar = mean(n_bar, width)
            projection = rstd * (mean(n_bar * x, width) - rest * mean_bar)
            n = x * rstd - rest * rstd
            x_bar = rstd * (n_bar - mean_bar - n * projection)
            if scale_bars is not None:
                tl.store(choose(scale_bars, stream) + out, y_bar * n, inside)
            if scale_sums is not None:
                scale_total += y_bar * n
            if shift_sums is not None:
                shift_total += y_bar
        if total_bars is not None:
            x_bar += load(choose_view(total_bars, stream), sample, token, col, inside, WORK)
        tl.store(choose(x_bars, stream) + out, x_bar, inside)
        if hs is not None:
            gate = load(choose_view(gates, stream), sample, token, col, inside, WORK)
            tl.store(choose(h_bars, stream) + out, x_bar * gate, inside)
            gate_bar = x_bar * load(choose_view(hs, stream), sample, token, col, inside, WORK)
            if gate_bars is not None:
                tl.store(choose(gate_bars, stream) + out, gate_bar, inside)
            if gate_sums is not None:
                gate_total += gate_bar
    sums = program.to(tl.int64) * width + col
    if gate_sums is not None:
        total = tl.sum(gate_total, 1, keep_dims=True)
        tl.store(choose(gate_sums, stream) + sums, total, col < width)
    if shift_sums is not None:
        total = tl.sum(shift_total, 1, keep_dims=True)
        tl.store(choose(shift_sums, stream) + sums, total, col < width)
    if scale_sums is not None:
        total = tl.sum(scale_total, 1, keep_dims=True)
        tl.store(choose(scale_sums, stream) + sums, total, col < width)


@jit
def _norm_sum_kernel(sums, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Run the second step: for each (parts (B, chunks, C), chunks, result (B, 1, C))."""
    blocks = tl.cdiv(width, BLOCK_COLS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    for i in tl.static_range(len(sums)):
        parts, chunks, result = sums[i]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), parts.dtype.element_ty)
        for start in range(0, chunks, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)[:, None]
            at = parts + (sample * chunks + row) * width + col[None, :]
            total += tl.load(at, (row < chunks) & (col[None, :] < width), 0.0)
        tl.store(result + sample * width + col, tl.sum(total, 0), col < width)


def backward(
    total_bars: Sequence[Tensor | None] | None,
    y_bars: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    added: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
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

    Returns:
        Of each stream the cotangents of x, h, gate, shift and scale, without those of h and gate
        where nothing was added; no elements for a shift (B, N, C), whose cotangent is that of y. Or
        NotImplemented.
    """
    hs, gates = added or (None, None)
    modulations = [shifts, scales] if gates is None else [gates, shifts, scales]
    if not fits(xs, *modulations):
        return NotImplemented
    bars_of = [None if bars is None else filled(bars, xs) for bars in (total_bars, y_bars)]
    x_bars = [x.new_empty(x.shape) for x in xs]
    h_bars = None if hs is None else [h.new_empty(h.shape) for h in hs]
    bars = [[m.new_empty(m.shape) for m in ms] for ms in modulations]
    for i, y_bar in enumerate(y_bars):
        if y_bar is None:  # the kernel may leave them as they are
            bars[-2][i].zero_()
            bars[-1][i].zero_()
        elif shifts[i].shape == xs[i].shape:
            bars[-2][i] = shifts[i].new_empty(0)
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for i, x in enumerate(xs):
        kinds.setdefault(tuple(ms[i].shape == x.shape for ms in modulations), []).append(i)
    sums: list[tuple[Tensor, int, Tensor]] = []
    given = (*bars_of, xs, hs, gates, scales, means, rstds, x_bars, h_bars)
    for whole, group in kinds.items():
        streams = [None if ts is None else tuple([ts[i] for i in group]) for ts in (*given, *bars)]
        sums += _first_step(whole, *streams)
    if sums:
        samples, _, width = sums[0][0].shape
        block_rows, block_cols, num_warps = tuning.sums(max(n for _, n, _ in sums), width)
        _norm_sum_kernel[(samples * cdiv(width, block_cols),)](
            tuple(sums),
            width,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=num_warps,
        )
    return (x_bars, *bars) if h_bars is None else (x_bars, h_bars, *bars)


def _first_step(
    whole: tuple[bool, ...],
    total_bars: Any,
    y_bars: Any,
    xs: Any,
    hs: Any,
    gates: Any,
    scales: Any,
    means: Any,
    rstds: Any,
    x_bars: Any,
    h_bars: Any,
    *bars: Any,
) -> list[tuple[Tensor, int, Tensor]]:
    """Launch for streams of one kind; all but `whole` are tuples, as of the kernel's parameters.

    `whole` says which modulations are per token, of gate (where there is one), shift and scale;
    `bars` are their cotangents. Returns parts of sums, their number in a sample, and the result.
    """
    samples, _, width = xs[0].shape
    tokens = tuple([x.shape[1] for x in xs])
    blocks = meta(width, max(tokens), xs[0].element_size(), 4)
    rows = blocks["BLOCK_ROWS"]
    most = tuning.norm_chunk(samples * sum(tokens), rows, not all(whole))
    chunks = tuple([cdiv(n, most) for n in tokens])
    sizes = tuple([cdiv(n, chunk * rows) * rows for n, chunk in zip(tokens, chunks, strict=True)])
    counts = tuple([samples * chunk for chunk in chunks])
    sums: list[tuple[Tensor, int, Tensor]] = []
    memory: list[Any] = [] if hs is not None else [None, None]  # of gate, shift and scale
    for kind, results in zip(whole[-3:], bars, strict=True):
        if y_bars is None and results is not bars[0]:
            memory += [None, None]
        elif kind:
            memory += [results, None]
        else:
            parts = [
                bar.new_empty((samples, chunk, width), dtype=work_dtype(bar))
                for bar, chunk in zip(results, chunks, strict=True)
            ]
            sums += zip(parts, chunks, results, strict=True)
            memory += [None, tuple(parts)]
    gate_bars, gate_sums, _, shift_sums, scale_bars, scale_sums = memory
    _norm_bwd_kernel[(sum(counts),)](
        *map(views, (total_bars, y_bars, xs, hs, gates, scales)),
        tuple([t.contiguous() for t in means]),
        tuple([t.contiguous() for t in rstds]),
        *(x_bars, h_bars, gate_bars, gate_sums, shift_sums, scale_bars, scale_sums),
        *(counts, tokens, chunks, sizes, width),
        **blocks,
    )
    return sums
