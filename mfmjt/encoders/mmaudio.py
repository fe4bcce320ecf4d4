"""MMAudio's condition encoders: CLIP and Synchformer, with their preprocessing."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from mfmjt.checkpoints import Check, PublishedFile, about, find_all, read_content
from mfmjt.encoders.base import (
    FRAMES_AT_ONCE,
    Encoders,
    FrameSpec,
    Lengths,
    check_frames,
    check_texts,
)
from mfmjt.encoders.clip import CLIP, CLIPConfig
from mfmjt.encoders.synchformer import Synchformer, SynchformerConfig
from mfmjt.encoders.tokenizer import MERGES_FILES, Tokenizer
from mfmjt.model import ModelConfig

__all__ = ["ENCODER_FILES", "MMAudioEncoders"]

_CLIP_FILE = PublishedFile(
    "open_clip_pytorch_model.bin",
    "https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14-384",
    also=("open_clip_model", "apple_DFN5B-CLIP-ViT-H-14-384"),
)
_SYNC_FILE = PublishedFile(
    "synchformer_state_dict.pth",
    "https://github.com/hkchengrex/MMAudio/releases/tag/v0.1",
    "907M",
    "5b2f5594b0730f70e41e549b7c94390c",
    ("mmaudio_synchformer",),
)
ENCODER_FILES = (_CLIP_FILE, _SYNC_FILE)
"""The published weights of both encoders."""
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_STRIDE = 8  # frames from one of Synchformer's segments to the next
_SEGMENTS_AT_ONCE = 8
_ROUNDING = 1e-6  # of durations in seconds, which are quotients


class MMAudioEncoders(Encoders):
    """Frames and text to the features that MMAudio was trained on.

    Frames may have any size; those that already have `frame_size` are not resized.

    Args:
        clip: CLIP's towers.
        synchformer: Synchformer's visual encoder.
        tokenizer: CLIP's tokenizer.
        frame_size: Side of the pictures that each of `clip` and `synchformer` is given, in pixels.

    Attributes:
        frame_size: The same.
        video_fps: 8 frames per second for `encode_frames`.
        sync_fps: 25 frames per second for `encode_sync`.
    """

    video_fps = 8
    sync_fps = 25
    frames_are_independent = True
    period = 0.0
    frame_size: tuple[int, int]
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        clip: CLIP,
        synchformer: Synchformer,
        tokenizer: Tokenizer,
        frame_size: tuple[int, int] = (384, 224),
    ) -> None:
        super().__init__()
        self.clip = clip
        self.synchformer = synchformer
        self.tokenizer = tokenizer
        self.frame_size = frame_size
        for name, values in (("pixel_mean", _PIXEL_MEAN), ("pixel_std", _PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        check: Check = "size",
        clip: CLIPConfig | None = None,
        synchformer: SynchformerConfig | None = None,
    ) -> MMAudioEncoders:
        """Load the published files from where the user keeps them.

        Args:
            folder: Holds `open_clip_pytorch_model.bin` (or `open_clip_model.safetensors`) and
                `synchformer_state_dict.pth`, or these as ComfyUI names them, itself or in folders
                inside it, and `bpe_simple_vocab_16e6.txt.gz` or `merges.txt` unless
                open_clip_torch is installed.
            check: What is compared with the published files: "name", "size" or "md5".
            clip: Sizes of a CLIP of your own under the published name.
            synchformer: The same of a Synchformer.

        Raises:
            InputError: A file is missing, damaged or another one; the message says where its
                publisher keeps it.
        """
        clip_path, sync_path = find_all(folder, ENCODER_FILES, check)
        merges = [
            path
            for name in MERGES_FILES
            for path in (Path(folder) / name, *sorted(Path(folder).glob(f"*/{name}")))
            if path.is_file()
        ]
        tokenizer = Tokenizer(merges[0] if merges else None)  # first: the others take long to read
        # MMAudio gives CLIP frames of 384 pixels, a few more than its patches cover.
        clip_side = 384 if clip is None else clip.image_size
        with about(clip_path, _CLIP_FILE):
            seeing = CLIP.from_state_dict(read_content(clip_path), clip)
        with about(sync_path, _SYNC_FILE):
            timing = Synchformer.from_state_dict(read_content(sync_path), synchformer)
        frame_size = (clip_side, timing.config.size)
        return cls(seeing, timing, tokenizer, frame_size).eval()

    def cast(self, dtype: torch.dtype) -> MMAudioEncoders:
        """Make CLIP and Synchformer calculate in `dtype`; features come as float32 all the same."""
        for part in (self.clip, self.synchformer):
            part.to(dtype)
        return self

    @property
    def frame_specs(self) -> tuple[FrameSpec, FrameSpec]:
        """Frames as MMAudio gives them to CLIP and to Synchformer."""
        clip, sync = self.frame_size
        return (
            FrameSpec(self.video_fps, clip, "squash", "next"),
            FrameSpec(self.sync_fps, sync, "crop", "next"),
        )

    def lengths(self, seconds: float, config: ModelConfig) -> Lengths:
        """Give as many latents and frames as MMAudio's own code gives its networks."""
        latents = math.ceil(seconds * config.latent_rate - _ROUNDING)
        frames, sync = (
            max(1, int(seconds * rate + _ROUNDING)) for rate in (self.video_fps, self.sync_fps)
        )
        return Lengths(max(1, latents), frames, sync)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """CLIP's embeddings of single frames.

        Args:
            frames: uint8 `(B, T, H, W, 3)`, at 8 fps; squashed to a square.

        Returns:
            `(B, T, 1024)` float32 of unit length.

        Raises:
            InputError: Not uint8 of that shape, or no frames.
        """
        check_frames(frames)
        spec, _ = self.frame_specs
        found = []
        for part in frames.flatten(0, 1).split(FRAMES_AT_ONCE):
            x = spec.fitted(part).permute(0, 3, 1, 2).float()
            # In place: fresh memory would cost more than the arithmetic.
            x.div_(255).sub_(self.pixel_mean).div_(self.pixel_std)
            found.append(self.clip.encode_image(x))
        return torch.cat(found).unflatten(0, frames.shape[:2])

    def encode_sync(self, frames: Tensor) -> Tensor:
        """Synchformer's features of segments of 16 frames, which overlap by half.

        Args:
            frames: uint8 `(B, T, H, W, 3)`, at 25 fps; the middle square is seen. Fewer than 16 are
                filled up with the last one.

        Returns:
            `(B, 8 S, 768)` float32, S = (max(T, 16) - 16) // 8 + 1.

        Raises:
            InputError: Not uint8 of that shape, or no frames.
        """
        check_frames(frames)
        _, spec = self.frame_specs
        length = self.synchformer.config.frames
        return torch.stack([self._segments(spec.fitted(sample), length) for sample in frames])

    def _segments(self, frames: Tensor, length: int) -> Tensor:
        """uint8 `(T, side, side, 3)` -> `(8 S, D)`."""
        if len(frames) < length:
            held = frames[-1:].expand(length - len(frames), -1, -1, -1)
            frames = torch.cat([frames, held])
        count = (len(frames) - length) // _STRIDE + 1
        found = []
        for start in range(0, count, _SEGMENTS_AT_ONCE):
            stop = min(count, start + _SEGMENTS_AT_ONCE)
            part = frames[_STRIDE * start : _STRIDE * (stop - 1) + length]
            x = part.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            segments = x.unfold(0, length, _STRIDE).movedim(-1, 1)  # (s, 16, 3, side, side)
            found.append(self.synchformer(segments[None])[0])
        return torch.cat(found).flatten(0, 1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """CLIP's states of text tokens.

        Args:
            texts: Any strings; tokens beyond the 75th are ignored.

        Returns:
            `(len(texts), 77, 1024)` float32, each token of unit length.

        Raises:
            InputError: Not a list of strings, or an empty one.
        """
        check_texts(texts)
        return self.clip.encode_text(self.tokenizer(texts).to(self.pixel_mean.device))

    def unread(self, text: str) -> str:
        """Return the end of a text that `encode_text` ignores; empty unless the text is long."""
        room = self.tokenizer.context - 2
        for word in re.finditer(r"\S+", text):
            room -= len(self.tokenizer.encode(word.group()))
            if room < 0:
                return text[word.start() :]
        return ""
