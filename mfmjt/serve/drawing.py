"""What is drawn under a video: waveform, spectrogram and onsets of its sound, as small numbers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from torch import Tensor

from mfmjt.evaluate.onsets import detect_onsets

__all__ = ["drawing"]

COLUMNS = 600
BANDS = 96
WINDOW = 0.032  # s
LOWEST = 50.0  # Hz
RANGE = 70.0  # dB under the loudest


def drawing(waveform: Tensor, sample_rate: int) -> dict[str, Any]:
    """Return numbers for a page to draw.

    Args:
        waveform: Samples `(S,)`.
        sample_rate: In Hz.

    Returns:
        `duration` in seconds; `peaks`, 2 x COLUMNS lowest and highest samples in [-1, 1]; `onsets`
        in seconds; `spectrogram`: base64 of COLUMNS x BANDS bytes, low bands first, 255 the
        loudest, and `low` and `high`, its band limits in Hz, between which bands are even in
        logarithm.
    """
    samples = waveform.numpy().astype(np.float32)
    columns = min(COLUMNS, len(samples))
    edges = np.linspace(0, len(samples), columns + 1).astype(int)
    low = np.minimum.reduceat(samples, edges[:-1])
    high = np.maximum.reduceat(samples, edges[:-1])
    return {
        "duration": len(samples) / sample_rate,
        "sample_rate": sample_rate,
        "peaks": [np.round(low, 3).tolist(), np.round(high, 3).tolist()],
        "onsets": np.round(detect_onsets(waveform, sample_rate), 3).tolist(),
        "spectrogram": base64.b64encode(_spectrogram(samples, sample_rate, columns)).decode(),
        "columns": columns,
        "bands": BANDS,
        "low": LOWEST,
        "high": sample_rate / 2,
    }


def _spectrogram(samples: np.ndarray, rate: int, columns: int) -> bytes:
    """uint8 `(columns, BANDS)`: level in dB, in bands that are even in logarithm."""
    width = 2 ** round(np.log2(WINDOW * rate))
    padded = np.pad(samples, (width // 2, width))
    starts = ((np.arange(columns) + 0.5) * len(samples) / columns).astype(int)
    window = np.hanning(width).astype(np.float32)
    level = np.empty((columns, width // 2 + 1), np.float32)
    for begin in range(0, columns, 64):  # a few at a time: memory stays small
        at = starts[begin : begin + 64, None] + np.arange(width)
        level[begin : begin + 64] = np.abs(np.fft.rfft(padded[at] * window, axis=1)) ** 2
    places = np.geomspace(LOWEST, rate / 2, BANDS + 1) * width / rate
    total = np.concatenate([np.zeros((columns, 1)), np.cumsum(level, axis=1)], axis=1)
    # Power between two places of the sum, so that bands narrower than a bin share it.
    at = np.clip(places, 0, total.shape[1] - 1)
    below = at.astype(int).clip(max=total.shape[1] - 2)
    sums = total[:, below] + (at - below) * (total[:, below + 1] - total[:, below])
    power = np.diff(sums, axis=1) / np.diff(at)
    decibels = 10 * np.log10(power + 1e-12)
    scaled = (decibels - decibels.max() + RANGE) / RANGE
    return (scaled.clip(0, 1) * 255).astype(np.uint8).tobytes()
