"""The whole way through for what is no video file: pictures and arrays."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mfmjt.errors import InputError
from mfmjt.media import read_video
from mfmjt.pipeline import Pipeline
from tests.pipeline.conftest import one


def pictures(count: int = 30) -> np.ndarray:
    """Noise, so that every network hears a difference."""
    return np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)


def write(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for i, picture in enumerate(frames):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def test_the_same_pictures_make_the_same_sound(pipe: Pipeline, tmp_path: Path) -> None:
    frames = pictures()
    folder = write(tmp_path / "frames", frames)
    first, *others = (
        one(pipe(video, fps=fps))
        for video, fps in (
            ((frames, 25), None),
            (frames, 25),
            (torch.from_numpy(frames), "25"),
            (folder, 25.0),
            (str(folder), None),
            (folder / "%d.png", 25),
            ((folder, 25), None),
        )
    )
    assert first.duration == 1.2
    for audio in others:
        assert torch.equal(audio.waveform, first.waveform)
    assert [len(audio.notes) for audio in (first, *others)] == [0, 0, 0, 0, 1, 0, 0]
    slower = one(pipe((frames, 12.5)))
    assert slower.duration == 2.4
    read = read_video((frames, 25), (8, 25), pipe.encoders.frame_size)
    assert torch.equal(one(pipe(read)).waveform, first.waveform)
    with pytest.raises(InputError, match="single frame"):
        pipe((frames[:1], 25))
    with pytest.raises(InputError, match=r"\(frames, fps\)"):
        pipe(frames)
    with pytest.raises(InputError, match="Video"):
        pipe(read, fps=25)


def test_long_rows_of_pictures_are_made_of_windows(pipe: Pipeline) -> None:
    frames = np.repeat(pictures(50), 6, axis=0)
    audio = one(pipe((frames, 25)))
    assert audio.duration == 12.0


def test_sound_is_laid_beside_them(pipe: Pipeline, tmp_path: Path) -> None:
    frames = np.repeat(np.arange(20, 220, 10, dtype=np.uint8), 24 * 32 * 3).reshape(-1, 24, 32, 3)
    audio = one(pipe((frames, 10)))
    (note,) = audio.mux((frames, 10), tmp_path / "a.mp4")
    assert "encoded once" in note
    assert audio.mux(frames, tmp_path / "b.webm", fps=10) == (note,)
    with av.open(str(tmp_path / "a.mp4")) as container:
        seen = [f.to_ndarray(format="rgb24").mean() for f in container.decode(video=0)]
        assert container.streams.audio[0].duration * container.streams.audio[0].time_base == 2
    assert np.abs(np.array(seen) - frames.mean((1, 2, 3))).max() <= 2


@pytest.mark.parametrize("kind", ["array", "folder", "gif"])
def test_features_are_found_again_by_content(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    frames, cache = pictures(), tmp_path / "cache"
    video: object = frames
    fps: int | None = 25
    if kind == "folder":
        video = write(tmp_path / "frames", frames)
    elif kind == "gif":
        first, *others = map(Image.fromarray, frames)
        video, fps = tmp_path / "a.gif", None
        first.save(video, save_all=True, append_images=others, duration=40)
    made = one(pipe(video, fps=fps, cache=cache))
    assert len(list(cache.iterdir())) == 1
    if fps is not None:
        pipe(video, fps=24, cache=cache)
        assert len(list(cache.iterdir())) == 2
    changed = frames.copy()
    changed[29, 5, 5, 0] ^= 1
    pipe((changed, 25), cache=cache)
    kept = sorted(cache.iterdir())
    assert len(kept) == 2 + (fps is not None)

    def looked(*_: object) -> None:
        raise AssertionError("frames were encoded")

    monkeypatch.setattr(pipe.encoders, "encode_frames", looked)
    again = one(pipe(video, fps=fps, cache=cache))
    assert torch.equal(again.waveform, made.waveform)
    assert sorted(cache.iterdir()) == kept


def test_every_device_gives_the_same_pictures(pipe: Pipeline) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    frames = torch.from_numpy(pictures())
    here, there = (one(pipe((f, 25))).waveform for f in (frames, frames.cuda()))
    assert torch.equal(here, there)
