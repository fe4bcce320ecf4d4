"""Figures: what every one of them is made of. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.codec.mel import htk_mel, mel_power
from mfmjt.errors import InputError
from mfmjt.files import atomic_path

__all__ = ["COLORS", "check_matplotlib", "figure", "plot_sound", "plot_spectrograms", "spectrogram"]

Times = Sequence[float] | np.ndarray
"""Seconds."""

# Distinct for every kind of color vision, and by lightness in print (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Text stays text: smaller files, and it can be searched and read aloud.
    "svg.fonttype": "none",
    "svg.hashsalt": "mfmjt",
}
WINDOW = 0.032  # s
FLOOR = -70.0  # dB
LOWEST = 40.0  # Hz


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Plots need matplotlib, which is not installed. Run: pip install 'mfmjt[plot]'"
        ) from error


@contextmanager
def figure(
    path: str | os.PathLike[str], size: tuple[float, float], dpi: int = 100
) -> Iterator[Any]:
    """Give an empty matplotlib `Figure` that is written to `path` at the end.

    Args:
        path: Picture to write, such as a `.png` or `.svg`; equal data give equal files.
        size: Width and height in inches.
        dpi: Pixels per inch.

    Raises:
        InputError: matplotlib is not installed.
        RunError: The picture cannot be written.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        # No pyplot: it would choose a window system and keep every figure alive.
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        dated = {"Date": None} if Path(path).suffix == ".svg" else None
        with atomic_path(path) as temporary:
            drawn.savefig(temporary, dpi=dpi, metadata=dated)


def spectrogram(
    axis: Any,
    waveform: Tensor,
    sample_rate: int,
    *,
    hop: float = 0.008,
    bands: int = 80,
    step: float = 0.0,
) -> None:
    """Draw the log-mel spectrogram of a sound, in dB under its loudest point, down to -70.

    Args:
        axis: Axes of matplotlib.
        waveform: Samples `(S,)`.
        sample_rate: In Hz.
        hop: Seconds from one spectrum to the next.
        bands: Mel bands.
        step: Levels are rounded to multiples of this, in dB, which makes files smaller.
    """
    wave = waveform.detach().cpu().float()
    window = 2 ** round(np.log2(WINDOW * sample_rate))
    power = mel_power(wave[None], sample_rate, window, max(1, round(hop * sample_rate)), bands)[0]
    level = (10 * torch.log10(power.T / power.max().clamp(min=1e-10))).clamp(min=FLOOR)
    axis.imshow(
        ((level / step).round() * step if step else level).numpy(),
        origin="lower",
        aspect="auto",
        interpolation="none",
        cmap="magma",
        extent=(
            0,
            len(wave) / sample_rate,
            *htk_mel(torch.tensor([LOWEST, sample_rate / 2])).tolist(),
        ),
        vmin=FLOOR,
        vmax=0,
    )
    ticks = [khz for khz in (0.25, 1, 2, 4, 8, 16) if khz * 2000 <= sample_rate]
    axis.set_yticks(htk_mel(torch.tensor(ticks) * 1000).tolist(), [f"{khz:g}" for khz in ticks])


def plot_spectrograms(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    columns: Sequence[str],
    sample_rate: int,
    times: Sequence[tuple[Times, Sequence[Times]]] | None = None,
    **look: Any,
) -> None:
    """Draw sounds as a grid of spectrograms.

    Args:
        path: Picture to write.
        rows: A label, and one waveform `(S,)` per column.
        columns: Titles of the columns.
        sample_rate: In Hz.
        times: For each row, the seconds of events, marked above each of its columns, and, where
            there are any, those of onsets in each column, marked below it.
        look: Further arguments of `spectrogram`.

    Raises:
        InputError: matplotlib is not installed.
        RunError: The picture cannot be written.
    """
    with figure(path, (4.8 * len(columns), 1.5 * len(rows) + 0.6), dpi=90) as drawn:
        grid = drawn.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for axis, title in zip(grid[0], columns, strict=True):
            axis.set_title(title, pad=7)
        for axis in grid[-1]:
            axis.set_xlabel("s" if times is None else "s   (▾ events, ▴ onsets detected)")
        for i, (label, waveforms) in enumerate(rows):
            grid[i, 0].set_ylabel("kHz")
            for j, waveform in enumerate(waveforms):
                spectrogram(grid[i, j], waveform, sample_rate, **look)
                if times is not None and len(times[i][0]):
                    _mark(grid[i, j], times[i][0], 1.05, "v", COLORS[0])
                    _mark(grid[i, j], times[i][1][j], -0.05, "^", COLORS[1])
            grid[i, 0].text(
                0.01, 0.94, label, color="white", fontsize=8, va="top",
                transform=grid[i, 0].transAxes,
            )  # fmt: skip


def _mark(axis: Any, times: Times, height: float, marker: str, color: str) -> None:
    if len(times):  # the extent of an empty line that is not clipped is infinite
        axis.plot(
            times,
            [height] * len(times),
            marker,
            color=color,
            markersize=3,
            clip_on=False,
            transform=axis.get_xaxis_transform(),
        )


def plot_sound(
    path: str | os.PathLike[str],
    waveform: Tensor,
    sample_rate: int,
    onsets: Times,
    frames: tuple[Sequence[np.ndarray], float] | None = None,
) -> None:
    """Draw frames of the video, the waveform and its spectrogram over one time axis.

    Args:
        path: Picture to write.
        waveform: Samples `(S,)`.
        sample_rate: In Hz.
        onsets: Seconds to draw lines at, through all of them.
        frames: Frames `(H, W, 3)` uint8 from equal parts of the video, and the second at which the
            last part ends; None for a sound without video.

    Raises:
        InputError: matplotlib is not installed.
        RunError: The picture cannot be written.
    """
    heights = [1.5, 2.0] if frames is None else [1.0, 1.5, 2.0]
    with figure(path, (12.0, 1.0 + sum(heights)), dpi=110) as drawn:
        axes = drawn.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        if frames is not None:
            shown, end = frames
            axes[0].imshow(np.concatenate(shown, axis=1), extent=(0, end, 0, 1), aspect="auto")
            axes[0].set_yticks([])
        wave, spectrum = axes[-2:]
        wave.plot(np.arange(len(waveform)) / sample_rate, waveform.numpy(), linewidth=0.4)
        wave.set_ylabel("amplitude")
        spectrogram(spectrum, waveform, sample_rate)
        spectrum.set_ylabel("kHz")
        spectrum.set_xlabel("seconds")
        spectrum.set_xlim(0, len(waveform) / sample_rate)
        for onset in onsets:
            for axis in axes:
                axis.axvline(onset, color=COLORS[2], linewidth=0.7, alpha=0.9)
