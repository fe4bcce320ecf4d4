"""What a pipeline is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mfmjt.errors import InputError
from mfmjt.meanflow import Sampling
from mfmjt.meanflow.guidance import GuidanceMode, check_negative

__all__ = ["MAX_DURATION", "TEXT_DURATION", "Request"]

MAX_DURATION = 86_400.0
"""Longest sound of one call, in seconds: a day, beyond which a number is a mistake."""
TEXT_DURATION = 8.0
"""Seconds of sound for a prompt alone, unless asked otherwise: the length of training clips."""


@dataclass(frozen=True)
class Request:
    """What `Pipeline` is called with, for one sound or several.

    Attributes:
        video: As for `Pipeline`; None for a prompt alone.
        prompt: What is to be heard, in words.
        steps: As for `Pipeline`.
        guidance: As for `Pipeline`.
        modes: Ways of guidance; each makes all sounds. Empty takes the pipeline's own.
        seed: As for `Pipeline`.
        duration: As for `Pipeline`.
        count: Sounds of each mode.
        cache: As for `Pipeline`.
        fps: As for `Pipeline`.
        negative_prompt: As for `Pipeline`.
    """

    video: Any = None
    prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    modes: tuple[GuidanceMode, ...] = ()
    seed: int = 0
    duration: float | None = None
    count: int = 1
    cache: Any = None
    fps: Any = None
    negative_prompt: str | None = None

    def samplings(self, default: Sampling) -> list[Sampling]:
        """Return how the sounds of each mode are sampled.

        Raises:
            InputError: An argument of the request is out of range.
        """
        found = [default.changed(self.steps, self.guidance, mode) for mode in self.modes or (None,)]
        if self.negative_prompt and self.negative_prompt.strip():
            for sampling in found:
                check_negative(sampling.guidance, sampling.mode)
        if self.video is None and not (self.prompt and self.prompt.strip()):
            raise InputError("There is nothing to make sound for. Give a video, a prompt, or both.")
        if not 0 <= self.seed < 2**63 - 1024:
            raise InputError(f"seed is {self.seed}. Give a whole number from 0 up.")
        if not 1 <= self.count <= 64:
            raise InputError(f"count is {self.count}. Give 1 to 64, and another seed for more.")
        if self.duration is not None and not 0 < self.duration <= MAX_DURATION:
            raise InputError(
                f"duration is {self.duration:g} s. Give more than 0 and at most "
                f"{MAX_DURATION:g} seconds."
            )
        return found
