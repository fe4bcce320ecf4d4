from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfmjt.data import foley
from mfmjt.data.wordings import wordings
from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig, load_classifier
from mfmjt.families import PRETRAINED


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return load_classifier()


def test_the_shipped_one_knows_clips_that_nobody_trained_on(shipped: Classifier) -> None:
    clips = [foley.clip(1000 + i, "validation", render=False) for i in range(24)]
    predicted, embedding = shipped.judge(torch.stack([torch.from_numpy(c.audio) for c in clips]))
    assert embedding.shape == (24, shipped.config.embedding)
    assert sum(int(p) == c.label for p, c in zip(predicted, clips, strict=True)) >= 23


def test_the_shipped_one_is_small_and_names_the_classes(shipped: Classifier) -> None:
    assert shipped.config.classes == foley.CLASSES
    assert sum(p.numel() for p in shipped.parameters()) <= 400_000


def test_level_does_not_matter(shipped: Classifier) -> None:
    wave = torch.from_numpy(foley.clip(3, "validation", render=False).audio)[None]
    assert torch.equal(shipped(wave), shipped(wave / 8))  # a power of two keeps every mantissa


@pytest.mark.parametrize("samples", [1, 100, 511, 16000 * 9])
def test_any_length_is_judged(shipped: Classifier, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = shipped(torch.randn(2, samples, generator=generator))
    assert logits.shape == (2, len(foley.CLASSES))
    assert torch.isfinite(logits).all()


def test_silence_is_judged_without_nan(shipped: Classifier) -> None:
    assert torch.isfinite(shipped(torch.zeros(1, 16000))).all()


@pytest.mark.parametrize("shape", [(16000,), (1, 0), (1, 1, 16000)])
def test_other_shapes_are_refused(shipped: Classifier, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="listens"):
        shipped.embedding(torch.zeros(shape))


def test_files_that_hold_no_classifier_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="is not a Classifier checkpoint"):
        Classifier.load(foreign)
    with pytest.raises(InputError, match="No classifier at"):
        Classifier.load(tmp_path / "absent.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    Classifier(ClassifierConfig(classes=("a", "b"))).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a Classifier checkpoint"):
        Classifier.load(truncated)


def test_with_the_ears_of_yamnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Classifier(ClassifierConfig(("a", "b", "c"), embedding=8, ears="yamnet")).eval()
    wave = torch.rand(2, 30000) - 0.5
    embedding = judge.embedding(wave)
    assert embedding.shape == (2, 8)
    assert torch.equal(judge(wave), judge(wave / 8))
    assert torch.isfinite(judge(torch.zeros(1, 100))).all()
    judge.save(tmp_path / "judge.safetensors")
    again = Classifier.load(tmp_path / "judge.safetensors")
    assert again.config == judge.config
    # Stored in half precision.
    assert torch.allclose(again.embedding(wave), embedding, rtol=1e-2, atol=1e-2)


def test_the_judge_of_recorded_sound_knows_what_it_ships_for() -> None:
    judge = load_classifier(PRETRAINED / "foley")
    assert judge.config.ears == "yamnet"
    assert {"rain", "footsteps", "dog"} <= set(judge.config.classes) <= set(wordings())
    # White noise is nothing that barks.
    noise = torch.randn(4, 48000, generator=torch.Generator().manual_seed(0))
    heard = [judge.config.classes[i] for i in judge.judge(noise)[0]]
    assert "dog" not in heard
