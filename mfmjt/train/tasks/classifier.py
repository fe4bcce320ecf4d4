"""Training of the judge of `mfmjt evaluate`: `mfmjt train classifier`.

The shipped one was trained by the defaults, still without reverberation in `augment`, and went on
with it: `init_from=FIRST training.clips=480 training.steps=200 training.batch=16
training.learning_rate=1e-3 training.seed=1`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.data.open_set import open_set
from mfmjt.data.recordings import SAMPLE_RATE, Recording, Recordings
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.evaluate.networks import YAMNet
from mfmjt.train import optim
from mfmjt.train.recipe import Loop
from mfmjt.train.tasks.procedural import whole_batch
from mfmjt.train.tasks.recorded import crop
from mfmjt.train.trainer import Batch, Task, TrainingResult, train

__all__ = ["ClassifierStage", "ClassifierTask", "ClassifierTraining", "train_classifier"]

TENTH = foley.SAMPLE_RATE // 10
_CLIPS = 1 << 20  # of the open set that may be drawn
_BEHIND = 0.4  # share of recordings with another, of any class, 10 to 30 dB below


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier is trained.

    Attributes:
        clips: Training clips.
        validation_clips: Validation clips.
        steps: Optimizer steps.
        batch: Crops per step.
        learning_rate: Peak of the cosine schedule.
        weight_decay: Of AdamW.
        shortest: Shortest crop in seconds; crops are up to the whole clip long.
        duration: Length of a clip in seconds.
        seed: Draws weights, crops and augmentation. The clips do not depend on it.
        log_every: Steps between lines of the log.
    """

    clips: int = 1440
    validation_clips: int = 240
    steps: int = 600
    batch: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    shortest: float = 2.0
    duration: float = foley.DURATION
    seed: int = 0
    log_every: int = 25


@dataclass(frozen=True)
class ClassifierStage:
    """Where the classifier goes, what it starts from, and how it is trained.

    Attributes:
        out: Folder of the weights, the log and the training states.
        init_from: Weights to start from, instead of random ones.
        recordings: Corpus to train on in place of procedural clips, from `mfmjt data real`; its
            labels are the classes. Null for none.
        codec: Codec through which half of that is heard, as all that is made will be: otherwise it
            would be the codec that is judged. Null for none.
        scenes: Share of clips of the open set among the recordings.
        yamnet: YAMNet's published TensorFlow Lite file, to listen with in place of convolutions
            of its own. Null for these.
        fewest: Training recordings that a label needs to be a class.
        widths: Channels after each convolution.
        embedding: Size of the embedding.
        training: How it is trained; `clips` and `validation_clips` are of procedural sound.
    """

    out: str = "output/nano/classifier"
    init_from: str | None = None
    recordings: Path | None = None
    codec: Path | None = None
    scenes: float = 0.0
    yamnet: Path | None = None
    fewest: int = 5
    widths: tuple[int, ...] = (24, 48, 80, 112)
    embedding: int = 64
    training: ClassifierTraining = field(default_factory=ClassifierTraining)

    def loop(self) -> Loop:
        """Return the settings of the loop."""
        training = self.training
        return Loop(
            out=self.out,
            steps=training.steps,
            lr=training.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=training.weight_decay,
            warmup=50,
            clip=0.0,
            ema=(),
            log_every=training.log_every,
            checkpoint_every=100,
            validate_every=training.steps,
            tensorboard=False,
        )


def load_audio(split: str, count: int, duration: float) -> tuple[Tensor, Tensor]:
    """Synthesise the first clips of a split.

    Returns:
        Waveforms (count, S) in fp16, which is 10 dB finer than their own 16-bit noise at most
        levels and half the memory, and labels (count,) int64.
    """
    waves, labels = [], []
    for index in range(count):
        clip = foley.clip(index, split, duration=duration, render=False)
        waves.append(torch.from_numpy(clip.audio).half())
        labels.append(clip.label)
    return torch.stack(waves), torch.tensor(labels)


def augment(wave: Tensor, generator: torch.Generator) -> Tensor:
    """Random tone control, reverberation and background noise: what a judge should not listen to.

    Gains drawn at six frequencies, octaves apart, are drawn from N(0, 3 dB) and interpolated over
    log frequency. The room is white noise that decays with a time constant of 1 to 10 ms, up to as
    loud as the direct sound; it smears attacks and scrambles phases, as any reproduction does.
    White noise lies 15 to 70 dB under the sound.

    Args:
        wave: Samples (B, S).
        generator: Source of every random number.

    Returns:
        Samples (B, S), float32.
    """
    rows, samples = wave.shape
    spectrum = torch.fft.rfft(wave.float())
    knots = 3.0 * torch.randn(rows, 6, generator=generator)
    position = torch.linspace(0, 1, spectrum.shape[1]).mul(foley.SAMPLE_RATE / 2).clamp(min=125)
    octave = torch.log2(position / 125).clamp(max=6) * (5 / 6)
    left = octave.floor().clamp(max=4).long()
    part = octave - left
    decibels = knots[:, left] * (1 - part) + knots[:, left + 1] * part
    decay = 1e-3 * 10 ** torch.rand(rows, 1, generator=generator)
    t = torch.arange(min(samples, foley.SAMPLE_RATE // 25)) / foley.SAMPLE_RATE
    room = torch.randn(rows, len(t), generator=generator) * torch.exp(-t / decay)
    room *= torch.rand(rows, 1, generator=generator) / room.square().sum(dim=1, keepdim=True).sqrt()
    room[:, 0] += 1  # the direct sound
    spectrum = spectrum * torch.fft.rfft(room, samples) * 10 ** (decibels / 20)
    wave = torch.fft.irfft(spectrum, samples)
    distance = 15 + 55 * torch.rand(rows, 1, generator=generator)
    noise = torch.randn(wave.shape, generator=generator) * 10 ** (-distance / 20)
    return wave + noise * wave.square().mean(dim=1, keepdim=True).sqrt()


def _crops(waves: Tensor, rows: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Make one random crop of each row, (len(rows), samples); a silent one becomes the loudest."""
    crops = []
    for row in rows.tolist():
        wave = waves[row].float()
        start = int(torch.randint(len(wave) - samples + 1, (), generator=generator))
        crop = wave[start : start + samples]
        if crop.abs().max() < 0.1 * wave.abs().max():
            start = min(max(int(wave.abs().argmax()) - samples // 2, 0), len(wave) - samples)
            crop = wave[start : start + samples]
        crops.append(crop)
    return torch.stack(crops)


def accuracy(network: Classifier, waves: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Share of clips given their own class: over all under `all`, and under each class's name.

    Args:
        network: The judge.
        waves: Batches (B, S) of one length each.
        labels: Classes of all clips (n,).
    """
    predicted = torch.cat([network.judge(batch)[0] for batch in waves])
    right = predicted == labels
    result = {"all": right.float().mean().item()}
    for label, name in enumerate(network.config.classes):
        if bool((labels == label).any()):
            result[name] = right[labels == label].float().mean().item()
    return result


class _Procedural:
    """Procedural clips of the train split, and those of validation that the classifier judges."""

    classes = foley.CLASSES

    def __init__(self, training: ClassifierTraining) -> None:
        if min(training.clips, training.validation_clips) < 1:
            raise InputError("The classifier needs at least one clip. Raise the counts.")
        self.training = training
        self.waves, self.labels = load_audio("train", training.clips, training.duration)
        self.generator, self.drawn = torch.Generator().manual_seed(training.seed), 0

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw crops, augmented; a resumed run draws those of the steps before again."""
        while self.drawn < step:
            self._draw()
        return self._draw()

    def _draw(self) -> tuple[Tensor, Tensor]:
        samples = _length(self.training, self.waves.shape[1], self.generator)
        rows = torch.randint(len(self.waves), (self.training.batch,), generator=self.generator)
        crops = augment(_crops(self.waves, rows, samples, self.generator), self.generator)
        self.drawn += 1
        return crops, self.labels[rows]

    def validation(self) -> tuple[list[Tensor], Tensor]:
        """Return all waveforms of the validation split as one batch, and their labels."""
        waves, labels = load_audio(
            "validation", self.training.validation_clips, self.training.duration
        )
        return [waves], labels


class _Recorded:
    """Recordings, with labels as classes: crops, or one-shots that sound several times."""

    def __init__(self, recipe: ClassifierStage, corpus: Path) -> None:
        self.training, self.recordings = recipe.training, Recordings(corpus)
        rows: dict[str, list[Recording]] = {}
        for row in self.recordings.of("train"):
            rows.setdefault(row.label, []).append(row)
        self.rows = {
            label: rows[label]
            for label in sorted(rows)
            if label and len(rows[label]) >= recipe.fewest
        }
        if not self.rows:
            raise InputError(
                f"No label of {corpus} has {recipe.fewest} recordings to train on. Lower fewest."
            )
        self.classes = tuple(self.rows)
        self.codec = NanoCodec.load(recipe.codec) if recipe.codec else None
        self.scenes = recipe.scenes
        self.set = open_set(corpus) if recipe.scenes else None
        # By the root of their number: neither do steps drown bells, nor are five bells worn out.
        weights = np.sqrt([len(rows) for rows in self.rows.values()])
        self.chances = weights / weights.sum()

    def _wave(self, label: str, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
        row = self.rows[label][rng.integers(len(self.rows[label]))]
        return self.recordings.sound(row)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw sounds of one length, augmented, and their classes."""
        rng = np.random.default_rng([self.training.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        samples = _length(self.training, round(self.training.duration * SAMPLE_RATE), generator)
        labels = rng.choice(len(self.classes), size=self.training.batch, p=self.chances)
        sounds = np.empty((len(labels), samples), np.float32)
        for place, label in enumerate(labels):
            if rng.uniform() < self.scenes:
                labels[place], sounds[place] = self._scene(samples, rng)
            else:
                sounds[place] = self._sound(self.classes[label], samples, rng)
        waves = torch.from_numpy(sounds)
        if self.codec is not None:
            half = waves[: len(waves) // 2]
            with torch.no_grad():
                half.copy_(self.codec.decode(self.codec.encode(half)[0])[:, :samples])
        return augment(waves, generator), torch.from_numpy(labels)

    def _scene(
        self, samples: int, rng: np.random.Generator
    ) -> tuple[int, np.ndarray[Any, np.dtype[np.float32]]]:
        """Draw a clip of the open set whose class is known, and crop it."""
        assert self.set is not None
        while True:
            clip = self.set.clip(int(rng.integers(_CLIPS)), "train", render=False)
            if clip.class_name in self.classes:
                return self.classes.index(clip.class_name), crop(clip.audio, samples, rng)

    def _sound(
        self, label: str, samples: int, rng: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        wave = self._wave(label, rng)
        sound = crop(wave, samples, rng)
        if len(wave) < samples // 2 and rng.uniform() < 0.5:
            times = int(rng.integers(2, 2 + 4 * samples // SAMPLE_RATE))
            gains = zip(rng.integers(samples, size=times), rng.uniform(0.3, 1, times), strict=True)
            sound = np.sum([gain * np.roll(sound, place) for place, gain in gains], axis=0)
        if rng.uniform() < _BEHIND:
            behind = self.classes[rng.choice(len(self.classes), p=self.chances)]
            other = crop(self._wave(behind, rng), samples, rng)
            gain = 10 ** (-rng.uniform(10, 30) / 20)
            other *= gain * np.linalg.norm(sound) / max(float(np.linalg.norm(other)), 1e-6)
            sound = sound + other
        return np.asarray(sound, np.float32)

    def validation(self) -> tuple[list[Tensor], Tensor]:
        """Return the recordings of the validation split one by one, and their labels."""
        return judged_recordings(self.recordings, self.classes, "validation")


def judged_recordings(
    recordings: Recordings, classes: Sequence[str], split: str
) -> tuple[list[Tensor], Tensor]:
    """Return recordings of these classes as batches of one, and their classes (n,) int64."""
    rows = [row for row in recordings.of(split) if row.label in classes]
    waves = [torch.from_numpy(recordings.sound(row))[None] for row in rows]
    return waves, torch.tensor([classes.index(row.label) for row in rows], dtype=torch.int64)


def _length(training: ClassifierTraining, total: int, generator: torch.Generator) -> int:
    """Draw the samples of a batch's crops, out of `total` at most."""
    shortest = min(total, round(training.shortest * foley.SAMPLE_RATE))
    # Lengths are whole tenths of a second: the FFT of a prime length takes three times as long.
    tenths = int(torch.randint(shortest // TENTH, total // TENTH + 1, (), generator=generator))
    return min(total, max(tenths, 1) * TENTH)


class ClassifierTask(Task):
    """The classifier, trained on sounds of the train split and judged by those of validation.

    Raises:
        InputError: A recipe without steps or clips, or weights to start from of other classes.
    """

    title = "classifier"
    figures = ("loss",)

    def __init__(self, recipe: ClassifierStage) -> None:
        training = self.training = recipe.training
        if min(training.steps, training.batch) < 1:
            raise InputError("The classifier needs at least one step and row. Raise the counts.")
        corpus = recipe.recordings
        self.source = _Recorded(recipe, corpus) if corpus else _Procedural(training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            config = ClassifierConfig(
                self.source.classes,
                widths=recipe.widths,
                embedding=recipe.embedding,
                ears="yamnet" if recipe.yamnet else "spectra",
            )
            init = recipe.init_from
            self.classifier = Classifier.load(init) if init else Classifier(config)
            if recipe.yamnet and not init:
                published = YAMNet.from_tflite(recipe.yamnet)
                self.classifier.yamnet.load_state_dict(published.state_dict())
        if self.classifier.config.classes != self.source.classes:
            raise InputError(f"{init} knows other classes. Leave out init_from.")
        super().__init__(recipe, recipe.loop(), self.classifier)

    def rate(self, step: int, share: float) -> float:
        """Fall to what is not quite 0 at the last step."""
        return optim.schedule(step, (step + 1) / (self.loop.steps + 1), self.loop.warmup, "cosine")

    def draw(self, step: int) -> Batch:
        """Draw sounds and their classes."""
        return whole_batch(self.training.batch, self.figures, *self.source.draw(step))

    def loss(self, crops: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of crops (B, S) and their classes (B,)."""
        logits = self.classifier(crops)
        return {"loss": functional.cross_entropy(logits, labels, label_smoothing=0.05)}

    def validate(self) -> dict[str, float]:
        """Judge what is stored, the weights after their trip through fp16, by `accuracy`."""
        stored = {
            k: v.half().to(v.dtype) if v.is_floating_point() else v
            for k, v in self.classifier.state_dict().items()
        }
        judge = copy.deepcopy(self.classifier)
        judge.load_state_dict(stored)
        return accuracy(judge.eval(), *self.source.validation())

    def export(self) -> Path:
        """Write `classifier.safetensors`, in float16."""
        path = Path(self.loop.out) / "classifier.safetensors"
        self.classifier.save(path)
        return path


def train_classifier(recipe: ClassifierStage) -> TrainingResult:
    """Train the judge of `mfmjt evaluate`; see `mfmjt.train.trainer.train`."""
    return train(recipe.loop(), lambda _: ClassifierTask(recipe))
