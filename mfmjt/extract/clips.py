"""One clip as the encoders are given it: pictures at two rates and a waveform, of one length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt.encoders import MMAudioEncoders
from mfmjt.errors import InputError
from mfmjt.extract.ends import Ends
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
        shortest: Files of fewer seconds are refused; between both, sound ends in silence and the
            last picture stays.
        pieces: How many clips a file of sound gives at most, one after the other.
        pictures: Whether clips have pictures.
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
    """A clip as it is encoded.

    Attributes:
        start: Where it begins in its file, in seconds.
        audio: Samples (S,).
        video: uint8 (T, H, W, 3) for `encode_frames`; None without pictures.
        sync: The same for `encode_sync`.
        note: What was odd about its file but could be used; mostly empty.
    """

    start: float
    audio: Tensor
    video: Tensor | None = None
    sync: Tensor | None = None
    note: str = ""


@torch.inference_mode()
def decode(path: Path, cut: Cut, ends: Ends, device: torch.device) -> list[Piece]:
    """Read the clips of one file.

    Args:
        path: A video, or a sound.
        cut: What of it.
        ends: Whose pictures and samples are wanted.
        device: Where pictures of MMAudio's size are scaled.

    Raises:
        InputError: The file cannot be used; the message says why.
    """
    rate = ends.codec.sample_rate
    samples = round(cut.seconds * rate)
    notes: list[str] = []
    sound = read_audio(path, rate, cut.pieces * cut.seconds, notes)
    if not np.isfinite(sound).all():
        raise InputError(f"{path} has samples that are NaN or infinite.")
    length = len(sound) / rate
    if cut.pictures:
        video, sync, seen = _pictures(path, cut, ends, device)
        length = min(length, seen)
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


def _pictures(
    path: Path, cut: Cut, ends: Ends, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Pictures for both encoders, and of how many seconds, up to a clip's length, they are."""
    encoders = ends.encoders
    wanted: dict[str, Any] = {"size": encoders.frame_size}
    if isinstance(encoders, MMAudioEncoders):
        fits = [_fitting(device, fit) for fit in (encoders.fit_frames, encoders.fit_sync)]
        wanted = {"fit": fits, "pick": "next"}
    stream = VideoStream(path, (encoders.video_fps, encoders.sync_fps), **wanted)
    _, *counts = ends.lengths(cut.seconds)
    kept: list[list[Tensor]] = [[], []]
    for block in stream:
        for pictures, pieces in zip(kept, block, strict=True):
            pictures += [torch.as_tensor(piece) for piece in pieces]
        if all(len(p) >= count for p, count in zip(kept, counts, strict=True)):
            seen = cut.seconds
            break
    else:
        seen = min(cut.seconds, stream.duration)
    video, sync = (
        torch.cat((pictures + pictures[-1:] * count)[:count])
        for pictures, count in zip(kept, counts, strict=True)
    )
    return video, sync, seen


def _fitting(
    device: torch.device, fit: Callable[[Tensor], Tensor]
) -> Callable[[np.ndarray], Tensor]:
    def fitted(pictures: np.ndarray) -> Tensor:
        return fit(torch.from_numpy(pictures).to(device)).contiguous()

    return fitted
