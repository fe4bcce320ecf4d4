"""What features are computed with: a codec, encoders, and how much of a clip they are given."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mfmjt.codec import Codec
from mfmjt.encoders import Encoders, Lengths
from mfmjt.errors import InputError
from mfmjt.families import open_bundle
from mfmjt.model import config_for

__all__ = ["Ends"]


@dataclass(frozen=True)
class Ends:
    """A codec and encoders that belong together.

    Attributes:
        codec: Waveforms to latents.
        encoders: Frames and text to features.
    """

    codec: Codec
    encoders: Encoders

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "nano",
        mode: str | None = None,
        arithmetic: torch.dtype = torch.float32,
    ) -> Ends:
        """Load those of a model.

        Args:
            model: One that ships, a folder with `codec.safetensors` and `encoders.safetensors`, or
                one with MMAudio's published files (docs/mmaudio.md).
            mode: Of MMAudio's codecs, "16k" or "44k"; None takes the one that is there.
            arithmetic: In which MMAudio's networks calculate.

        Raises:
            InputError: There are no such files.
        """
        bundle = open_bundle(model, False, mode, arithmetic)
        return cls(bundle.codec, bundle.encoders)

    def to(self, device: torch.device) -> Ends:
        """Both on a device, ready to be used."""
        for part in (self.codec, self.encoders):
            part.to(device).eval().requires_grad_(False)
        return self

    def identity(self) -> str:
        """A digest of all that decides on features, beside the clips."""
        return self.codec.identity()[:16] + self.encoders.identity()[:16]

    def lengths(self, seconds: float) -> Lengths:
        """Latents, frames for `encode_frames` and frames for `encode_sync` of so many seconds.

        Raises:
            InputError: Nano's frames and latents are not in step at the end of that.
        """
        period = self.encoders.period
        if period and abs(seconds / period - round(seconds / period)) > 1e-6:
            raise InputError(
                f"Clips of {seconds:g} s: nano's frames and latents meet every {period:g} s. Give "
                "a multiple of that, such as 8."
            )
        small = "small_16k" if self.codec.sample_rate == 16_000 else "small_44k"
        return self.encoders.lengths(seconds, config_for("nano" if period else small))
