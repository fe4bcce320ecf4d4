"""What every set of condition encoders does, and which frames of a video it takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import fingerprint
from mfmjt.errors import InputError, some
from mfmjt.model import ModelConfig

__all__ = ["FRAMES_AT_ONCE", "Encoders", "FrameSpec", "Lengths", "SelfAttention", "stream_options"]

FRAMES_AT_ONCE = 32
"""Frames that are resized, or given to CLIP, at a time: bounds memory, and fills a GPU."""


class FrameSpec(NamedTuple):
    """Frames as an encoder takes them.

    Attributes:
        fps: Frames per second.
        size: Side of the square, in pixels.
        fit: How a frame becomes a square: "decoder" squashes it while it is decoded, "squash" by
            bicubic interpolation with anti-aliasing, and "crop" scales its shorter side so, and
            takes the middle.
        pick: Which frame stands for a time: the one "shown" then, or the "next" one to come.
    """

    fps: int
    size: int
    fit: Literal["decoder", "squash", "crop"] = "decoder"
    pick: Literal["shown", "next"] = "shown"

    def fitted(self, frames: Tensor) -> Tensor:
        """Make squares of frames, uint8 `(T, H, W, 3)`, on their device."""
        height, width, side = *frames.shape[1:3], self.size
        chw = frames.permute(0, 3, 1, 2)
        if self.fit != "crop":
            return _resized(chw, side, side).permute(0, 2, 3, 1)
        short = min(height, width)
        large = _resized(chw, side * height // short, side * width // short)
        top, left = (round((size - side) / 2) for size in large.shape[-2:])
        return large[..., top : top + side, left : left + side].permute(0, 2, 3, 1)


class Lengths(NamedTuple):
    """What so many seconds are.

    Attributes:
        latents: Latents of the network.
        frames: Frames for `encode_frames`.
        sync: Frames for `encode_sync`.
    """

    latents: int
    frames: int
    sync: int


class Encoders(nn.Module):
    """Frames and text to the features that a network is conditioned on.

    Attributes:
        frame_size: Side of the frames in pixels; a pair where those of both streams differ.
        video_fps: Frames per second for `encode_frames`.
        sync_fps: Frames per second for `encode_sync`.
        frames_are_independent: `encode_frames` looks at single frames, which may be encoded as
            they arrive.
        period: Clips for training last a multiple of so many seconds; 0 takes any duration.
    """

    frame_size: int | tuple[int, int]
    video_fps: int
    sync_fps: int
    frames_are_independent: bool
    period: float

    @property
    @abstractmethod
    def frame_specs(self) -> tuple[FrameSpec, FrameSpec]:
        """Frames for `encode_frames`, and for `encode_sync`."""

    @abstractmethod
    def lengths(self, seconds: float, config: ModelConfig) -> Lengths:
        """Give the lengths of so many seconds for a network of this configuration."""

    @abstractmethod
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Give a feature `(B, T, dim)` for each frame, uint8 `(B, T, H, W, 3)`."""

    @abstractmethod
    def encode_sync(self, frames: Tensor) -> Tensor:
        """Give features `(B, 8 S, dim)` of segments of frames, uint8 `(B, T, H, W, 3)`."""

    @abstractmethod
    def encode_text(self, texts: list[str]) -> Tensor:
        """Give features `(len(texts), tokens, dim)`."""

    @abstractmethod
    def unread(self, text: str) -> str:
        """Return the end of a text that is too long for `encode_text`, mostly empty."""

    def understood(self, text: str) -> tuple[list[str], list[str]]:
        """Return words of a text that training had, and had not; none where that is not known."""
        return [], []

    def prompt_notes(self, prompt: str | None, called: str = "prompt") -> tuple[str, ...]:
        """Return one line on a prompt that is cut off, and one on words that training had not."""
        prompt, notes = prompt or "", []
        if unread := self.unread(prompt):
            notes.append(
                f"The {called} is too long: its end, from {unread[:30]!r} on, is not read."
            )
        known, unknown = self.understood(prompt)
        words = some(map(repr, unknown))
        if unknown and known:
            notes.append(
                f"The text encoder was not trained on these words of the {called}: {words}. What "
                "is heard depends on the others."
            )
        elif unknown:
            notes.append(
                f"The text encoder was trained on none of the {called}'s words: {words}. What is "
                "heard does not follow them."
            )
        return tuple(notes)

    def identity(self) -> str:
        """Return a digest of what decides on features."""
        return fingerprint(self)


class SelfAttention(nn.Module):
    """Self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Mix the tokens of `(B, N, D)`; where causal, each sees itself and those before it."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def stream_options(
    specs: Sequence[FrameSpec], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return arguments of `mfmjt.media.VideoStream` for frames as `specs` say, on `device`."""

    def fitting(spec: FrameSpec) -> Callable[[np.ndarray], Tensor]:
        @torch.inference_mode()
        def fitted(frame: np.ndarray) -> Tensor:
            return spec.fitted(torch.from_numpy(frame).to(device)).contiguous()

        return fitted

    fits = None if specs[0].fit == "decoder" else [fitting(spec) for spec in specs]
    return {
        "rates": [spec.fps for spec in specs],
        "size": [spec.size for spec in specs],
        "fit": fits,
        "pick": specs[0].pick,
    }


def check_frames(frames: Tensor) -> None:
    """Raise InputError unless these frames are uint8 (batch, time, height, width, 3)."""
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise InputError(
            f"Frames of shape {tuple(frames.shape)}, {frames.dtype} cannot be encoded: "
            "uint8 (batch, time, height, width, 3) is needed."
        )
    if frames.numel() == 0:
        raise InputError("No frames to encode. Give at least one.")


def check_texts(texts: list[str]) -> None:
    """Raise InputError unless this is a list of strings, and not an empty one."""
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise InputError("Text must be a non-empty list of strings. Put a single prompt in a list.")


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with anti-aliasing, uint8 `(T, 3, H, W)` in and out, as torchvision resizes."""
    if frames.shape[-2:] == (height, width):
        return frames
    parts = []
    for part in frames.split(FRAMES_AT_ONCE):
        if part.device.type == "cpu":
            # In uint8, which is over ten times faster there and a level apart on pictures.
            parts.append(F.interpolate(part, (height, width), mode="bicubic", antialias=True))
        else:
            x = F.interpolate(part.float(), (height, width), mode="bicubic", antialias=True)
            parts.append(x.clamp(0, 255).round().to(torch.uint8))
    return torch.cat(parts)
