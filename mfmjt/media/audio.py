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

__all__ = ["read_audio"]


def read_audio(
    path: str | os.PathLike[str], sample_rate: int, duration: float | None = None
) -> np.ndarray:
    """Read the sound track of a file of sound or of video as one channel.

    Of several tracks it is the one that players play. Time 0 is the first picture of a video: a
    track that begins later begins with silence, and what comes before is cut off. Channels are
    averaged.

    Args:
        path: Any file that PyAV can open.
        sample_rate: Wanted, in Hz.
        duration: Read only so many seconds from the start; None reads the whole track.

    Returns:
        float32 `(samples,)`, which may be fewer than asked for, and not finite if the file's are.

    Raises:
        InputError: The file is missing, has no sound track, or nothing of it can be decoded.
    """
    path = Path(path)
    parts: list[np.ndarray] = []
    with open_container(path, "a file of sound or video", None) as container:
        stream = sound_stream(container)
        if stream is None or stream.codec_context is None:
            raise InputError(f"{path} has no sound track that can be read. Give a file with one.")
        pictures = video_streams(container)
        pictured = first_time(path) if pictures and pictures[0].codec_context else None
        rate, wanted, skipped = 0, 0.0, 0
        for samples, rate, time in _decoded_sound(path, container, stream):
            if not parts:
                wanted = math.inf if duration is None else math.ceil(duration * rate)
                skipped = 0 if pictured is None else round((pictured - time) * rate)
                # As long as the file says, which may be damaged, but not longer than is wanted.
                parts.append(np.zeros(int(min(max(0, -skipped), wanted)), np.float32))
                skipped = max(0, skipped)
            parts.append(samples[skipped:])
            skipped = max(0, skipped - len(samples))
            if sum(map(len, parts)) >= wanted:
                break
    if not parts:
        raise InputError(f"No sound of {path} can be decoded. Give a file that plays.")
    whole = np.concatenate(parts)
    whole = whole[: int(min(wanted, len(whole)))]
    resampled: np.ndarray = soxr.resample(whole, rate, sample_rate)
    return resampled


def _decoded_sound(
    path: Path, container: Any, stream: Any
) -> Iterator[tuple[np.ndarray, int, Fraction]]:
    """Pieces of one channel (S,), their rate in Hz, and when each begins, past what is damaged."""
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
                yield piece.to_ndarray().mean(0, dtype=np.float32), piece.sample_rate, time
