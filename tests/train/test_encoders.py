from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mfmjt.data import foley
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.train.tasks import encoders as training
from mfmjt.train.tasks.encoders import EncodersTraining, train_encoders
from tests.support.bundles import TINY_ENCODERS
from tests.support.open_corpus import write_corpus
from tests.train.states import records, undo

TINY = EncodersTraining(
    steps=10, windows=2, window=16, batch=12, pictures=1, lr=3e-3, warmup=2, clips=12,
    validation_clips=2, workers=0, log_every=5, save_every=5, bf16=False,
    model=TINY_ENCODERS,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoders")
    train_encoders(dataclasses.replace(TINY, out=out))
    return out


def test_a_few_steps_help(whole: Path) -> None:
    first, second = (r for r in records(whole) if r["kind"] == "train")
    assert second["loss"] < first["loss"]
    assert {"loss", "match", "sync", "event", "grad_norm"} < set(first)


def test_the_export_loads(whole: Path) -> None:
    encoders = NanoEncoders.load(whole / "encoders.safetensors")
    assert encoders.config == TINY.model
    assert encoders.encode_text(["a bell"]).shape == (1, 32, 16)


def test_a_given_text_encoder_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    given = whole / "encoders.safetensors"
    recipe = dataclasses.replace(
        TINY,
        out=tmp_path / "out",
        steps=2,
        clips=12,
        recordings=corpus,
        text_from=given,
        init_from=given,
    )
    train_encoders(recipe)
    made, before = (
        NanoEncoders.load(path) for path in (recipe.out / "encoders.safetensors", given)
    )
    same = {
        name: torch.equal(value, before.state_dict()[name])
        for name, value in made.state_dict().items()
    }
    assert all(equal for name, equal in same.items() if name.startswith("text_encoder"))
    # Two steps from where it starts, at 3e-3 and less each, by Adam: 0.01 at most.
    moved = [
        float((value - before.state_dict()[name]).abs().max())
        for name, value in made.state_dict().items()
        if name.startswith("sync_encoder")
    ]
    assert 0 < max(moved) < 0.01
    assert made.vocabulary == before.vocabulary
    with pytest.raises(InputError, match="text_encoder in"):
        train_encoders(
            dataclasses.replace(recipe, model=dataclasses.replace(TINY.model, buckets=8))
        )


def test_resuming_repeats_the_uninterrupted_run(whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    undo(part, 5)
    # Frames in memory here and on disk there must make no difference either.
    train_encoders(dataclasses.replace(TINY, out=part, on_disk=False))
    assert records(part) == records(whole)
    ours, theirs = (NanoEncoders.load(f / "encoders.safetensors") for f in (part, whole))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_mel_rows_line_up_with_frames() -> None:
    # A click in the middle of frame 7 must be in the row of frame 7, four rows of silence first.
    rate = foley.SAMPLE_RATE // foley.FPS
    audio = np.zeros(20 * rate, np.float32)
    audio[7 * rate + rate // 2] = 1.0
    mel = training._log_mel(audio)
    assert mel.shape == (28, 160)
    assert int(mel.sum(1).argmax()) == 7 + 4


def test_event_targets_peak_at_the_frame_that_shows_the_event() -> None:
    # Frame i shows the moment (i + 1/2) / fps.
    events = np.array([5.5, 12.0]) / foley.FPS
    targets = training._event_targets(events, 20)
    assert targets[5] == pytest.approx(1.0)
    assert targets[11] == pytest.approx(targets[12])
    assert np.flatnonzero(targets).tolist() == [4, 5, 6, 11, 12]
    assert not training._event_targets(np.array([]), 20).any()


def test_augmented_frames_are_still_the_clip() -> None:
    clip = foley.clip(0, "train", duration=0.5).frames
    assert clip is not None
    frames = np.stack([clip] * 6)
    augmented = training._augment(frames, np.random.default_rng(0))
    assert augmented.shape == (6, len(clip), 3, 64, 64)
    assert float(augmented.abs().max()) <= 1.0
    assert not torch.equal(augmented[0], augmented[1])
    # Shifts, flips and levels are those of the whole clip: what did not move stays nearly still.
    moving = torch.from_numpy(clip).float().diff(dim=0).abs().amax(dim=(0, 3))
    still = torch.nn.functional.max_pool2d(moving[None], 11, 1, 5)[0] == 0
    still = still & still.flip(-1)
    assert bool(still.any())
    change = augmented.diff(dim=1).abs().amax(2)[..., still]
    # Noise of 0.05 at most: the difference of two draws, and the largest of all pixels.
    assert float(change.max()) < 6 * np.sqrt(2) * 0.05


def test_the_best_offset_is_the_true_one() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(60, 16, generator=rng), dim=-1)
    for shift in (-7, 0, 3):
        similarity = features @ features.roll(shift, 0).T
        assert training._best_offset(similarity) == shift


def test_matches_are_one_to_one() -> None:
    predicted, true = np.array([3.0, 4.0, 10.0]), np.array([3.5, 9.0])
    assert training._matches(predicted, true).tolist() == [2, 3, 2]
    assert training._peaks(np.array([0.9, 0.2, 0.6, 0.6, 0.1, 0.4])).tolist() == [0, 3]
