from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.data import foley
from mfmjt.data.open_set import OpenSet, open_set
from mfmjt.data.wordings import wordings
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples, opened, procedural, stored
from mfmjt.evaluate.run import evaluate
from mfmjt.families import Bundle
from mfmjt.features.procedural import write_store
from mfmjt.features.store import FeatureStore
from tests.oracle import allowance, error
from tests.support.open_corpus import LASTING, STRUCK, write_corpus

DURATION = 1.5  # s, of the clips of conftest.py


def test_they_are_the_clips_of_the_split_from_the_seed_on(clips: Examples) -> None:
    assert clips.indices == [3, 4, 5]
    for row, index in enumerate(clips.indices):
        clip = foley.clip(index, "test", duration=DURATION, render=False)
        assert torch.equal(clips.audio[row], torch.from_numpy(clip.audio))
        assert np.array_equal(clips.events[row], clip.events)
        assert (clips.captions[row], clips.labels[row]) == (clip.caption, clip.label)
        assert clips.classes[row] == clip.class_name
    assert [len(clips), *map(len, clips.features.values())] == [3] * 4
    assert clips.duration == DURATION


def test_the_first_keep_their_features(clips: Examples) -> None:
    first = clips.first(2)
    assert first.indices == clips.indices[:2]
    assert torch.equal(first.features["sync"], clips.features["sync"][:2])
    assert len(first.events) == 2
    assert len(clips.first(99)) == len(clips)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_others_are_other_clips_of_the_same_classes(bundle: Bundle, split: str) -> None:
    clips = procedural(bundle.encoders, 2, split=split, duration=1.0)
    others = clips.others()
    assert others.shape == clips.audio.shape
    assert not any(torch.equal(a, b) for a, b in zip(others, clips.audio, strict=True))


def test_open_scenes_and_open_prompts(bundle: Bundle, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    known = ("tuba", *STRUCK, *LASTING[:2])
    scenes = opened(corpus, bundle.encoders, known, 4, duration=DURATION)
    assert scenes.class_list[: len(known)] == known
    assert set(scenes.class_list[len(known) :]) == set(LASTING[2:])
    assert sorted(scenes.features) == ["sync", "text", "video"]
    assert len(scenes.impact) == sum(len(events) > 0 for events in scenes.events) > 0
    for row, name in enumerate(scenes.classes):
        clip = open_set(corpus).clip(row, "test", duration=DURATION, kind="scene", render=False)
        assert (clip.class_name, clip.caption) == (name, scenes.captions[row])
        assert torch.equal(scenes.audio[row], torch.from_numpy(clip.audio))
    others = scenes.others()
    assert others.shape == scenes.audio.shape
    assert not any(torch.equal(a, b) for a, b in zip(others, scenes.audio, strict=True))
    # A class of which no training recording fits a picture is heard without one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenSet, "in_scenes", lambda *_: frozenset())
        without = scenes.others()
    assert without.shape == others.shape
    assert not any(torch.equal(a, b) for a, b in zip(without, others, strict=True))
    prompts = opened(
        corpus, bundle.encoders, ("rain", "bell"), 4, text_alone=True, unseen=True, duration=1.0
    )
    assert list(prompts.features) == ["text"]
    assert len(prompts.impact) == 0
    assert set(prompts.classes) == {"rain", "bell"}
    for name, caption in zip(prompts.classes, prompts.captions, strict=True):
        assert caption in wordings()[name].unseen
    with pytest.raises(InputError, match="knows no class"):
        opened(corpus, bundle.encoders, ("tuba",), 4)


def test_open_prompts_are_judged(bundle: Bundle, classifier: Classifier, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    judge = Classifier(dataclasses.replace(classifier.config, classes=STRUCK)).eval()
    prompts = opened(corpus, bundle.encoders, STRUCK, 3, text_alone=True, duration=DURATION)
    report = evaluate(bundle, prompts, classifier=judge, conditions="text", batch=3)
    assert report.figures["class_accuracy"] is not None
    assert report.figures["onset_f1"] is None
    assert report.figures["diversity"] is not None


def test_too_few_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="at least 2 clips"):
        procedural(bundle.encoders, 1)


@pytest.fixture(scope="module")
def store(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, {"test": 4}, bundle.codec, bundle.encoders, workers=0)
    return folder


def test_a_store_gives_what_its_clips_give(bundle: Bundle, store: Path) -> None:
    ours = stored(FeatureStore(store, "test"), bundle, 2, seed=1)
    theirs = procedural(bundle.encoders, 2, seed=1)
    assert (
        (ours.indices, ours.classes) == (theirs.indices, theirs.classes) == ([2, 3], ours.classes)
    )
    assert ours.captions == theirs.captions
    assert np.array_equal(ours.events[1], theirs.events[1])
    half = torch.finfo(torch.float16).eps
    for name, features in theirs.features.items():
        torch.testing.assert_close(ours.features[name], features, rtol=half, atol=half)
    # The real sound has been through the codec, which has nothing more to lose.
    with torch.inference_mode():
        mean, _ = bundle.codec.encode(theirs.audio)
        decoded = bundle.codec.decode(mean.half().float())
    # As for the codec in chunks: what its depth makes of a rounding.
    assert error(ours.audio, decoded) <= allowance(decoded, torch.float32, 512)
    assert ours.others() is None


def test_of_a_store_without_them_class_and_events_are_unknown(bundle: Bundle, store: Path) -> None:
    unknown = FeatureStore(store, "test")
    unknown.labels, unknown.events = [], []  # as `mfmjt extract` leaves them
    clips = stored(unknown, bundle, 3)
    assert (clips.labels, clips.events, clips.classes, len(clips.impact)) == (None, None, [], 0)


def test_a_store_without_so_many_clips_is_refused(bundle: Bundle, store: Path) -> None:
    assert len(stored(FeatureStore(store, "test"), bundle, 3, seed=0)) == 3
    with pytest.raises(InputError, match="holds 4 clips"):
        stored(FeatureStore(store, "test"), bundle, 3, seed=1)
