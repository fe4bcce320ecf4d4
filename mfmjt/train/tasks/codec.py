"""Training of the nano codec on procedural and recorded sound.

The loss is a distance of spectra at several resolutions plus a small KL term.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
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
from mfmjt.data.recordings import Recording, Recordings
from mfmjt.errors import InputError
from mfmjt.train.tasks.procedural import (
    ProceduralTask,
    ProceduralTraining,
    render_array,
    whole_batch,
)
from mfmjt.train.tasks.recorded import mixture, shares
from mfmjt.train.trainer import Batch, TrainingResult, train

__all__ = ["CodecTask", "CodecTraining", "SpectralLoss", "train_codec"]


@dataclass(frozen=True)
class CodecTraining(ProceduralTraining):
    """How a codec is trained.

    Attributes:
        seconds: Length of a crop; rounded to whole latent frames.
        kl: Weight of the KL divergence from a unit Gaussian, per latent number.
        recordings: Corpus to train on as well, from `mfmjt data real`; null for none.
        recorded: Share of crops that are recordings.
        init_from: A codec to start from. Of one of other sizes the tensors that fit are taken.
        train_encoder: Whether the encoder is trained too. Without it the latents stay what they
            are, and a decoder can still improve after a network has been trained on them.
        mel: Extra weight of MMAudio's log10 mel distance.
        model: Sizes of the codec.
    """

    out: Path = Path("runs/codec")
    steps: int = 4200
    clips: int = 3000
    seconds: float = 1.024
    kl: float = 0.003
    recordings: Path | None = None
    recorded: float = 0.7
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

    longest = 2048
    scales = ((64, 12), (128, 20), (256, 32), (512, 48), (longest, 160))

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


class CodecTask(ProceduralTask):
    """The codec, or its decoder alone.

    Raises:
        InputError: `init_from` is of other sizes and the decoder alone is to be trained, or the
            corpus has no recordings of a split.
    """

    title = "codec"
    figures = ("loss", "log", "linear", "kl")

    def __init__(self, recipe: CodecTraining) -> None:
        self.codec, taken = _starting_codec(recipe)
        codec = self.codec
        decoder = nn.ModuleDict({"decoder": codec.decoder, "head": codec.head})
        super().__init__(recipe, codec if recipe.train_encoder else decoder)
        self.samples = round(foley.SAMPLE_RATE * foley.DURATION)
        self.sounds, self.held_out = (
            render_array(
                recipe.out / f"{split}_{count}.npy", count, (self.samples,), "int16",
                functools.partial(_sound, split, recipe.seed), recipe.workers,
            )
            for split, count in (
                ("train", recipe.clips),
                ("validation", recipe.validation_clips),
            )
        )  # fmt: skip
        self.frames = max(4, round(recipe.seconds * codec.sample_rate / codec.hop))
        self.spectral = SpectralLoss()
        if taken:
            self.notes = (*self.notes, taken)
        self.recordings = Recordings(recipe.recordings) if recipe.recordings else None
        if self.recordings:
            self.rows = _recorded(self.recordings, "train")
            self.chances = shares(self.rows, self.frames * codec.hop)

    def draw(self, step: int) -> Batch:
        """Draw crops, their gain and polarity, and the noise of their latents."""
        rng, generator = self.generators(step)
        batch, crop = self.recipe.batch, self.frames * self.codec.hop
        rows = rng.integers(len(self.sounds), size=batch)
        starts = rng.integers(self.samples - crop, size=batch)
        crops = [self.sounds[row, at : at + crop] for row, at in zip(rows, starts, strict=True)]
        target = torch.from_numpy(np.stack(crops)).float() / 32767
        if self.recordings:
            for row in np.flatnonzero(rng.uniform(size=batch) < self.recipe.recorded):
                sound = mixture(self.recordings, self.rows, self.chances, crop, rng)
                target[row] = torch.from_numpy(sound)
        # Gain and polarity: eight classes of loudness are not what the latents should memorize.
        gain = rng.uniform(0.5, 1.0, size=(batch, 1)) * rng.choice([-1.0, 1.0], size=(batch, 1))
        target = target * torch.from_numpy(gain).float()
        noise = torch.randn(batch, self.frames, self.codec.config.latent_dim, generator=generator)
        return whole_batch(batch, self.figures, target, noise)

    def loss(self, target: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the distances of the decoded sound and the KL divergence of the latents.

        Args:
            target: Crops (B, S).
            noise: Standard normal, like their latents (B, N, C).
        """
        c = self.recipe
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.set_grad_enabled(c.train_encoder):
                mean, logvar = self.codec.encode(target)
            sound = self.codec.decode(mean + (0.5 * logvar).exp() * noise)
        log, linear = self.spectral(sound, target)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = log + linear + c.kl * kl
        if c.mel:
            total = total + c.mel * F.l1_loss(self.spectral.mel(sound), self.spectral.mel(target))
        return {"loss": total, "log": log, "linear": linear, "kl": kl}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Send whole clips through the posterior's mean: losses and statistics of the latents.

        Those of recordings have names that begin with `recorded_`.
        """
        figures = self._through(row.astype(np.float32) / 32767 for row in self.held_out)
        if self.recordings:
            rows = _recorded(self.recordings, "validation")
            step = -(-len(rows) // self.recipe.validation_clips)
            recorded = self._through(map(self.recordings.sound, rows[::step]))
            figures |= {f"recorded_{name}": value for name, value in recorded.items()}
        return figures

    def _through(self, sounds: Iterable[np.ndarray[Any, Any]]) -> dict[str, float]:
        spectral, figures = self.spectral, []
        for row in sounds:
            # The longest window needs that much; silence follows a short recording.
            target = torch.from_numpy(np.pad(row, (0, max(0, spectral.longest - len(row)))))[None]
            mean, logvar = self.codec.encode(target)
            sound = self.codec.decode(mean)[:, : target.shape[1]]
            log, linear = spectral(sound, target)
            mel = F.l1_loss(spectral.mel(sound), spectral.mel(target))
            spread, change = (0.5 * logvar).exp().mean(), mean.diff(dim=1).square().mean()
            change = (change / mean.square().mean()).sqrt()
            figures.append([float(v) for v in (log, linear, mel, mean.std(), spread, change)])
        names = ("log", "linear", "mel_log10", "mean_std", "posterior_std", "step_change")
        return dict(zip(names, np.mean(figures, axis=0).tolist(), strict=True))

    def export(self) -> Path:
        """Write `codec.safetensors`, in float16."""
        path = Path(self.loop.out) / "codec.safetensors"
        self.codec.save(path, torch.float16)
        return path


def _starting_codec(recipe: CodecTraining) -> tuple[NanoCodec, str]:
    """Return the codec to train, and what of it does not start from nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        codec = NanoCodec(recipe.model)
    if recipe.init_from is None:
        return codec, ""
    first = NanoCodec.load(recipe.init_from)
    if first.config != recipe.model and not recipe.train_encoder:
        raise InputError(
            f"{recipe.init_from} holds a codec of other sizes, {first.config}, and "
            "train_encoder=false keeps its latents. Give its sizes as model."
        )
    own = codec.state_dict()
    fitting = {k: v for k, v in first.state_dict().items() if k in own and v.shape == own[k].shape}
    codec.load_state_dict(fitting, strict=False)
    return codec, f"{len(fitting)} of {len(own)} tensors start from {recipe.init_from}."


def _recorded(recordings: Recordings, split: str) -> list[Recording]:
    rows = recordings.of(split)
    if not rows:
        raise InputError(f"The corpus has no recordings of the split {split}: make it anew.")
    return rows


def train_codec(recipe: CodecTraining) -> TrainingResult:
    """Train a `NanoCodec` on procedural clips and recordings; see `mfmjt.train.trainer.train`."""
    return train(recipe.loop(), lambda _: CodecTask(recipe))
