"""Sounds that are judged: made by a network or real, with what the judges hear in them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples, silent, timed
from mfmjt.evaluate.listening import LISTENERS, Networks
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.evaluate.resample import resample
from mfmjt.families import Bundle
from mfmjt.meanflow import Sampling
from mfmjt.progress import Progress

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
    bundle: Bundle,
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
        bundle: Network, codec and encoders.
        examples: What to condition on.
        sampling: Steps and guidance; by default what the network is made for.
        conditions: `both`, `video` (frames alone) or `text` (caption alone).
        seed: Decides the noise, by default the examples' seed; example number i gets the same noise
            in every batch size and set.
        batch: Sounds made at once.
        progress: Called as (stage, fraction done) after every batch.
        seconds: Where to add the wall time of the stages `generate` and `decode`.

    Returns:
        Waveforms (n, S) float32 on the CPU, as long as the real ones.

    Raises:
        InputError: Unknown conditions.
        RunError: The network makes samples that are not finite.
    """
    if conditions not in CONDITIONS:
        raise InputError(
            f"Unknown conditions {conditions!r}: there are {', '.join(CONDITIONS)}. Give one."
        )
    sampling = sampling or bundle.sampling
    seconds = {} if seconds is None else seconds
    seed = examples.seed if seed is None else seed
    codec, device = bundle.codec, bundle.device
    given = {k: v for k, v in examples.features.items() if k in CONDITIONS[conditions]}
    samples = round(examples.duration * codec.sample_rate)
    length = -(-samples // codec.hop)
    waves: list[Tensor] = []
    for start in range(0, len(examples), batch):
        rows = examples.indices[start : start + batch]
        with timed(seconds, "generate"):
            noise = torch.stack([_noise(seed, row, length, codec.latent_dim) for row in rows])
            features = {k: v[start : start + batch].to(device) for k, v in given.items()}
            cond = bundle.conditions(features, length, sampling)
            latents = bundle.latents(noise.to(device), cond, sampling)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        with timed(seconds, "decode"):
            waves.append(bundle.decode(latents.float())[:, :samples])
        progress("generate", (start + len(rows)) / len(examples))
    return torch.cat(waves)


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
        networks: Further judges, those with published weights.

    Attributes:
        rng: Source of the metrics' random numbers.
    """

    rng: np.random.Generator

    def __init__(
        self,
        waves: Tensor,
        sample_rate: int,
        classifier: Classifier,
        seconds: dict[str, float] | None = None,
        networks: Networks | None = None,
    ) -> None:
        self.waves = waves
        self.sample_rate = sample_rate
        self.classifier = classifier
        self.seconds = {} if seconds is None else seconds
        self.networks = networks or Networks()
        self.rng = np.random.default_rng(0)
        self._heard: dict[str, list[dict[str, np.ndarray]]] = {}

    def heard(self, network: str, output: str, purpose: str = "") -> list[np.ndarray]:
        """Return what a network with published weights makes of each sound.

        Args:
            network: Its name in `LISTENERS`.
            output: Name of the array, such as `embedding`.
            purpose: Metric that it is for: a protocol may give each its own set of clips.

        Raises:
            Unheard: The weights are not there.
        """
        if network not in self._heard:
            rate = LISTENERS[network].rate
            with timed(self.seconds, "judge"):
                waves = resample(self.waves - self.waves.mean(1, True), self.sample_rate, rate)
                self._heard[network] = [self.networks.listen(network, w[None]) for w in waves]
        return [features[output] for features in self._heard[network]]

    def told(self, network: str, captions: list[str]) -> list[np.ndarray]:
        """Return a network's embedding of each caption."""
        return self.networks.read(network, captions)

    def seen(self, network: str) -> list[np.ndarray] | None:
        """Return a network's features of each clip's video; None where there are no videos."""
        return None

    def offsets(self) -> np.ndarray | None:
        """Return seconds between sound and video at the beginning and the end of each, (n, 2)."""
        return None

    @functools.cached_property
    def onsets(self) -> list[np.ndarray]:
        """Times at which each sound has detected onsets, in seconds."""
        with timed(self.seconds, "judge"):
            return [detect_onsets(wave, self.sample_rate) for wave in self.waves]

    @property
    def predicted(self) -> np.ndarray:
        """Class that the classifier hears, as an index, (n,) int64."""
        return self._judged[0].numpy()

    def share_of(self, labels: np.ndarray) -> float:
        """Return the share of sounds in which the classifier hears these classes (n,)."""
        return float((self.predicted == labels).mean())

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
        networks: As for `Sounds`.
    """

    def __init__(
        self,
        bundle: Bundle,
        examples: Examples,
        classifier: Classifier,
        *,
        sampling: Sampling | None = None,
        conditions: str = "both",
        batch: int = 20,
        progress: Progress = silent,
        networks: Networks | None = None,
    ) -> None:
        self.bundle, self.examples = bundle, examples
        self.sampling = sampling or bundle.sampling
        self.conditions, self.batch = conditions, batch
        self._generate = functools.partial(
            generate, bundle, sampling=self.sampling, batch=batch, progress=progress
        )
        seconds = dict(examples.seconds)
        waves = self._generate(examples, conditions=conditions, seconds=seconds)
        super().__init__(waves, bundle.codec.sample_rate, classifier, seconds, networks)
        self.rng = np.random.default_rng(examples.seed)

    def like(self, waves: Tensor, sample_rate: int | None = None) -> Sounds:
        """Give other waveforms (n, S) to the same judges; by default of the same rate in Hz."""
        rate = sample_rate or self.sample_rate
        return Sounds(waves, rate, self.classifier, self.seconds, self.networks)

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
        return None if waves is None else self.like(waves, self.examples.sample_rate)

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
        """Return the real sound, encoded and decoded; None where it cannot judge the codec."""
        codec, audio = self.bundle.codec, self.examples.audio
        if self.examples.like is None or self.examples.sample_rate != codec.sample_rate:
            return None
        waves: list[Tensor] = []
        with timed(self.seconds, "codec"), torch.inference_mode():
            for rows in audio.split(self.batch):
                mean, _ = codec.encode(rows.to(self.bundle.device))
                waves.append(codec.decode(mean)[:, : audio.shape[1]].cpu())
        return self.like(torch.cat(waves))
