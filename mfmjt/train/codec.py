"""Training of the nano codec on procedural sound: multi-resolution spectra plus a small KL term."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.codec import MelSpectrogram, NanoCodec, NanoCodecConfig
from mfmjt.codec.mel import filterbank, stft
from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.train.ends import Trainer, render_array

__all__ = ["CodecConfig", "SpectralLoss", "train_codec"]


@dataclass(frozen=True)
class CodecConfig:
    """Settings of `train_codec`.

    Attributes:
        out: Folder of the log, the checkpoint, the rendered sound and `codec.safetensors`.
        steps: Optimiser steps.
        batch: Crops per step.
        seconds: Length of a crop; rounded to whole latent frames.
        lr: Peak learning rate.
        warmup: Steps to reach it.
        ema: Decay of the averaged weights, which are the ones exported.
        kl: Weight of the KL divergence from a unit Gaussian, per latent number.
        clips: Training clips rendered.
        validation_clips: Validation clips.
        seed: Of the data and of every draw.
        workers: Processes that render; 0 renders in this one.
        threads: Of PyTorch; 0 leaves its default.
        bf16: Run the networks (not the spectra) in bfloat16.
        resume: Continue from the checkpoint in `out`.
        log_every: Steps between lines of the log.
        save_every: Steps between checkpoints and validations.
        init_from: A codec to start from, of the same sizes.
        train_encoder: Whether the encoder is trained too. Without it the latents stay what they
            are, and a decoder can still improve after a network has been trained on them.
        mel: Extra weight of MMAudio's log10 mel distance.
        model: Sizes of the codec.
    """

    out: Path = Path("runs/codec")
    steps: int = 4200
    batch: int = 8
    seconds: float = 1.024
    lr: float = 1.5e-3
    warmup: int = 100
    ema: float = 0.995
    kl: float = 0.003
    clips: int = 3000
    validation_clips: int = 48
    seed: int = 0
    workers: int = 2
    threads: int = 0
    bf16: bool = True
    resume: bool = True
    log_every: int = 25
    save_every: int = 250
    init_from: Path | None = None
    train_encoder: bool = True
    mel: float = 0.0
    model: NanoCodecConfig = field(default_factory=NanoCodecConfig)


class SpectralLoss(nn.Module):
    """Distance of two sounds over windows of 4 to 128 ms.

    At each window: the mean absolute difference of log mel magnitudes, as in DAC (Kumar et al.,
    2023, arXiv:2306.06546, §3.3), and the spectral convergence of linear magnitudes, as in Parallel
    WaveGAN (Yamamoto et al., 2020, arXiv:1910.11480, eq. 5). Short windows hold the attacks, long
    ones the pitch. At 64 ms the mel is MMAudio's own, by which others judge the sound.
    """

    scales = ((64, 12), (128, 20), (256, 32), (512, 48), (2048, 160))

    def __init__(self, sample_rate: int = 16000) -> None:
        super().__init__()
        self.mel = MelSpectrogram("16k")
        for window, bands in self.scales:
            basis = filterbank(sample_rate, window, bands)
            # Filters of unit sum, on magnitudes that are the standard deviation of white noise.
            basis = basis / basis.sum(1, keepdim=True).clamp(min=1e-8)
            hann = torch.hann_window(window)
            self.register_buffer(f"basis_{window}", basis, persistent=False)
            self.register_buffer(f"hann_{window}", hann / hann.norm(), persistent=False)

    def forward(self, sound: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel distance (in nepers) and spectral convergence, averaged over the windows.

        Args:
            sound: `(B, S)`, the one with a gradient.
            target: `(B, S)`.
        """
        logs = [F.l1_loss(self.mel(sound), self.mel(target)) * math.log(10.0)]
        linear = []
        for window, _ in self.scales:
            basis, hann = getattr(self, f"basis_{window}"), getattr(self, f"hann_{window}")
            ours, theirs = (_magnitude(x, hann) for x in (sound, target))
            logs.append(F.l1_loss(_log(basis @ ours), _log(basis @ theirs)))
            linear.append((ours - theirs).norm() / theirs.norm().clamp(min=1e-3))
        return torch.stack(logs).mean(), torch.stack(linear).mean()


def _magnitude(sound: Tensor, hann: Tensor) -> Tensor:
    spectrum = stft(sound, hann, len(hann) // 2)
    return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-10)


def _log(magnitude: Tensor) -> Tensor:
    # -74 dB: what lies below is silence here.
    return torch.log(magnitude + 2e-4)


def _sound(split: str, seed: int, index: int) -> np.ndarray[Any, Any]:
    audio = foley.clip(index, split, seed, render=False).audio
    return np.round(audio * 32767).astype(np.int16)


def train_codec(config: CodecConfig) -> Path:
    """Train a `NanoCodec` on procedural clips, from the start or from its checkpoint.

    Returns:
        Path of the exported `codec.safetensors` (averaged weights, float16).

    Raises:
        InputError: The folder holds a checkpoint of another model, or `init_from` other sizes.
        RunError: The training diverged.
    """
    c = config
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    codec = NanoCodec(c.model)
    if c.init_from is not None:
        codec = NanoCodec.load(c.init_from)
        if codec.config != c.model:
            raise InputError(
                f"{c.init_from} holds a codec of other sizes, {codec.config}. "
                "Give its sizes as model, or start from nothing."
            )
    decoder = nn.ModuleDict({"decoder": codec.decoder, "head": codec.head})
    trainer = Trainer(
        codec if c.train_encoder else decoder, c.out, steps=c.steps, lr=c.lr, warmup=c.warmup,
        decay=c.ema, seed=c.seed, resume=c.resume,
    )  # fmt: skip
    samples = round(foley.SAMPLE_RATE * foley.DURATION)
    sounds, held_out = (
        render_array(
            c.out / f"{split}_{count}.npy", count, (samples,), "int16",
            functools.partial(_sound, split, c.seed), c.workers,
        )
        for split, count in (("train", c.clips), ("validation", c.validation_clips))
    )  # fmt: skip
    crop = max(4, round(c.seconds * codec.sample_rate / codec.hop)) * codec.hop
    spectral = SpectralLoss()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        rows = rng.integers(len(sounds), size=c.batch)
        starts = rng.integers(samples - crop, size=c.batch)
        crops = [sounds[row, start : start + crop] for row, start in zip(rows, starts, strict=True)]
        target = torch.from_numpy(np.stack(crops)).float() / 32767
        # Gain and polarity: eight classes of loudness are not what the latents should memorise.
        gain = rng.uniform(0.5, 1.0, size=(c.batch, 1)) * rng.choice([-1.0, 1.0], size=(c.batch, 1))
        target = target * torch.from_numpy(gain).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            with torch.set_grad_enabled(c.train_encoder):
                mean, logvar = codec.encode(target)
            noise = torch.randn(mean.shape, generator=generator)
            sound = codec.decode(mean + (0.5 * logvar).exp() * noise)
        log, linear = spectral(sound, target)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = log + linear + c.kl * kl
        if c.mel:
            total = total + c.mel * F.l1_loss(spectral.mel(sound), spectral.mel(target))
        return {"loss": total, "log": log, "linear": linear, "kl": kl}

    trainer.run(
        "codec",
        loss,
        functools.partial(_validate, codec, held_out, spectral),
        log_every=c.log_every,
        save_every=c.save_every,
    )
    path = c.out / "codec.safetensors"
    with trainer.averaged():
        codec.save(path, torch.float16)
    return path


@torch.no_grad()
def _validate(
    codec: NanoCodec, sounds: np.ndarray[Any, Any], spectral: SpectralLoss
) -> dict[str, float]:
    """Whole clips through the posterior's mean: losses and the statistics of the latents."""
    figures: list[list[float]] = []
    for row in sounds:
        target = torch.from_numpy(row.astype(np.float32))[None] / 32767
        mean, logvar = codec.encode(target)
        sound = codec.decode(mean)
        log, linear = spectral(sound, target)
        mel = F.l1_loss(spectral.mel(sound), spectral.mel(target))
        change = (mean.diff(dim=1).square().mean() / mean.square().mean()).sqrt()
        figures.append(
            [float(v) for v in (log, linear, mel, mean.std(), (0.5 * logvar).exp().mean(), change)]
        )
    names = ("log", "linear", "mel_log10", "mean_std", "posterior_std", "step_change")
    return dict(zip(names, np.mean(figures, axis=0).tolist(), strict=True))
