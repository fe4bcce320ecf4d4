"""The clips of one file, as codec and encoders take them: a waveform, and frames at two rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfmjt.encoders.base import stream_options
from mfmjt.errors import InputError
from mfmjt.families import Bundle
from mfmjt.media import VideoStream, read_audio

__all__ = ["Cut", "Piece", "decode"]

PEAK = 0.95
"""Largest sample of what is encoded, as in MMAudio's training."""
SILENCE = 2.0**-10
"""Largest sample of what is silent: 32 steps of 16 bits, -60 dB. Dither reaches 2, shaped 31 (the
Shibata filters at 44.1 kHz alone more), and what a codec makes of either no more than that."""
SLACK = 0.05
"""Seconds that a clip may lack: containers round, and cut a frame off."""


@dataclass(frozen=True)
class Cut:
    """What of a file becomes a clip.

    Attributes:
        seconds: Length of a clip.
        shortest: Length of the shortest file that is taken, in seconds; what it lacks to a whole
            clip is silence and its last frame.
        pieces: Number of clips that a file of sound gives at most, one after the other.
        pictures: Whether clips have frames.
    """

    seconds: float = 8.0
    shortest: float = 8.0
    pieces: int = 1
    pictures: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be cut."""
        if not 0 < self.shortest <= self.seconds or not math.isfinite(self.seconds):
            raise InputError(
                f"Clips of {self.seconds:g} s, made of no less than {self.shortest:g} s: give more "
                "than 0, and no more for the shortest."
            )
        if self.pieces < 1 or (self.pictures and self.pieces > 1):
            raise InputError(
                f"{self.pieces} clips of a file: give 1 or more, and 1 where they have pictures."
            )


@dataclass(frozen=True)
class Piece:
    """A clip, ready to be encoded.

    Attributes:
        start: Where it begins in its file, in seconds.
        audio: Samples (S,), float32.
        video: Frames for `encode_frames`, uint8 (T, H, W, 3); None for a clip of sound alone.
        sync: Frames for `encode_sync`, likewise.
        note: What was odd about its file but could be used; mostly empty.
    """

    start: float
    audio: Tensor
    video: Tensor | None = None
    sync: Tensor | None = None
    note: str = ""


@torch.inference_mode()
def decode(path: Path, cut: Cut, bundle: Bundle) -> list[Piece]:
    """Read the clips of one file.

    Args:
        path: A video, or a sound.
        cut: What of the file becomes clips.
        bundle: The codec and encoders that take them; where they are, frames are scaled.

    Raises:
        InputError: The file cannot be used; the message says why.
    """
    rate = bundle.codec.sample_rate
    samples = round(cut.seconds * rate)
    notes: list[str] = []
    sound = read_audio(path, rate, cut.pieces * cut.seconds, notes)
    if not np.isfinite(sound).all():
        raise InputError(f"{path} has samples that are NaN or infinite.")
    length = len(sound) / rate
    if cut.pictures:
        video, sync, shown = _frames(path, cut, bundle)
        length = min(length, shown)
    if length + SLACK < cut.shortest:
        raise InputError(f"{path} lasts {length:.2f} s, less than {cut.shortest:g} s.")
    peak = float(np.abs(sound).max(initial=0.0))
    if peak < SILENCE:
        raise InputError(f"{path} is silent: no sample is above {peak:.1g}, as dither leaves it.")
    wave = torch.from_numpy(sound * np.float32(PEAK / peak))
    count = max(1, min(cut.pieces, int((len(wave) / rate + SLACK) / cut.seconds)))
    wave = torch.nn.functional.pad(wave, (0, max(0, count * samples - len(wave))))
    parts = wave[: count * samples].split(samples)
    if cut.pictures:
        return [Piece(0.0, parts[0], video, sync, note=" ".join(notes))]
    loud = [part.abs().max() >= SILENCE * PEAK / peak for part in parts]
    return [
        Piece(i * cut.seconds, part.clone(), note=" ".join(notes))
        for i, (part, heard) in enumerate(zip(parts, loud, strict=True))
        if heard
    ]


def _frames(path: Path, cut: Cut, bundle: Bundle) -> tuple[Tensor, Tensor, float]:
    """Return frames for both encoders, and the seconds, up to a clip's length, that they show."""
    stream = VideoStream(path, **stream_options(bundle.encoders.frame_specs, bundle.device))
    _, *counts = bundle.lengths(cut.seconds)
    kept: list[list[Tensor]] = [[], []]
    for block in stream:
        for frames, new in zip(kept, block, strict=True):
            frames += [torch.as_tensor(frame) for frame in new]
        if all(len(frames) >= count for frames, count in zip(kept, counts, strict=True)):
            shown = cut.seconds
            break
    else:
        shown = min(cut.seconds, stream.duration)
    video, sync = (
        torch.cat((frames + frames[-1:] * count)[:count])
        for frames, count in zip(kept, counts, strict=True)
    )
    return video, sync, shown
