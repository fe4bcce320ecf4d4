"""Sounds that are judged: made by a network or real, with what the judges hear in them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples, Progress, silent, timed
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.meanflow import Sampling
from mfmjt.model import Conditions

__all__ = ["CONDITIONS", "Made", "Sounds", "generate"]

CONDITIONS = {
    "both": ("video", "sync", "text", "video_mask", "text_mask"),
    "video": ("video", "sync", "video_mask"),
    "text": ("text", "text_mask"),
}
"""Features that are given to the network, by the name of the choice."""
AGAIN = 48
"""Examples for which a second sound is made."""


@torch.inference_mode()
def generate(
    bundle: Any,
    examples: Examples,
    sampling: Sampling | None = None,
    *,
    conditions: str = "both",
    seed: int | None = None,
    batch: int = 20,
    progress: Progress = silent,
    seconds: dict[str, float] | None = None,
) -> Tensor:
    """Make a sound for every example.

    Args:
        bundle: Network and codec.
        examples: What to condition on.
        sampling: Steps and guidance.
        conditions: `both`, `video` (frames alone) or `text` (caption alone).
        seed: Decides the noise, by default the examples' seed; example number i gets the same noise
            in every batch size and set.
        batch: Sounds made at once.
        progress: Called as (stage, fraction done) after every batch.
        seconds: Where to add the wall time of the stages `generate` and `decode`.

    Returns:
        Waveforms (n, S) float32 on the CPU, as long as the real ones.

    Raises:
        InputError: Unknown conditions, or a network that makes NaN.
    """
    if conditions not in CONDITIONS:
        raise InputError(
            f"Unknown conditions {conditions!r}: there are {', '.join(CONDITIONS)}. Give one."
        )
    sampling = sampling or Sampling()
    seconds = {} if seconds is None else seconds
    seed = examples.seed if seed is None else seed
    network, codec = bundle.network, bundle.codec
    device = next(network.parameters()).device
    given = {k: v for k, v in examples.features.items() if k in CONDITIONS[conditions]}
    samples = round(examples.duration * codec.sample_rate)
    length = -(-samples // codec.hop)
    waves: list[Tensor] = []
    for start in range(0, len(examples), batch):
        rows = examples.indices[start : start + batch]
        with timed(seconds, "generate"):
            noise = torch.stack([_noise(seed, row, length, codec.latent_dim) for row in rows])
            cond = {k: v[start : start + batch].to(device) for k, v in given.items()}
            latent = meanflow.sample(
                network,
                noise.to(device),
                steps=sampling.steps,
                cond={"cond": _conditions(network, len(rows), length, cond)},
                null={"cond": _conditions(network, len(rows), length, {})},
                guidance=sampling.guidance,
                mode=sampling.mode,
                instantaneous=sampling.instantaneous,
            )
            latent = network.unnormalize(latent)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        with timed(seconds, "decode"):
            waves.append(codec.decode(latent.float())[:, :samples].cpu())
        progress("generate", (start + len(rows)) / len(examples))
    made = torch.cat(waves)
    check_finite(made)
    return made


def check_finite(waves: Tensor) -> None:
    """Refuse samples that are not numbers.

    Raises:
        InputError: NaN or infinity among them.
    """
    if not bool(torch.isfinite(waves).all()):
        raise InputError(
            "The network made NaN or infinite samples, which cannot be judged. "
            "Its weights are damaged or untrained: give others."
        )


def _conditions(network: Any, rows: int, length: int, given: dict[str, Tensor]) -> Conditions:
    """Conditions computed once for all steps; null ones, too, have a row for every sound."""
    encoded = network.conditions(**given, latent_length=length)
    return Conditions(*(part.expand(rows, *part.shape[1:]) for part in encoded))


def _noise(seed: int, index: int, length: int, dim: int) -> Tensor:
    # NumPy's streams are the same on every platform and device.
    rng = np.random.default_rng([seed, index])
    return torch.from_numpy(rng.standard_normal((length, dim), dtype=np.float32))


class Sounds:
    """Waveforms, and what the judges hear in them: found when a metric first asks, and kept.

    Args:
        waves: Samples (n, S) float32 on the CPU.
        sample_rate: In Hz.
        classifier: Judge of classes and embeddings.
        seconds: Where to add the wall time of the stage `judge`.
    """

    def __init__(
        self,
        waves: Tensor,
        sample_rate: int,
        classifier: Classifier,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.waves = waves
        self.sample_rate = sample_rate
        self.classifier = classifier
        self.seconds = {} if seconds is None else seconds

    def __len__(self) -> int:
        return len(self.waves)

    @functools.cached_property
    def onsets(self) -> list[np.ndarray]:
        """Times at which each sound has detected onsets, in seconds."""
        with timed(self.seconds, "judge"):
            return [detect_onsets(wave, self.sample_rate) for wave in self.waves]

    @property
    def predicted(self) -> np.ndarray:
        """Class that the classifier hears, as an index, (n,) int64."""
        return self._judged[0].numpy()

    @property
    def embedding(self) -> np.ndarray:
        """Embedding of the classifier, (n, d) float64."""
        return self._judged[1].double().numpy()

    @functools.cached_property
    def _judged(self) -> tuple[Tensor, Tensor]:
        waves, rate = self.waves, self.classifier.config.sample_rate
        with timed(self.seconds, "judge"):
            if self.sample_rate != rate:
                import soxr

                heard = [soxr.resample(wave.numpy(), self.sample_rate, rate) for wave in waves]
                waves = torch.from_numpy(np.stack(heard))
            return self.classifier.judge(waves)


class Made(Sounds):
    """Sounds that a network made, and those that it makes in other ways when a metric asks.

    Args:
        bundle: Network, codec and encoders.
        examples: What the sounds are made for.
        classifier: As for `Sounds`.
        sampling: As for `generate`.
        conditions: As for `generate`.
        batch: As for `generate`.
        progress: As for `generate`.

    Attributes:
        rng: Source of the metrics' random numbers.
    """

    def __init__(
        self,
        bundle: Any,
        examples: Examples,
        classifier: Classifier,
        *,
        sampling: Sampling,
        conditions: str = "both",
        batch: int = 20,
        progress: Progress = silent,
    ) -> None:
        self.bundle, self.examples = bundle, examples
        self.conditions, self.batch = conditions, batch
        self.rng = np.random.default_rng(examples.seed)
        self._generate = functools.partial(
            generate, bundle, sampling=sampling, batch=batch, progress=progress
        )
        seconds = dict(examples.seconds)
        waves = self._generate(examples, conditions=conditions, seconds=seconds)
        super().__init__(waves, bundle.codec.sample_rate, classifier, seconds)

    def like(self, waves: Tensor) -> Sounds:
        """Other waveforms (n, S) of the same rate, for the same judges."""
        return Sounds(waves, self.sample_rate, self.classifier, self.seconds)

    @functools.cached_property
    def again(self) -> Sounds:
        """Sounds for the first examples from other noise."""
        first = self.examples.first(AGAIN)
        seed = self.examples.seed + 1
        return self.like(self._generate(first, conditions=self.conditions, seed=seed))

    @functools.cached_property
    def others(self) -> Sounds | None:
        """Other real sounds of the examples' classes; None where there are none."""
        waves = self.examples.others()
        return None if waves is None else self.like(waves)

    @functools.cached_property
    def from_text(self) -> Sounds | None:
        """Sounds made from the captions alone; None where there are none."""
        if self.conditions == "text":
            return self
        if "text" not in self.examples.features:
            return None
        return self.like(self._generate(self.examples, conditions="text"))

    @functools.cached_property
    def through_codec(self) -> Sounds | None:
        """The real sound, encoded and decoded; None where it has been through the codec before."""
        if not self.examples.procedural:
            return None
        codec, audio = self.bundle.codec, self.examples.audio
        device = next(codec.parameters()).device
        with timed(self.seconds, "codec"), torch.inference_mode():
            waves = [
                codec.decode(codec.encode(rows.to(device))[0])[:, : audio.shape[1]].cpu()
                for rows in audio.split(self.batch)
            ]
        return self.like(torch.cat(waves))
