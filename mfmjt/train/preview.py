"""Listen to and look at a network in training: WAV files, spectrograms, TensorBoard entries."""

from __future__ import annotations

import importlib.util
import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt.files import atomic_path

__all__ = ["save_spectrograms", "save_wav", "spectrogram"]

FLOOR_DB = -80.0


def save_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """Write a mono waveform (S,) in [-1, 1] as 16-bit PCM, with the standard library alone."""
    samples = (waveform.detach().cpu().clamp(-1, 1) * 32767).round().short()
    with atomic_path(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())


def spectrogram(waveform: Tensor, size: int = 512) -> Tensor:
    """Return the log magnitude (size / 2 + 1, frames) of a waveform (S,), dB under its peak."""
    window = torch.hann_window(size)
    spectrum = torch.stft(
        waveform.detach().cpu().float(), size, size // 4, window=window, return_complex=True
    )
    level = 20 * torch.log10(spectrum.abs().clamp(min=1e-7))
    return (level - level.max()).clamp(min=FLOOR_DB)


def save_spectrograms(
    path: Path, rows: list[tuple[str, list[Tensor]]], columns: list[str], sample_rate: int
) -> bool:
    """Draw waveforms as a grid of spectrograms; False where matplotlib is not installed.

    Args:
        path: PNG file to write.
        rows: A label and one waveform (S,) per column.
        columns: Titles of the columns.
        sample_rate: Hz.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would choose a window system and keep every figure alive.
    figure = Figure(figsize=(5 * len(columns), 1.8 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for i, (label, waveforms) in enumerate(rows):
        for j, waveform in enumerate(waveforms):
            extent = (0.0, waveform.shape[-1] / sample_rate, 0.0, sample_rate / 2000)
            axes[i][j].imshow(
                spectrogram(waveform).numpy(),
                origin="lower",
                aspect="auto",
                cmap="magma",
                extent=extent,
                vmin=FLOOR_DB,
                vmax=0,
            )
            if i == 0:
                axes[i][j].set_title(columns[j])
        axes[i][0].set_ylabel("kHz")
        axes[i][0].text(
            0.01, 0.95, label, color="white", fontsize=7, va="top", transform=axes[i][0].transAxes
        )
    for axis in axes[-1]:
        axis.set_xlabel("s")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    return True
