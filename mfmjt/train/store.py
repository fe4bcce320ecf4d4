"""Features in memory, and aligned random windows of them.

The three streams have different rates: 250 latents, 64 video frames and 200 sync frames in 8 s.
A window begins where a latent, a sync frame and one of the sync encoder's segments of 8 frames
begin together, every 10 latents (0.32 s); its video frames are the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["FeatureStore"]

SYNC_SEGMENT = 8


class FeatureStore:
    """One split of a feature store.

    Args:
        folder: Folder of the store, as given to `mfmjt.train.features.extract`.
        split: Name of the split.
        device: Where the features are kept; batches come out there.

    Attributes:
        captions, labels, events: What is known of each clip, in order.
        latent_mean, latent_std: Statistics (C,) of this split's sampled latents, fp32. Training
            normalises every split by those of `train`: set `latent_mean` and `latent_std`.

    Raises:
        InputError: The folder holds no finished store.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", device: torch.device | str = "cpu"
    ) -> None:
        self.folder = Path(folder) / split
        self.device = torch.device(device)
        try:
            index = json.loads((self.folder / "index.json").read_text())
            self.captions: list[str] = index["captions"]
            self.labels: list[int] = index["labels"]
            self.events: list[list[float]] = index["events"]
            self.latent_mean = torch.tensor(index["latent_mean"], device=self.device)
            self.latent_std = torch.tensor(index["latent_std"], device=self.device)
            self._features = self._load(index["shards"])
        except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
            raise InputError(
                f"Cannot read features from {self.folder}: {error}. "
                "Make them with the stage `features`, or give another store=."
            ) from error
        self._text = torch.empty(0)
        self._text_row = torch.empty(0, dtype=torch.long)
        length = self._features["mean"].shape[1]
        self.latent_length = length
        self.grid = SYNC_SEGMENT * length // self._features["sync"].shape[1]

    def __len__(self) -> int:
        return len(self.captions)

    def _load(self, shards: Sequence[str]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        row = 0
        for name in shards:
            with safe_open(self.folder / name, framework="pt") as file:
                for key in ("mean", "logvar", "video", "sync"):
                    part = file.get_tensor(key)
                    if key not in features:
                        shape = (len(self.captions), *part.shape[1:])
                        features[key] = torch.empty(shape, dtype=part.dtype, device=self.device)
                    features[key][row : row + part.shape[0]] = part
            row += part.shape[0]
        return features

    @torch.no_grad()
    def encode_text(self, encoders: Any, batch: int = 256) -> None:
        """Encode every caption once with `encoders.encode_text`; equal captions share a row."""
        unique = list(dict.fromkeys(self.captions))
        row = {caption: i for i, caption in enumerate(unique)}
        parts = [
            encoders.encode_text(unique[i : i + batch]).half() for i in range(0, len(unique), batch)
        ]
        self._text = torch.cat(parts).to(self.device)
        self._text_row = torch.tensor([row[c] for c in self.captions], device=self.device)

    def draw(
        self, batch: int, window: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw `batch` random clips, whole or a random window of each, to be given to `rows`.

        Args:
            batch: Number of rows; clips are drawn with replacement.
            window: Length in latents, a multiple of the grid; None for whole clips.
            generator: Decides everything, so that equal states give equal batches.

        Returns:
            Clips (B,), first latents (B,) or None, and the latents' noise (B, N, C).
        """
        clips = torch.randint(len(self), (batch,), generator=generator, device=self.device)
        starts, length = None, self.latent_length
        if window is not None and window < self.latent_length:
            length = window
            places = (self.latent_length - window) // self.grid + 1
            starts = self.grid * torch.randint(
                places, (batch,), generator=generator, device=self.device
            )
        channels = self._features["mean"].shape[2]
        noise = torch.randn(batch, length, channels, generator=generator, device=self.device)
        return clips, starts, noise

    def rows(
        self,
        clips: Tensor,
        starts: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the features of chosen clips, or of windows of them.

        Args:
            clips: Which clips, (B,) int64.
            starts: First latent of each window, (B,) int64, multiples of the grid; None for whole
                clips.
            noise: Of the latents (B, N, C), N the length of the windows; None takes their means.

        Returns:
            fp32 `latent` (B, N, C), normalised, `video` (B, V, Dv), `sync` (B, S, Ds), and `text`
            (B, L, Dt) after `encode_text`.
        """
        window = None if noise is None else noise.shape[1]
        mean, logvar = (self._cut(key, clips, starts, window) for key in ("mean", "logvar"))
        if noise is not None:
            mean = torch.addcmul(mean, logvar.mul_(0.5).exp_(), noise)
        features = {
            "latent": mean.sub_(self.latent_mean).div_(self.latent_std),
            "video": self._cut("video", clips, starts, window),
            "sync": self._cut("sync", clips, starts, window),
        }
        if len(self._text_row):
            features["text"] = self._text[self._text_row[clips]].float()
        return features

    def _cut(self, key: str, clips: Tensor, starts: Tensor | None, window: int | None) -> Tensor:
        """Return rows `clips` of a stream between the same times as latents `starts`."""
        stream = self._features[key]
        if starts is None or window is None:
            return stream[clips].float()
        length = stream.shape[1]
        rate = length / self.latent_length
        count = round(window * rate)
        first = (starts * rate).round().long().clamp_(max=length - count)
        places = first[:, None] + torch.arange(count, device=self.device)
        return stream[clips[:, None], places].float()
