from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mfmjt.checkpoints import fingerprint
from mfmjt.encoders import NanoEncoders, NanoEncodersConfig
from mfmjt.errors import InputError, RunError
from mfmjt.pipeline import Pipeline
from tests.pipeline.conftest import one
from tests.support.clips import moving, write_video


@pytest.fixture
def pipe(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder, device="cpu")


def blind(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing can be looked at."""

    def looked(*_: object) -> None:
        raise AssertionError("frames were encoded")

    monkeypatch.setattr(pipe.encoders, "encode_frames", looked)
    monkeypatch.setattr(pipe.encoders, "encode_sync", looked)
    monkeypatch.setattr("mfmjt.media.video.open_video", looked)


@pytest.mark.parametrize("window", [8, 2])
def test_the_second_time_nothing_is_decoded(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=100, size=(24, 32), picture=moving)
    pipe.bundle.window = window
    without = one(pipe(clip, seed=3))
    first = one(pipe(clip, seed=3, cache=tmp_path / "deep" / "cache"))
    files = list((tmp_path / "deep" / "cache").iterdir())
    assert len(files) == (1 if window == 8 else 3)
    renamed = shutil.copy(clip, tmp_path / "another name.mkv")
    blind(pipe, monkeypatch)
    for path in (clip, renamed):
        second = one(pipe(path, seed=3, cache=tmp_path / "deep" / "cache"))
        assert torch.equal(second.waveform, first.waveform)
        assert torch.equal(second.waveform, without.waveform)
        assert second.notes == ()
    other = one(pipe(clip, seed=4, prompt="rain", steps=2, cache=tmp_path / "deep" / "cache"))
    assert not torch.equal(other.waveform, first.waveform)
    assert sorted((tmp_path / "deep" / "cache").iterdir()) == sorted(files)


def test_other_content_durations_weights_and_windows_are_other_entries(
    pipe: Pipeline, model_folder: Path, clip: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    pipe(clip, cache=cache)
    pipe(clip, duration=1.0, cache=cache)
    pipe.bundle.window = 4
    pipe(clip, cache=cache)
    pipe(write_video(tmp_path / "other.mp4", frames=31), cache=cache)
    tuned = Pipeline.from_pretrained(model_folder, device="cpu")
    with torch.inference_mode():
        next(tuned.encoders.parameters()).view(-1)[0].add_(1.0)
    tuned(clip, cache=cache)
    assert len(list(cache.iterdir())) == 5


def test_notes_come_again_with_the_name_of_today(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    first = one(pipe(path, cache=tmp_path / "cache"))
    renamed = path.rename(tmp_path / "b.mp4")
    blind(pipe, monkeypatch)
    second = one(pipe(renamed, cache=tmp_path / "cache"))
    assert first.notes
    assert second.notes == tuple(note.replace(str(path), str(renamed)) for note in first.notes)


@pytest.mark.parametrize("fault", ["a bit", "cut", "empty", "garbage", "no header", "missing"])
def test_what_is_damaged_is_made_again(pipe: Pipeline, tmp_path: Path, fault: str) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=100, size=(24, 32), picture=moving)
    pipe.bundle.window = 2
    cache = tmp_path / "cache"
    first = one(pipe(clip, cache=cache))
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    victim = sorted(whole)[1]
    content = bytearray(whole[victim])
    if fault == "a bit":
        content[-100] ^= 1
    elif fault == "cut":
        del content[-10:]
    elif fault == "empty":
        content.clear()
    elif fault == "garbage":
        content[:] = np.random.default_rng(0).bytes(1000)
    elif fault == "no header":
        content[:] = content.replace(b'"about"', b'"abour"')
    victim.write_bytes(bytes(content))
    if fault == "missing":
        victim.unlink()
    again = one(pipe(clip, cache=cache))
    assert torch.equal(again.waveform, first.waveform)
    if fault == "missing":
        assert again.notes == ()
    else:
        (note,) = again.notes
        assert str(victim) in note
        assert "\n" not in note
        assert "damaged" in note
    assert {path: path.read_bytes() for path in cache.iterdir()} == whole
    assert one(pipe(clip, cache=cache)).notes == ()


def test_what_cannot_be_used(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in ("file", "file/inside"):
        with pytest.raises(RunError, match="cache"):
            pipe(clip, cache=tmp_path / folder)
    for video in ("none.mp4", "."):
        with pytest.raises(InputError):
            pipe(video, cache=tmp_path / "cache")
    assert not any(p.suffix == ".safetensors" for p in tmp_path.rglob("*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Cannot write"):
        pipe(clip, cache=tmp_path)


def test_identity_is_of_names_and_values() -> None:
    config = NanoEncodersConfig(dim=16, frame_channels=(4, 4, 8, 8), sync_channels=(4, 4, 8, 8))

    def made(seed: int) -> NanoEncoders:
        torch.manual_seed(seed)
        return NanoEncoders(config)

    assert fingerprint(made(0)) == fingerprint(made(0))
    found = {fingerprint(made(0)), fingerprint(made(1)), fingerprint(made(0).bfloat16())}
    found |= {fingerprint(nn.Linear(2, 2)), fingerprint(nn.Sequential(nn.Linear(2, 2)))}
    changed = made(0)
    with torch.no_grad():
        changed.frame_encoder.out.bias[3] += 2**-20
    assert len(found | {fingerprint(changed)}) == 6
