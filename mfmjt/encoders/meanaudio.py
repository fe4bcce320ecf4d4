"""The text encoders of MeanAudio, FluxAudio and Resonate: Flan-T5, and CLAP for two of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mfmjt.checkpoints import Check, PublishedFile, find_all
from mfmjt.encoders.base import Encoders, FrameSpec, Lengths, check_texts
from mfmjt.encoders.clap import CLAP_FILE, ROBERTA, CLAPText
from mfmjt.encoders.t5 import FLAN_T5, T5
from mfmjt.encoders.text_model import folders_of
from mfmjt.errors import InputError
from mfmjt.model import ModelConfig

__all__ = ["MeanAudioEncoders", "find_encoders"]

_ROUNDING = 1e-6  # of durations in seconds, which are quotients


class MeanAudioEncoders(Encoders):
    """Text to the features that MeanAudio was trained on. Its networks take no video.

    Args:
        t5: Gives the tokens.
        clap: Gives the vector of a whole text; None takes the mean of all 77 tokens, padding
            included, as Resonate does.

    Attributes:
        t5: The same.
        clap: The same.
    """

    takes_video = False
    frame_size = 0
    video_fps = 0
    sync_fps = 0
    frames_are_independent = True
    period = 0.0

    def __init__(self, t5: T5, clap: CLAPText | None = None) -> None:
        super().__init__()
        self.t5 = t5
        self.clap = clap

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        check: Check = "size",
        *,
        clap: bool = True,
        text_dim: int = 1024,
    ) -> MeanAudioEncoders:
        """Load the published files from where the user keeps them.

        Args:
            folder: Holds the folders of Flan-T5-large and, for CLAP, of RoBERTa-base, as
                Hugging Face's hub has them and under any name, and CLAP's file, itself or in
                folders inside it. Folders in the hub's cache are found as well.
            check: What is compared with the published file: "name", "size" or "md5".
            clap: Whether CLAP gives the vector of a whole text.
            text_dim: Channels of a token; of several T5s in the folder, one of this width is taken.

        Raises:
            InputError: A file is missing, damaged or another one; the message names all of them and
                says where their publishers keep them. Or transformers is not installed.
        """
        files = find_encoders(folder, check, clap=clap, text_dim=text_dim)
        of_text = CLAPText.from_files(*files[1:]) if clap else None
        t5 = T5.from_pretrained(files[0])
        if t5.dim != text_dim:
            raise InputError(
                f"{files[0]} is a T5 of width {t5.dim}, and the network takes {text_dim}. Give the "
                f"folder of {FLAN_T5.name} ({FLAN_T5.publisher})."
            )
        return cls(t5, of_text).eval()

    def cast(self, dtype: torch.dtype) -> MeanAudioEncoders:
        """Make T5 and CLAP calculate in `dtype`; features come as float32 all the same."""
        self.to(dtype)
        return self

    @property
    def frame_specs(self) -> tuple[FrameSpec, FrameSpec]:
        """Raise InputError: there are no frames."""
        self.refuse_video()

    def lengths(self, seconds: float, config: ModelConfig) -> Lengths:
        """Give as many latents as MeanAudio's own code, and no frames."""
        latents = math.ceil(seconds * config.latent_rate - _ROUNDING)
        return Lengths(max(1, latents), 0, 0)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Raise InputError: there are no frames."""
        self.refuse_video()

    def encode_sync(self, frames: Tensor) -> Tensor:
        """Raise InputError: there are no frames."""
        self.refuse_video()

    def encode_text(self, texts: list[str]) -> Tensor:
        """T5's states of text tokens.

        Args:
            texts: Any strings; tokens beyond the 76th are ignored.

        Returns:
            `(len(texts), 77, 1024)` float32, padding included.

        Raises:
            InputError: Not a list of strings, or an empty one.
        """
        check_texts(texts)
        return self.t5(texts)

    def text_features(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the states of tokens as "text", and the vectors `(len(texts), dim)` as "pooled".

        Raises:
            InputError: As `encode_text`.
        """
        text = self.encode_text(texts)
        return {"text": text, "pooled": text.mean(1) if self.clap is None else self.clap(texts)}

    def unread(self, text: str) -> str:
        """Return the end of a text that T5 ignores; empty unless the text is long."""
        room = self.t5.tokens.room
        for word in re.finditer(r"\S+", text):
            room -= len(self.t5.tokens.of_word(word.group()))
            if room < 0:
                return text[word.start() :]
        return ""

    def understood(self, text: str) -> tuple[list[str], list[str]]:
        """Return the words of a text that T5 has tokens for, and those that it has not.

        T5 has them for English and, as far as their letters go, a few languages beside it.
        """
        words = dict.fromkeys(text.split())
        known = {word: self.t5.tokens.knows(word) for word in words}
        return [w for w in words if known[w]], [w for w in words if not known[w]]


def find_encoders(
    folder: str | os.PathLike[str],
    check: Check = "size",
    *,
    clap: bool = True,
    text_dim: int = 1024,
    also: Sequence[PublishedFile] = (),
) -> list[Path]:
    """Return the folder of T5 and, for CLAP, its file and the folder of RoBERTa.

    Args:
        folder: As for `MeanAudioEncoders.from_folder`.
        check: As there.
        clap: As there.
        text_dim: As there.
        also: Further files that must be there.

    Raises:
        InputError: Something is missing, those of `also` included, or is not what was published;
            all of it is named at once.
    """
    t5s = folders_of(FLAN_T5, folder, d_model=text_dim)
    robertas = folders_of(ROBERTA, folder) if clap else []
    absent = [FLAN_T5] * (not t5s) + [ROBERTA] * (clap and not robertas)
    told = {model.publisher: f"no folder of {model.name}" for model in absent}
    files = find_all(folder, [*([CLAP_FILE] if clap else []), *also], check, told)
    return [t5s[0], files[0], robertas[0]] if clap else [t5s[0]]
