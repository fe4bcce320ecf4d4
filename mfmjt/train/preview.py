"""Listen to and look at a network in training: WAV files and spectrograms."""

from __future__ import annotations

import importlib.util
import wave
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mfmjt.files import atomic_path
from mfmjt.plotting import plot_spectrograms

__all__ = ["save_spectrograms", "save_wav"]


def save_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """Write a mono waveform (S,) in [-1, 1] as 16-bit PCM, with the standard library alone."""
    samples = (waveform.detach().cpu().clamp(-1, 1) * 32767).round().short()
    with atomic_path(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())


def save_spectrograms(
    path: Path, rows: list[tuple[str, list[Tensor]]], columns: Sequence[str], sample_rate: int
) -> bool:
    """Call `plot_spectrograms`; return False where matplotlib, which needs not be, is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    plot_spectrograms(path, rows, columns, sample_rate)
    return True
