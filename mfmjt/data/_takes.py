"""Recorded sound for scenes: single strokes cut out of recordings, and what varies a sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfmjt.data._sound import SAMPLE_RATE

__all__ = [
    "Take",
    "find_takes",
    "is_steady",
    "lasting",
    "loudness",
    "place",
    "shifted",
    "spread",
    "struck",
    "tone",
    "transposed",
]

Array = NDArray[np.floating[Any]]

_BLOCK = SAMPLE_RATE // 1000  # samples in a millisecond, in which levels are looked at
_HOP, _WINDOW = SAMPLE_RATE // 200, 256  # samples between spectra, and of each
_LAG = 3  # spectra: what is new is new against that much earlier
_FLOOR = 10**-5.5  # of the greatest power of a band
_STROKE, _AGAIN = 6.0, 1.8  # dB, mean rise over the bands: of a stroke, and of anything new
_NEAR = 8  # spectra (40 ms) within which there is one beginning
_WRAP = 512  # samples of silence, into which what rings before an attack wraps around
_SHORTEST, _LONGEST = 0.06, 2.5  # s of a take
_LEAD, _FADE = SAMPLE_RATE // 500, SAMPLE_RATE // 200  # samples before the onset, and of the end
_STEADY = 8.0  # dB between the loudest parts and the median of what goes on and on
_STROKES = 3.0  # dB, rise of what is heard in it as a stroke: one in four seconds at most


class Take(NamedTuple):
    """One stroke.

    Attributes:
        sound: Samples (n,), float32, of peak 1.
        onset: Sample at which it begins.
    """

    sound: Array
    onset: int


def _rises(sound: Array) -> Array:
    """Return by how many dB bands of a third of an octave rise, on average, every 5 ms.

    A simpler sibling of the onset detector that judges sounds: what rises here is heard there.
    """
    padded = np.pad(sound, (_WINDOW // 2 + _LAG * _HOP, _WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.square(np.abs(np.fft.rfft(windows * np.hanning(_WINDOW).astype(np.float32))))
    edges = np.unique(np.geomspace(2, _WINDOW // 2, 22).astype(int))
    bands = np.add.reduceat(power, edges, axis=1)
    level = 10 * np.log10(bands / max(float(bands.max()), 1e-12) + _FLOOR)
    wide = np.pad(level, ((0, 0), (1, 1)), mode="edge")
    before = np.max([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], axis=0)
    return np.maximum(level[_LAG:] - before[:-_LAG], 0).mean(1)


def _peaks(values: Array, least: float) -> NDArray[np.int64]:
    """Return where values are at least so high, and the highest around."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(values, _NEAR), 2 * _NEAR + 1)
    return np.flatnonzero((values >= least) & (values >= around.max(1)))


def find_takes(sound: Array) -> list[Take]:
    """Cut the single strokes out of a recording.

    A stroke rises in most bands, is loudest within 60 ms, and ends where anything else begins,
    where it has fallen by 50 dB, or after 2.5 s.

    Args:
        sound: Samples (n,).

    Returns:
        The strokes that are at most 15 dB below the loudest.
    """
    if not sound.any():
        return []
    rises = _rises(sound)
    begins = _peaks(rises, _AGAIN)
    ends = np.append(begins * _HOP - _LEAD, len(sound))[1:]
    takes = []
    for begin, end in zip(begins, ends, strict=False):
        first, last = max(0, (begin - 3) * _HOP), (begin + 5) * _HOP
        size = np.abs(sound[first:last])
        if rises[begin] < _STROKE or not size.any():
            continue
        onset = first + int(np.argmax(size >= 0.25 * size.max()))
        cut = sound[max(0, onset - _LEAD) : end]
        take = _taken(cut, min(_LEAD, onset))
        if take is not None:
            takes.append((float(np.abs(cut).max()), take))
    loudest = max((peak for peak, _ in takes), default=0.0)
    return [take for peak, take in takes if peak >= 0.18 * loudest]


def _levels(sound: Array) -> Array:
    """Return the mean square of every whole millisecond."""
    whole = len(sound) // _BLOCK * _BLOCK
    return np.square(sound[:whole], dtype=np.float64).reshape(-1, _BLOCK).mean(1)


def _taken(cut: Array, onset: int) -> Take | None:
    """Fade the ends of a stroke; None where it is no stroke."""
    levels = _levels(cut)
    heard = np.flatnonzero(levels > 1e-5 * levels.max(initial=0.0))
    last = (int(heard[-1]) + 1 if heard.size else 0) * _BLOCK
    end = min(len(cut), round(_LONGEST * SAMPLE_RATE), last)
    peak = np.abs(cut).max(initial=0.0)
    early = np.abs(cut[: onset + 60 * _BLOCK]).max(initial=0.0)
    if end < _SHORTEST * SAMPLE_RATE or early < peak:
        return None
    cut = (cut[:end] / peak).astype(np.float32)
    cut[:onset] *= np.linspace(0, 1, onset, dtype=np.float32)
    cut[-_FADE:] *= np.linspace(1, 0, _FADE, dtype=np.float32)
    # Alone it may have a second attack, a heel's and a toe's, that the whole recording masked.
    again = _rises(cut)[onset // _HOP + _NEAR :].max(initial=0.0)
    return None if again >= _AGAIN else Take(cut, onset)


def struck(take: Take, strength: float) -> Array:
    """Return a take as if struck less hard: quieter, and duller above 300 Hz.

    Args:
        take: As recorded, which is the hardest.
        strength: Of the stroke, (0, 1].
    """
    size = _fast(len(take.sound) + _WRAP)
    octaves = np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE).clip(300) / 300)
    spectrum = np.fft.rfft(take.sound, size) * 2 ** (0.5 * (strength - 1) * octaves)
    duller = np.fft.irfft(spectrum, size)[: len(take.sound)]
    return (duller * strength**1.2).astype(np.float32)


def place(takes: Sequence[Take], times: Array, strengths: Array, samples: int) -> Array:
    """Put a stroke at every time, its onset there; takes go in turn. Returns (samples,).

    Args:
        takes: What is struck.
        times: In seconds (n,).
        strengths: (n,) in (0, 1].
        samples: Length of the track.
    """
    track = np.zeros(samples, np.float32)
    for i, (time, strength) in enumerate(zip(times, strengths, strict=True)):
        take = takes[i % len(takes)]
        begin = round(float(time) * SAMPLE_RATE) - take.onset
        sound = struck(take, float(strength))[max(0, -begin) : samples - begin]
        track[max(0, begin) : max(0, begin) + len(sound)] += sound
    return track


def transposed(take: Take, semitones: float) -> Take:
    """Return a take higher or lower, with its onset where it then is."""
    sound, ratio = shifted(take.sound, semitones)
    return Take(sound, round(take.onset / ratio))


def _fast(count: float) -> int:
    """Return the smallest number from `count` on that has no prime factor above 5."""
    least = max(1, math.ceil(count))
    threes = [3**b * 5**c for b in range(12) for c in range(9)]
    return min(odd * 2 ** max(0, math.ceil(math.log2(least / odd))) for odd in threes)


def shifted(sound: Array, semitones: float) -> tuple[Array, float]:
    """Make a sound higher or lower, and as much shorter or longer.

    Args:
        sound: Samples (n,).
        semitones: How much higher, to a few tenths: whole Fourier transforms decide.

    Returns:
        The sound, and how many times faster it is.
    """
    before = _fast(len(sound) + _WRAP)
    after = _fast(before / 2 ** (semitones / 12))
    spectrum = np.fft.rfft(sound, before)[: after // 2 + 1]
    ratio = before / after
    faster = np.fft.irfft(spectrum, after)[: math.ceil(len(sound) / ratio)] / ratio
    return faster.astype(np.float32), ratio


def tone(rng: np.random.Generator, sound: Array) -> Array:
    """Give a sound a mild equalizer and a small room.

    Gains at six frequencies, octaves from 125 Hz on, are drawn from N(0, 2.5 dB) and interpolated
    over log frequency. The room is white noise that decays within 0.05 to 0.4 s, 10 to 34 dB below
    the direct sound; one in three has none.

    Args:
        rng: Of every draw.
        sound: Samples (n,).
    """
    tail = round(rng.uniform(0.05, 0.4) * SAMPLE_RATE)
    noise = rng.standard_normal(tail) * np.exp(-6.9 * np.arange(tail) / tail)
    far = 10 ** (-rng.uniform(10, 34) / 20) * (rng.uniform() < 2 / 3)
    room = noise * (far / np.sqrt(np.square(noise).sum()))
    room[0] = 1.0
    size = _fast(len(sound) + tail)
    octaves = np.log2(np.fft.rfftfreq(size, 1 / SAMPLE_RATE).clip(125) / 125)
    decibels = np.interp(octaves, np.arange(6), rng.normal(0, 2.5, 6))
    spectrum = np.fft.rfft(sound, size) * np.fft.rfft(room, size) * 10 ** (decibels / 20)
    return np.fft.irfft(spectrum, size)[: len(sound)].astype(np.float32)


def loudness(sound: Array) -> float:
    """Return the root mean square of the loudest half second."""
    levels = _levels(np.pad(sound, (0, -len(sound) % _BLOCK)))
    total = np.concatenate([[0.0], np.cumsum(levels)])
    span = min(500, len(levels))
    return float(np.sqrt(max((total[span:] - total[:-span]).max() / span, 1e-12)))


def is_steady(sound: Array) -> bool:
    """Return whether a sound of 1.5 s or more goes on at one level, without strokes."""
    levels = _levels(sound)
    levels = levels[: len(levels) // 20 * 20].reshape(-1, 20).mean(1)
    if len(levels) < 75:
        return False
    high, middle = np.quantile(levels, [0.97, 0.5])
    if high > 10 ** (_STEADY / 10) * middle:
        return False
    strokes = (_rises(sound)[_NEAR:-_NEAR] > _STROKES).sum()
    return bool(strokes <= len(sound) / SAMPLE_RATE / 4)


def spread(rng: np.random.Generator, sound: Array, samples: int) -> Array:
    """Put a sound somewhere into a track (samples,).

    A long one is cropped, to a piece that is not the quietest; of short ones every second is
    repeated, up to six times.
    """
    track = np.zeros(samples, np.float32)
    if len(sound) >= samples:
        loud = int(np.abs(sound).argmax())
        first = int(rng.integers(len(sound) - samples + 1))
        piece = sound[first : first + samples]
        if np.abs(piece).max() < 0.2 * np.abs(sound[loud]):
            first = int(np.clip(loud - rng.integers(samples), 0, len(sound) - samples))
            piece = sound[first : first + samples]
        track[:] = piece
        _fade(track)
        return track
    repeated = len(sound) < samples // 3 and rng.uniform() < 0.5
    count = int(rng.integers(2, 7)) if repeated else 1
    gap = round(len(sound) * rng.uniform(1.05, 2.5)) + _FADE
    count = min(count, 1 + (samples - len(sound)) // gap)
    start = int(rng.integers(samples - len(sound) - (count - 1) * gap + 1))
    for place in range(start, start + count * gap, gap):
        track[place : place + len(sound)] += sound * np.float32(rng.uniform(0.7, 1.0))
    return track


def _fade(sound: Array) -> None:
    """Fade the ends in place."""
    edge = min(_FADE, len(sound) // 2)
    ramp = np.linspace(0, 1, edge, dtype=np.float32)
    sound[:edge] *= ramp
    sound[len(sound) - edge :] *= ramp[::-1]


def lasting(rng: np.random.Generator, sound: Array, samples: int) -> Array:
    """Return a random piece of a sound of so many samples, repeated with cross-fades if short."""
    if len(sound) >= samples:
        start = rng.integers(len(sound) - samples + 1)
        return sound[start : start + samples]
    fade = min(SAMPLE_RATE // 5, len(sound) // 4)
    ramp = np.sqrt(np.linspace(0, 1, fade, dtype=np.float32))
    piece = sound.copy()
    piece[:fade] *= ramp
    piece[-fade:] *= ramp[::-1]
    step = len(sound) - fade
    count = -(-samples // step) + 1
    track = np.zeros(step * count + fade, np.float32)
    for place in range(0, step * count, step):
        track[place : place + len(piece)] += piece
    start = fade + rng.integers(step * count - samples - fade + 1)
    return track[start : start + samples]
