from __future__ import annotations

import asyncio
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfmjt.encoders import FrameSpec
from mfmjt.encoders.base import stream_options
from mfmjt.errors import InputError, RunError
from mfmjt.media import VIDEO_SUFFIXES, VideoStream, mux
from mfmjt.serve.sandbox import Sandbox, load_frames
from mfmjt.serve.sandboxed import kind
from tests.media.films import WIDTH, Film

MEMORY = 2**30
NANO = (FrameSpec(8, 64), FrameSpec(25, 64))
RATE = Fraction(25)
TIMES = [i / RATE for i in range(20)]


def read(
    folder: Path, clip: bytes, specs: Sequence[FrameSpec], limit: float = 30.0
) -> dict[str, Any]:
    (folder / "upload").write_bytes(clip)

    async def run() -> dict[str, Any]:
        return await Sandbox(1, 60.0, MEMORY, specs).read(folder, None, limit)

    return asyncio.run(run())


def test_pictures_are_those_that_the_pipeline_reads(tmp_path: Path, clip: bytes) -> None:
    found = read(tmp_path, clip, NANO)
    video = load_frames(tmp_path, found)
    stream = VideoStream(tmp_path / "upload", (8, 25), 64)
    expected = [np.concatenate(pieces) for pieces in zip(*_blocks(stream), strict=True)]
    for frames, same in zip(video.frames, expected, strict=True):
        assert np.array_equal(frames, same)
    assert (video.duration, video.fps, video.width, video.height) == (1.2, 25.0, 64, 48)


def test_pictures_for_mmaudio_are_fitted_as_its_encoders_do(tmp_path: Path, clip: bytes) -> None:
    specs = FrameSpec(8, 40, "squash", "next"), FrameSpec(25, 24, "crop", "next")
    found = read(tmp_path, clip, specs)
    video = load_frames(tmp_path, found)
    stream = VideoStream(tmp_path / "upload", **stream_options(specs))
    expected = [np.concatenate(pieces) for pieces in zip(*_blocks(stream), strict=True)]
    for frames, same in zip(video.frames, expected, strict=True):
        assert np.array_equal(frames, same)


def _blocks(stream: VideoStream) -> list[tuple[np.ndarray, ...]]:
    return [tuple(np.concatenate(pieces) for pieces in block) for block in stream]


@pytest.mark.parametrize(
    "film",
    [
        Film("vp8", "webm", 20, RATE, times=TIMES),
        Film("mpeg4", "avi", 20, RATE, times=TIMES),
        Film("prores", "mov", 20, RATE, times=TIMES),
        Film("h264", "mp4", 20, RATE, {"preset": "ultrafast", "g": "20"}, times=TIMES, hidden=3),
    ],
    ids=lambda film: f"{film.codec}.{film.suffix}",
)
def test_containers_are_those_that_can_be_written(tmp_path: Path, film: Film) -> None:
    path = film.write(tmp_path)
    found = read(tmp_path, path.read_bytes(), NANO)
    silence = np.zeros((1, round(found["duration"] * 16_000)), np.float32)
    written = []
    for suffix in VIDEO_SUFFIXES:
        try:
            mux(path, silence, 16_000, tmp_path / f"made{suffix}")
        except InputError:
            continue
        written.append(suffix)
    assert sorted(found["containers"]) == sorted(written)
    assert 0 < len(written) < len(VIDEO_SUFFIXES)


def test_the_film_is_read_and_not_its_preview(tmp_path: Path) -> None:
    """Its size and length are surveyed, too: what is decoded is what was looked at."""
    film = Film("h264", "mkv", 20, RATE, {"preset": "ultrafast"}, times=TIMES, preview=True)
    video = film.write(tmp_path).read_bytes()
    found = read(tmp_path, video, NANO)
    assert (found["width"], found["duration"]) == (WIDTH, pytest.approx(0.8))
    (note,) = found["notes"]
    assert note.startswith("The video has 2 video streams")
    with pytest.raises(InputError, match=r"lasts 0\.8 s"):
        read(tmp_path, video, NANO, limit=0.5)


def test_pictures_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="are gone"):
        load_frames(tmp_path, {})


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x20ftypisom", "mp4"),
        (b"\x1a\x45\xdf\xa3\x01", "matroska"),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
        (b"\x47" + bytes(187) + b"\x47" + bytes(187) + b"\x47", "mpegts"),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"#EXTM3U\n", None),
        (b"ffconcat version 1.0", None),
        (b"", None),
    ],
)
def test_kinds_of_files(head: bytes, name: str | None) -> None:
    assert kind(head) == name
