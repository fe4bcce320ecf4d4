"""The sound of a file, as one channel from the first picture on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr

from mfmjt.errors import InputError
from mfmjt.media._decode import first_time
from mfmjt.media._open import open_container, sound_stream, video_streams

__all__ = ["native_audio", "read_audio"]


CANCELLED = 0.01
"""Channels cancel where their mean has less power than this part of what one of them, alone beside
silence, would leave of itself: 20 dB, which phase differences of real rooms do not reach."""


def read_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    duration: float | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Read the sound track of a file of sound or of video as one channel.

    Of several tracks it is the one that players play. Time 0 is the first picture of a video: a
    track that begins later begins with silence, and what comes before is cut off. Channels are
    averaged; where they cancel one another, as those of a stereo track in opposite phase do, the
    one with most power is taken.

    Args:
        path: Any file that PyAV can open.
        sample_rate: Wanted, in Hz.
        duration: Read only so many seconds from the start; None reads the whole track.
        notes: Takes one line on what was odd but could be read, such as channels that cancel.

    Returns:
        float32 `(samples,)`, which may be fewer than asked for, and not finite if the file's are.

    Raises:
        InputError: The file is missing, has no sound track, or nothing of it can be decoded.
    """
    path = Path(path)
    whole, rate, loudest = _read(path, duration, None)
    if loudest is not None:
        # Rare: it is decoded again, so that memory never holds more than one channel.
        whole, rate, _ = _read(path, duration, loudest)
        if notes is not None:
            notes.append(
                f"The channels of {path} cancel one another: channel {loudest + 1}, the loudest, "
                "is read instead of their mean."
            )
    resampled: np.ndarray = soxr.resample(whole, rate, sample_rate)
    return resampled


def native_audio(
    path: str | os.PathLike[str], duration: float | None = None
) -> tuple[np.ndarray, int]:
    """Read the sound track of a file at its own rate, as the mean of its channels.

    Args:
        path: As for `read_audio`.
        duration: As for `read_audio`.

    Returns:
        float32 `(samples,)` and their rate in Hz.

    Raises:
        InputError: As for `read_audio`.
    """
    wave, rate, _ = _read(Path(path), duration, None)
    return wave, rate


def _read(
    path: Path, duration: float | None, channel: int | None
) -> tuple[np.ndarray, int, int | None]:
    """Return one channel or the mean of all, its rate, and the loudest if the mean cancelled."""
    parts: list[np.ndarray] = []
    with open_container(path, "a file of sound or video", None) as container:
        stream = sound_stream(container)
        if stream is None or stream.codec_context is None:
            raise InputError(f"{path} has no sound track that can be read. Give a file with one.")
        pictures = video_streams(container)
        pictured = first_time(path) if pictures and pictures[0].codec_context else None
        rate, wanted, skipped, count = 0, 0.0, 0, 0
        power = _Power()
        for planes, rate, time in _decoded_sound(path, container, stream):
            if not parts:
                wanted = math.inf if duration is None else math.ceil(duration * rate)
                skipped = 0 if pictured is None else round((pictured - time) * rate)
                # As long as the file says, which may be damaged, but not longer than is wanted.
                parts.append(np.zeros(int(min(max(0, -skipped), wanted)), np.float32))
                skipped, count = max(0, skipped), len(parts[0])
            kept = planes[:, skipped:]
            skipped = max(0, skipped - planes.shape[1])
            kept = kept[:, : int(min(wanted - count, kept.shape[1]))]
            mean = kept.mean(0, dtype=np.float32)
            parts.append(mean if channel is None else kept[channel])
            power.add(kept, mean)
            count += len(mean)
            if count >= wanted:
                break
    if not parts:
        raise InputError(f"No sound of {path} can be decoded. Give a file that plays.")
    return np.concatenate(parts), rate, power.loudest_if_cancelled()


class _Power:
    """Of each channel and of their mean, without what is constant."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0

    def add(self, channels: np.ndarray, mean: np.ndarray) -> None:
        every = np.concatenate((channels, mean[None]))
        self._count += len(mean)
        with np.errstate(invalid="ignore"):  # what is not finite has not cancelled
            self._sums += every.sum(1, dtype=np.float64)
            self._squares += np.square(every, dtype=np.float64).sum(1)

    def loudest_if_cancelled(self) -> int | None:
        """Return the channel with most power, where little of it is left in the mean."""
        count = max(1, self._count)
        with np.errstate(invalid="ignore"):
            power = np.asarray(self._squares) / count - np.square(self._sums / count)
        channels = len(power) - 1
        loudest = int(power[:-1].argmax())
        cancelled = power[-1] < CANCELLED * power[loudest] / channels**2
        return loudest if cancelled else None


def _decoded_sound(
    path: Path, container: Any, stream: Any
) -> Iterator[tuple[np.ndarray, int, Fraction]]:
    """Pieces (channels, S), their rate in Hz, and when each begins, past what is damaged."""
    planes = av.AudioResampler(format="fltp")
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.error.EOFError):
            return
        except (av.error.InvalidDataError, ValueError):
            continue
        except av.error.FFmpegError:
            return
        for frame in frames:
            base = frame.time_base or stream.time_base or Fraction(1, frame.sample_rate)
            time = Fraction(0) if frame.pts is None else frame.pts * base
            try:
                pieces = planes.resample(frame)
            except ValueError as error:
                raise InputError(
                    f"The sound of {path} changes its rate or channels on the way. Convert it."
                ) from error
            for piece in pieces:
                yield piece.to_ndarray(), piece.sample_rate, time
