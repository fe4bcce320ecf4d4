"""Crops of recordings to train on: shifted, filtered and mixed, so that three hours go further."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mfmjt.data.recordings import SAMPLE_RATE, Recording, Recordings

__all__ = ["crop", "mixture", "shares"]

_MARGIN = 256  # samples at each end that the wrap-around of the FFT may touch
_MIXED = 0.3  # share of crops that a second recording sounds in

Wave = np.ndarray[Any, np.dtype[np.float32]]


def shares(rows: list[Recording], samples: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how often to draw each recording: by the root of how many crops it has.

    By length alone one-shots would drown, by number alone long recordings would be wasted.

    Args:
        rows: Recordings.
        samples: Length of a crop.
    """
    weights = np.sqrt([max(row.samples, samples) for row in rows])
    return weights / weights.sum()


def crop(wave: Wave, samples: int, rng: np.random.Generator) -> Wave:
    """Crop a recording at random, up to 2.3 semitones higher or lower, through an equalizer.

    Of two places the louder one is taken. A short recording lies anywhere in silence. The gains of
    the equalizer at six frequencies, octaves apart, are drawn from N(0, 3 dB) and interpolated over
    log frequency.

    Args:
        wave: A recording.
        samples: Length of the crop.
        rng: Of every draw.

    Returns:
        `(samples,)`.
    """
    whole = 16 * _fast(-(-(samples + 2 * _MARGIN) // 16))
    taken = whole * int(rng.integers(14, 19)) // 16
    room = len(wave) - taken
    low, high = min(0, room), max(0, room)
    spots = [wave_at(wave, int(rng.integers(low, high + 1)), taken) for _ in range(2)]
    spectrum = np.fft.rfft(max(spots, key=lambda spot: float(spot @ spot)))
    # The frequencies that both rates have; the rest is cut off, or is not there.
    kept = np.zeros(whole // 2 + 1, np.complex128)
    common = min(len(kept), len(spectrum))
    kept[:common] = spectrum[:common]
    octaves = np.log2(np.maximum(np.fft.rfftfreq(whole, 1 / SAMPLE_RATE), 125) / 125)
    decibels = np.interp(octaves, np.arange(6) * 1.2, rng.normal(0, 3, 6))
    shaped = np.fft.irfft(kept * 10 ** (decibels / 20), whole) * (whole / taken)
    return shaped[_MARGIN : _MARGIN + samples].astype(np.float32)


def _fast(count: int) -> int:
    """Return the next number without prime factors above 11, of whose size FFTs are fast."""
    rest = count
    for factor in (2, 3, 5, 7, 11):
        while rest % factor == 0:
            rest //= factor
    return count if rest == 1 else _fast(count + 1)


def wave_at(wave: Wave, start: int, samples: int) -> Wave:
    """Return `samples` samples from `start` on; before the first and after the last is silence."""
    part = wave[max(0, start) : max(0, start + samples)]
    before = max(0, -start)
    return np.pad(part, (before, samples - before - len(part)))


def mixture(
    recordings: Recordings,
    rows: list[Recording],
    chances: np.ndarray[Any, np.dtype[np.float64]],
    samples: int,
    rng: np.random.Generator,
) -> Wave:
    """Draw one crop, in three of ten cases with a second one 0 to 12 dB below it.

    Args:
        recordings: The corpus.
        rows: Recordings to draw from.
        chances: How often each is drawn.
        samples: Length.
        rng: Of every draw.

    Returns:
        `(samples,)` in [-1, 1].
    """
    first, second = (
        crop(recordings.sound(rows[int(rng.choice(len(rows), p=chances))]), samples, rng)
        for _ in range(2)
    )
    if rng.uniform() < _MIXED:
        second *= 10 ** (-rng.uniform(0, 12) / 20) * _level(first) / max(_level(second), 1e-4)
        first = first + second
    return first / max(1.0, float(np.abs(first).max()))


def _level(wave: Wave) -> float:
    return math.sqrt(float(wave @ wave) / len(wave))
