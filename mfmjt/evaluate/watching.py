"""The frames of a video as ImageBind and Synchformer get them for published scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.encoders.base import FrameSpec
from mfmjt.errors import InputError

__all__ = ["watch_imagebind", "watch_synchformer"]

SIDE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _frames(
    video: Path, rate: int | Fraction, seconds: float, fit: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """Return the fitted frames `(T, ...)` at a rate, picked as FFmpeg's filter `fps` does."""
    from mfmjt.media import VideoStream

    stream = VideoStream(video, (rate,), duration=seconds, fit=(fit,), pick="nearest")
    found = [frame for (frames,) in stream for frame in frames]
    return torch.cat(found)[: int(rate * seconds)]


def watch_synchformer(network: Any, video: Path, seconds: float) -> dict[str, np.ndarray]:
    """Return `video` (S, 8, 768): segments of 16 frames at 25 per second, of their middles.

    Raises:
        InputError: The video cannot be read, or is shorter.
    """
    crop = FrameSpec(25, SIDE, "crop")
    frames = _frames(video, 25, seconds, lambda frame: crop.fitted(torch.from_numpy(frame)))
    device = network.vproj.weight.device
    pixels = frames.permute(0, 3, 1, 2).to(device).float() / 255
    return {"video": network.encode_video((pixels[None] - 0.5) / 0.5)[0].cpu().numpy()}


def watch_imagebind(network: Any, video: Path, seconds: float) -> dict[str, np.ndarray]:
    """Return `video` (d,): the mean over three crops of the pairs of frames, 2 s apart.

    Raises:
        InputError: The video cannot be read, or is too short for a pair.
    """
    frames = _frames(video, Fraction(1, 2), seconds, _crops)
    if len(frames) < 2:
        raise InputError(f"{video}: ImageBind takes pairs of frames 2 s apart: 4 s are needed.")
    pairs = frames.unfold(0, 2, 1)  # (T - 1, 3 crops, H, W, 3, 2)
    clips = pairs.permute(0, 1, 4, 5, 2, 3).flatten(0, 1)  # (clips, 3, 2, H, W)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    pixels = ((clips.float() / 255 - mean) / std).to(network.window.device)
    return {"video": network.encode_video(pixels[None])[0].cpu().numpy()}


def _crops(frame: np.ndarray) -> Tensor:
    """Return three squares uint8 `(1, 3, 224, 224, 3)` along the longer side of a frame."""
    chw = torch.from_numpy(frame).permute(0, 3, 1, 2)
    height, width = chw.shape[2:]
    short = min(height, width)
    size = (SIDE * height // short, SIDE * width // short)
    scaled = F.interpolate(chw, size, mode="bicubic", antialias=True)
    rest = max(size) - SIDE
    squares = [
        scaled[..., at : at + SIDE, :] if size[0] > size[1] else scaled[..., at : at + SIDE]
        for at in (0, math.ceil(rest / 2), rest)
    ]
    return torch.stack(squares, dim=1).permute(0, 1, 3, 4, 2)
