"""One picture of a sound and what it was made for: frames, waveform, spectrum, onsets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.files import atomic_path
from mfmjt.media import VideoStream, as_source

__all__ = ["check_plot", "save_plot"]

THUMBNAILS = 12
RATE = 25
WIDTH = 12.0  # inches


def check_plot() -> None:
    """Raise InputError if matplotlib, which plots need, is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Plots need matplotlib, which is not installed. Run: pip install 'mfmjt[plot]'"
        ) from error


def save_plot(
    path: str | os.PathLike[str],
    waveform: Tensor,
    sample_rate: int,
    video: Any = None,
) -> None:
    """Save frames of the video, the waveform and its spectrogram over one time axis.

    Lines through all of them mark the onsets that `mfmjt.evaluate` detects.

    Args:
        path: Picture to write, such as a `.png` or `.svg`.
        waveform: Samples `(S,)`.
        sample_rate: In Hz.
        video: The video the sound was made for, if any, as for `Pipeline`; its first
            S / sample_rate seconds are shown.

    Raises:
        InputError: matplotlib is not installed, or the video cannot be read.
        RunError: The picture cannot be written.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = waveform.numpy().astype(np.float64)
    seconds = len(samples) / sample_rate
    figure = Figure(figsize=(WIDTH, 5.5 if video is not None else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.0, 1.5, 2.0] if video is not None else [1.5, 2.0]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    if video is not None:
        shown, end = _thumbnails(video, seconds)
        axes[0].imshow(np.concatenate(shown, axis=1), extent=(0, end, 0, 1), aspect="auto")
        axes[0].set_yticks([])
    wave, spectrum = axes[-2:]
    wave.plot(np.arange(len(samples)) / sample_rate, samples, linewidth=0.4)
    wave.set_ylabel("amplitude")
    window = min(512, len(samples))
    hop = max(1, window // 4)
    padded = np.pad(samples, window // 2)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    level = 20 * np.log10(np.abs(np.fft.rfft(pieces, axis=1)).T / window + 1e-6)
    spectrum.imshow(
        level,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, sample_rate / 2000),
        vmin=level.max() - 80,
    )
    spectrum.set_ylabel("kHz")
    spectrum.set_xlabel("seconds")
    for onset in detect_onsets(waveform, sample_rate):
        for axis in axes:
            axis.axvline(onset, color="crimson", linewidth=0.7, alpha=0.8)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110)


def _thumbnails(video: Any, seconds: float) -> tuple[list[np.ndarray], float]:
    """Pictures from the middles of equal parts of a video, and the second at which they end."""
    stream = VideoStream(as_source(video), (RATE,), 96, duration=seconds)
    part = max(1.0, seconds * RATE / THUMBNAILS)
    shown: list[np.ndarray] = []
    place = 0
    for (pictures,) in stream:
        for picture in pictures:
            if place >= int((len(shown) + 0.5) * part):
                shown.append(np.asarray(picture)[0])
            place += 1
    return shown[:THUMBNAILS], min(seconds, len(shown[:THUMBNAILS]) * part / RATE)
