"""What features are computed with: a codec, encoders, and how much of a clip they are given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

import mfmjt
from mfmjt.codec import MMAudioCodec, NanoCodec
from mfmjt.encoders import MMAudioEncoders, NanoEncoders
from mfmjt.errors import InputError
from mfmjt.model import config_for
from mfmjt.pipeline.cache import identity
from mfmjt.pipeline.features import Encoders, lengths
from mfmjt.pipeline.published import mode_there

__all__ = ["Ends"]

PRETRAINED = Path(mfmjt.__file__).parent / "pretrained"


@dataclass(frozen=True)
class Ends:
    """A codec and encoders that belong together.

    Attributes:
        codec: Waveforms to latents.
        encoders: Frames and text to features.
    """

    codec: NanoCodec | MMAudioCodec
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
        folder = Path(model)
        if not folder.is_dir() and (PRETRAINED / str(model)).is_dir():
            folder = PRETRAINED / str(model)
        if (folder / "codec.safetensors").exists():
            if mode is not None or arithmetic != torch.float32:
                raise InputError(
                    f"{folder} has no codec of MMAudio's: leave out the mode and the arithmetic."
                )
            return cls(
                NanoCodec.load(folder / "codec.safetensors"),
                NanoEncoders.load(folder / "encoders.safetensors"),
            )
        mode = mode or mode_there(folder)
        if mode is None:
            raise InputError(
                f"{folder} holds neither codec.safetensors nor a codec of MMAudio's. Give a "
                "folder with codec and encoders, or nano."
            )
        return cls(
            MMAudioCodec.from_folder(folder, mode).cast(arithmetic),
            MMAudioEncoders.from_folder(folder).cast(arithmetic),
        )

    def to(self, device: torch.device) -> Ends:
        """Both on a device, ready to be used."""
        for part in (self.codec, self.encoders):
            part.to(device).eval().requires_grad_(False)
        return self

    def identity(self) -> str:
        """A digest of all that decides on features, beside the clips."""
        heard = self.codec.vae if isinstance(self.codec, MMAudioCodec) else self.codec
        return identity(heard)[:16] + identity(self.encoders)[:16]

    def lengths(self, seconds: float) -> tuple[int, int, int]:
        """Latents, frames for `encode_frames` and frames for `encode_sync` of so many seconds.

        Raises:
            InputError: Nano's frames and latents are not in step at the end of that.
        """
        name = "nano" if isinstance(self.encoders, NanoEncoders) else self._network()
        counts = lengths(self.encoders, config_for(name), seconds)
        if name == "nano" and counts[0] * self.codec.hop != round(seconds * self.codec.sample_rate):
            raise InputError(
                f"Clips of {seconds:g} s: nano's frames and latents meet every 0.32 s. Give a "
                "multiple of that, such as 8."
            )
        return counts

    def _network(self) -> str:
        return "small_16k" if self.codec.sample_rate == 16_000 else "small_44k"
