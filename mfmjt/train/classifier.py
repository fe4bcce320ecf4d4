"""Train the judge of `mfmjt evaluate`: `python -m mfmjt.train.classifier OUT.safetensors`.

The shipped one was trained by the defaults, still without reverberation in `augment`, and went on
with it: `--init FIRST --clips 480 --steps 200 --batch 16 --learning-rate 1e-3 --seed 1`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.files import atomic_path

__all__ = ["ClassifierTraining", "accuracy", "augment", "load_audio", "train_classifier"]

TENTH = foley.SAMPLE_RATE // 10


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier is trained.

    Attributes:
        clips: Training clips.
        validation_clips: Validation clips.
        steps: Optimiser steps.
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


def load_audio(split: str, count: int, duration: float) -> tuple[torch.Tensor, torch.Tensor]:
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


def augment(wave: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
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


def _crops(
    waves: torch.Tensor, rows: torch.Tensor, samples: int, generator: torch.Generator
) -> torch.Tensor:
    """One random crop of each row, (len(rows), samples); a silent one becomes the loudest."""
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


def accuracy(network: Classifier, waves: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Share of clips given their own class: over all under `all`, and under each class's name."""
    predicted, _ = network.judge(waves)
    right = predicted == labels
    result = {"all": right.float().mean().item()}
    for label, name in enumerate(network.config.classes):
        if bool((labels == label).any()):
            result[name] = right[labels == label].float().mean().item()
    return result


def train_classifier(
    training: ClassifierTraining | None = None,
    out: str | Path | None = None,
    log: str | Path | None = None,
    init: str | Path | None = None,
) -> tuple[Classifier, list[dict[str, Any]]]:
    """Train on clips of the train split, judge by clips of the validation split.

    Args:
        training: The recipe.
        out: Where to write the weights (safetensors), if anywhere.
        log: Where to write the log (JSON lines), if anywhere.
        init: Weights to start from, instead of random ones.

    Returns:
        The network in evaluation mode, and the log: one entry every few steps (step, loss,
        seconds), then one with the validation accuracy.

    Raises:
        InputError: A recipe without steps or clips.
    """
    training = training or ClassifierTraining()
    if min(training.steps, training.clips, training.validation_clips, training.batch) < 1:
        raise InputError("The classifier needs at least one step, clip and row. Raise the counts.")
    began = time.perf_counter()
    waves, labels = load_audio("train", training.clips, training.duration)
    generator = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = (
            Classifier.load(init) if init else Classifier(ClassifierConfig(classes=foley.CLASSES))
        )
    optimizer = torch.optim.AdamW(
        network.parameters(), training.learning_rate, weight_decay=training.weight_decay
    )
    entries: list[dict[str, Any]] = [{"config": asdict(training)}]
    losses: list[float] = []
    total = waves.shape[1]
    shortest = min(total, round(training.shortest * foley.SAMPLE_RATE))
    network.train()
    for step in range(1, training.steps + 1):
        rate = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / (training.steps + 1)))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate
        # Lengths are whole tenths of a second: the FFT of a prime length takes three times as long.
        tenths = int(torch.randint(shortest // TENTH, total // TENTH + 1, (), generator=generator))
        samples = min(total, max(tenths, 1) * TENTH)
        rows = torch.randint(len(waves), (training.batch,), generator=generator)
        crops = augment(_crops(waves, rows, samples, generator), generator)
        loss = functional.cross_entropy(network(crops), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % training.log_every == 0 or step == training.steps:
            seconds = round(time.perf_counter() - began, 2)
            entries.append({"step": step, "loss": float(np.mean(losses)), "seconds": seconds})
            sys.stderr.write(f"classifier {step}/{training.steps} loss {entries[-1]['loss']:.3f}\n")
            losses.clear()
    network.eval()
    # What is judged is what is stored: the weights after their trip through fp16.
    network.load_state_dict(
        {
            k: v.half().to(v.dtype) if v.is_floating_point() else v
            for k, v in network.state_dict().items()
        }
    )
    held, held_labels = load_audio("validation", training.validation_clips, training.duration)
    seconds = round(time.perf_counter() - began, 2)
    entries.append({"validation": accuracy(network, held, held_labels), "seconds": seconds})
    if out is not None:
        network.save(out)
    if log is not None:
        with atomic_path(log) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return network, entries


def main() -> None:
    """Train with the default recipe and write weights and log."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--log", type=Path, help="JSON lines to write")
    parser.add_argument("--steps", type=int, default=ClassifierTraining.steps)
    parser.add_argument("--clips", type=int, default=ClassifierTraining.clips)
    parser.add_argument("--seed", type=int, default=ClassifierTraining.seed)
    parser.add_argument("--batch", type=int, default=ClassifierTraining.batch)
    parser.add_argument("--learning-rate", type=float, default=ClassifierTraining.learning_rate)
    parser.add_argument("--init", type=Path, help="safetensors file to start from")
    given = parser.parse_args()
    training = ClassifierTraining(
        steps=given.steps,
        clips=given.clips,
        batch=given.batch,
        learning_rate=given.learning_rate,
        seed=given.seed,
    )
    _, entries = train_classifier(training, given.out, given.log, given.init)
    sys.stdout.write(json.dumps(entries[-1]) + "\n")


if __name__ == "__main__":
    main()
