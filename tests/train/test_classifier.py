from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.train.classifier import ClassifierTraining, augment, train_classifier

TINY = ClassifierTraining(
    clips=24, validation_clips=12, steps=12, batch=12, duration=1.0, shortest=0.5, log_every=4
)


def test_a_few_steps_lower_the_loss_and_leave_weights_and_a_log(tmp_path: Path) -> None:
    out, log = tmp_path / "classifier.safetensors", tmp_path / "classifier.jsonl"
    network, entries = train_classifier(TINY, out, log)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]
    assert [json.loads(line) for line in log.read_text().splitlines()] == entries
    assert set(entries[-1]["validation"]) == {"all", *foley.CLASSES}
    wave = torch.from_numpy(foley.clip(0, "validation", duration=1.0, render=False).audio)[None]
    # What was judged is what was stored, to the bit: fp16 holds the weights exactly.
    torch.testing.assert_close(Classifier.load(out)(wave), network(wave), rtol=0, atol=0)


def test_training_repeats_and_leaves_the_global_seed_alone() -> None:
    recipe = ClassifierTraining(**{**vars(TINY), "steps": 3, "log_every": 1})
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    _, first = train_classifier(recipe)
    assert torch.equal(torch.random.get_rng_state(), before)
    _, second = train_classifier(recipe)
    assert [e.get("loss") for e in first] == [e.get("loss") for e in second]


def test_augmentation_keeps_the_sound_above_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 500 * t).expand(8, -1)
    changed = augment(tone, generator)
    assert changed.shape == tone.shape
    # A filter leaves a tone a tone, and the noise is at least 15 dB under it, up to the sampling
    # error of its power.
    power = torch.fft.rfft(changed).abs().square()
    share = power[:, 500] / power.sum(dim=1)
    assert (share >= 1 / (1 + 10**-1.5) - 16000**-0.5).all()
    assert (changed - tone).square().mean(dim=1).min() > 0


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(InputError, match="at least one step"):
        train_classifier(ClassifierTraining(steps=0))


def test_training_goes_on_from_given_weights(tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    begun = Classifier(ClassifierConfig(classes=foley.CLASSES))
    begun.save(first)
    still = ClassifierTraining(**{**vars(TINY), "steps": 1, "learning_rate": 0.0})
    network, _ = train_classifier(still, init=first)
    expected = Classifier.load(first).state_dict()
    for name, value in network.named_parameters():
        assert torch.equal(value, expected[name])
