"""Sound as a pipeline gives it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mfmjt import media

__all__ = ["STAGES", "Audio"]

STAGES = ("read", "encode", "generate", "decode")
"""The stages of a call, in order: video file -> features -> latents -> waveform."""


@dataclass(frozen=True)
class Audio:
    """Sound made by a `Pipeline`.

    Attributes:
        waveform: float32 `(channels, samples)`, nominally in [-1, 1], on the CPU.
        sample_rate: In Hz.
        seed: The seed that makes this very sound again.
        timings: Seconds that each stage of the call took (`STAGES`), for all its sounds together;
            "read" is what was waited for, because reading goes on while other stages work.
        count: Number of sounds the call made.
        notes: One line each on what was odd about the input but could be used.
    """

    waveform: Tensor
    sample_rate: int
    seed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    count: int = 1
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds of sound."""
        return self.waveform.shape[1] / self.sample_rate

    @property
    def rtf_generator(self) -> float:
        """Seconds of the network alone per second of sound; below 1 is faster than real time."""
        return self.timings["generate"] / (self.duration * self.count)

    @property
    def rtf_end_to_end(self) -> float:
        """Seconds from the video file to the waveform per second of sound, all stages counted."""
        return sum(self.timings.values()) / (self.duration * self.count)

    def noted(self, notes: tuple[str, ...]) -> Audio:
        """Return this sound with notes in front of its own."""
        return replace(self, notes=notes + self.notes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a sound file; the suffix chooses the format, such as `.wav` or `.flac`.

        Raises:
            InputError: The suffix is not known.
            RunError: The file cannot be written.
        """
        media.write_audio(path, self.waveform.numpy(), self.sample_rate)

    def mux(self, video: Any, path: str | os.PathLike[str], fps: Any = None) -> tuple[str, ...]:
        """Write `video` with this sound to `path`; the pictures are copied, not encoded again.

        Only what no container holds, such as a GIF, a folder of pictures or an array, is encoded,
        once, as H.264 (VP9 for .webm).

        Args:
            video: As for `Pipeline`.
            path: Where to write; the suffix chooses the container, such as `.mp4`.
            fps: As for `Pipeline`.

        Returns:
            One line each on what was not copied as it is.

        Raises:
            InputError: `video` is no video, or `path` names no container that can hold it.
            RunError: The file cannot be written.
        """
        return media.mux(video, self.waveform.numpy(), self.sample_rate, path, fps=fps)
