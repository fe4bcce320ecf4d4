"""The judge of what a sound is: a small convolutional network on log-mel spectra, or YAMNet's.

It is trained on real audio alone (`mfmjt train classifier`): its opinion of generated audio says
how far that would pass for the real thing; its embedding carries the Fréchet distance.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from mfmjt.checkpoints import load_module, save_module
from mfmjt.codec.mel import mel_power
from mfmjt.errors import InputError
from mfmjt.evaluate.networks._frontend import resized
from mfmjt.evaluate.networks.yamnet import YAMNet
from mfmjt.families import PRETRAINED

__all__ = ["Classifier", "ClassifierConfig", "load_classifier"]

_LEVEL = 0.05  # RMS
_DROPPED = 0.3  # of what is pooled, in training


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier.

    Attributes:
        classes: Class names, in the order of the logits.
        sample_rate: Of the audio it listens to, in Hz.
        window: Samples per spectrum.
        hop: Samples between spectra.
        bands: Mel bands.
        widths: Channels after each of the halving convolutions.
        embedding: Size of the embedding.
        ears: `spectra` for convolutions on log-mel spectra, or `yamnet` for YAMNet as published,
            which the sizes of windows, bands and widths are not of.
    """

    classes: tuple[str, ...]
    sample_rate: int = 16000
    window: int = 512
    hop: int = 256
    bands: int = 64
    widths: tuple[int, ...] = (24, 48, 80, 112)
    embedding: int = 64
    ears: str = "spectra"


class Classifier(nn.Module):
    """Log-mel spectrum -> halving convolutions -> pooled over time -> embedding -> class logits.

    The level of a clip is normalized away; what distinguishes the classes is timbre and rhythm.
    Mean and maximum over time are both pooled: one hears what lasts, the other what strikes.
    With YAMNet's ears these are of the embeddings of its pieces, and its weights stay as they are.

    Args:
        config: Shape of the network.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        if config.ears == "yamnet":
            self.yamnet = YAMNet().requires_grad_(False)
            self.embed = nn.Linear(2 * YAMNet.width, config.embedding)
            self.head = nn.Linear(config.embedding, len(config.classes))
            return
        channels = (1, *config.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in itertools.pairwise(channels)
        )
        rows = -(-config.bands // 2 ** len(config.widths))
        self.embed = nn.Linear(2 * config.widths[-1] * rows, config.embedding)
        self.head = nn.Linear(config.embedding, len(config.classes))

    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Level-free log-mel spectrum (B, S // hop + 1, bands) of (B, S), in nepers / 4."""
        config = self.config
        wave = waveform.float()
        # -80 dB: silence stays silence instead of being amplified into something.
        wave = wave / wave.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
        power = mel_power(wave, config.sample_rate, config.window, config.hop, config.bands)
        # The spectrum of unit-variance white noise has this power; the floor lies 60 dB under it.
        white = 0.375 * config.window
        return torch.log(power / white + 1e-6) / 4 + 1

    def embedding(self, waveform: torch.Tensor) -> torch.Tensor:
        """Compute what the classes are read from.

        Args:
            waveform: Mono samples (B, S) at the config's sample rate, any level and length.

        Returns:
            Embedding (B, config.embedding), float32.

        Raises:
            InputError: Not (B, S) with S >= 1.
        """
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise InputError(
                f"The classifier listens to (batch, samples): got {tuple(waveform.shape)}. "
                "Give mono audio with at least one sample."
            )
        if self.config.ears == "yamnet":
            pieces = self.yamnet(_audible(waveform))
            x = torch.cat([pieces.mean(dim=1), pieces.amax(dim=1)], dim=1)
            return self.embed(functional.dropout(x, _DROPPED, self.training))
        x = self.features(waveform)[:, None]
        for stage in self.stages:
            x = stage(x)
        pooled = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)  # (B, 2 channels, rows)
        return self.embed(pooled.flatten(1))

    def logits(self, embedding: torch.Tensor) -> torch.Tensor:
        """Class logits (B, classes) from embeddings (B, config.embedding)."""
        return self.head(functional.relu(embedding))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Class logits (B, classes) of mono samples (B, S)."""
        return self.logits(self.embedding(waveform))

    @torch.no_grad()
    def judge(self, waveform: torch.Tensor, batch: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted class (n,) and embedding (n, config.embedding) of n clips, on the CPU.

        Args:
            waveform: Mono samples (n, S), any level and length.
            batch: Clips at once.
        """
        device = self.head.weight.device
        parts = [self.embedding(rows.to(device)) for rows in waveform.split(batch)]
        embedding = torch.cat(parts)
        return self.logits(embedding).argmax(dim=1).cpu(), embedding.cpu()

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write weights in fp16 and the config to one safetensors file.

        Args:
            path: File to write.
            metadata: Further strings to keep in the file's header.
        """
        save_module(path, self, self.config, torch.float16, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Read what `save` wrote, as an fp32 network in evaluation mode.

        Raises:
            InputError: No such file, or not a classifier.
        """
        return load_module(path, cls, ClassifierConfig, "classifier")


def _audible(waveform: torch.Tensor) -> torch.Tensor:
    """Return samples (B, S) at the level of recordings, at least a piece of YAMNet's long."""
    wave = waveform.float()
    wave = wave * (_LEVEL / wave.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4))
    return resized(wave, max(wave.shape[1], YAMNet.least))


def load_classifier(folder: str | os.PathLike[str] | None = None) -> Classifier:
    """Return the classifier of a model folder; by default the one that ships with `nano`.

    Raises:
        InputError: The folder holds none.
    """
    folder = Path(folder) if folder else PRETRAINED / "nano"
    return Classifier.load(folder / "classifier.safetensors")
