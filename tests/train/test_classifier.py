from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.evaluate.networks import YAMNet
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks import classifier
from mfmjt.train.tasks.classifier import (
    ClassifierStage,
    ClassifierTask,
    ClassifierTraining,
    augment,
    train_classifier,
)
from mfmjt.train.trainer import Trainer
from tests.support.bundles import TINY_CODEC
from tests.support.open_corpus import LASTING, STRUCK, write_corpus
from tests.support.recordings import write_recordings
from tests.train.states import load_state, records, undo

TINY = ClassifierTraining(
    clips=24, validation_clips=12, steps=12, batch=12, duration=1.0, shortest=0.5, log_every=4
)


def stage(out: Path, **changes: object) -> ClassifierStage:
    return ClassifierStage(str(out), training=dataclasses.replace(TINY, **changes))


def test_a_few_steps_lower_the_loss_and_leave_weights_and_a_log(tmp_path: Path) -> None:
    result = train_classifier(stage(tmp_path))
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    (validation,) = records(tmp_path, "validation")
    assert {"all", *foley.CLASSES} < set(validation)
    # The weights as they were trained, through fp16.
    stored, (state, _) = Classifier.load(result.file).state_dict(), load_state(tmp_path)
    for name, value in stored.items():
        assert torch.equal(value, state[f"net.{name}"].half().to(value.dtype)), name
    waves, labels = classifier.load_audio("validation", TINY.validation_clips, TINY.duration)
    judged = classifier.accuracy(Classifier.load(result.file), [waves], labels)
    assert {name: validation[name] for name in judged} == judged


def test_training_repeats_and_leaves_the_global_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name in ("first", "second"):
        train_classifier(stage(tmp_path / name, steps=3, log_every=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert records(tmp_path / "first") == records(tmp_path / "second")


def test_resuming_repeats_the_uninterrupted_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        ClassifierStage, "loop",
        lambda self, real=ClassifierStage.loop: dataclasses.replace(real(self), checkpoint_every=2),
    )  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_classifier(stage(whole, steps=4, log_every=1))
    shutil.copytree(whole, part)
    undo(part, 2)
    train_classifier(stage(part, steps=4, log_every=1))
    assert records(part) == records(whole)
    a, b = load_state(part)[0], load_state(whole)[0]
    assert all(torch.equal(a[key], b[key]) for key in b)


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


def test_a_recipe_without_steps_is_refused(tmp_path: Path) -> None:
    for setting in ("steps", "clips"):
        with pytest.raises(InputError, match="at least"):
            train_classifier(stage(tmp_path, **{setting: 0}))


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    Classifier(ClassifierConfig(classes=foley.CLASSES)).save(first)
    config = dataclasses.replace(stage(tmp_path / "out"), init_from=str(first))
    with Processes() as processes:
        trainer = Trainer(ClassifierTask(config), processes)
    expected = Classifier.load(first).state_dict()
    for name, value in trainer.net.state_dict().items():
        assert torch.equal(value, expected[name])


def test_recordings_give_the_classes_and_are_told_apart(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path / "corpus", labels=("low", "high"), seconds=(0.2, 1.0, 2.0))
    recipe = dataclasses.replace(stage(tmp_path, steps=24), recordings=corpus, fewest=3)
    network = Classifier.load(train_classifier(recipe).file)
    assert network.config.classes == ("high", "low")
    (validation,) = records(tmp_path, "validation")
    # An octave apart, which a step of two and a half semitones does not bridge.
    assert (validation["all"], validation["low"], validation["high"]) == (1.0, 1.0, 1.0)


def test_a_draw_from_recordings_depends_on_the_step_alone(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path, labels=("low", "high"))
    recipe = dataclasses.replace(stage(tmp_path), recordings=corpus, fewest=1)
    first, second = (ClassifierTask(recipe) for _ in range(2))
    first.draw(0)
    crops, labels = first.draw(1).passes[0].inputs
    again, same = second.draw(1).passes[0].inputs
    assert crops.shape == (TINY.batch, crops.shape[1])
    assert crops.dtype == torch.float32
    assert torch.equal(crops, again)
    assert torch.equal(labels, same)


def test_half_of_the_recordings_are_heard_through_a_codec(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path / "corpus", labels=("low",), seconds=(1.0,))
    codec = tmp_path / "codec.safetensors"
    with torch.no_grad():
        silent = NanoCodec(TINY_CODEC)
        silent.head.weight.zero_()
        silent.head.bias.fill_(-20.0)  # magnitudes of e^-20
        silent.save(codec)
    recipe = dataclasses.replace(
        stage(tmp_path, batch=64), recordings=corpus, fewest=1, codec=codec
    )
    crops, _ = ClassifierTask(recipe).draw(0).passes[0].inputs
    assert int((crops.abs().amax(1) > 0.01).sum()) == 32


def test_clips_of_the_open_set_are_among_the_recordings(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    recipe = dataclasses.replace(stage(tmp_path), recordings=corpus, fewest=1)
    found = [ClassifierTask(dataclasses.replace(recipe, scenes=s)) for s in (0.0, 1.0, 1.0)]
    alone, (crops, labels), (again, same) = (t.draw(3).passes[0].inputs for t in found)
    assert torch.equal(crops, again)
    assert torch.equal(labels, same)
    assert crops.shape == alone[0].shape
    assert not torch.equal(crops, alone[0])
    # What is seen: half of the clips are scenes, of which no wind is heard first.
    names = [found[1].classifier.config.classes[label] for label in labels]
    assert set(names) <= set(STRUCK + LASTING)


def test_yamnet_listens_and_stays_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    published = YAMNet()
    monkeypatch.setattr(YAMNet, "from_tflite", lambda path: published)
    corpus = write_recordings(tmp_path / "corpus", labels=("low", "high"), seconds=(1.0,))
    recipe = dataclasses.replace(
        stage(tmp_path, steps=2, batch=2), recordings=corpus, fewest=1, yamnet=Path("yamnet.tflite")
    )
    judge = Classifier.load(train_classifier(recipe).file)
    assert judge.config.ears == "yamnet"
    for name, value in published.state_dict().items():
        assert torch.equal(judge.yamnet.state_dict()[name], value.half().float())


def test_labels_with_few_recordings_are_no_classes(tmp_path: Path) -> None:
    corpus = write_recordings(tmp_path, labels=("low",))
    with pytest.raises(InputError, match="has 3 recordings to train on"):
        ClassifierTask(dataclasses.replace(stage(tmp_path), recordings=corpus, fewest=3))


def test_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    Classifier(ClassifierConfig(classes=foley.CLASSES)).save(first)
    corpus = write_recordings(tmp_path, labels=("low",))
    recipe = dataclasses.replace(stage(tmp_path), recordings=corpus, fewest=1, init_from=str(first))
    with pytest.raises(InputError, match="knows other classes"):
        ClassifierTask(recipe)
