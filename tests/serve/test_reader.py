from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mfmjt.encoders import MMAudioEncoders
from mfmjt.errors import RunError
from mfmjt.media import VideoStream
from mfmjt.serve.child import kind
from mfmjt.serve.reader import Reader, load_pictures

MEMORY = 2**30


def read(folder: Path, clip: bytes, spec: dict[str, Any]) -> dict[str, Any]:
    (folder / "upload").write_bytes(clip)

    async def run() -> dict[str, Any]:
        return await Reader(1, 60.0, MEMORY, spec).read(folder, None, 30.0)

    return asyncio.run(run())


def test_pictures_are_those_that_the_pipeline_reads(tmp_path: Path, clip: bytes) -> None:
    found = read(tmp_path, clip, {"rates": (8, 25), "size": 64, "mmaudio": False})
    video = load_pictures(tmp_path, found)
    stream = VideoStream(tmp_path / "upload", (8, 25), 64)
    expected = [np.concatenate(pieces) for pieces in zip(*_blocks(stream), strict=True)]
    for frames, same in zip(video.frames, expected, strict=True):
        assert np.array_equal(frames, same)
    assert (video.duration, video.fps, video.width, video.height) == (1.2, 25.0, 64, 48)


def test_pictures_for_mmaudio_are_fitted_as_its_encoders_do(tmp_path: Path, clip: bytes) -> None:
    sizes = cast(MMAudioEncoders, SimpleNamespace(frame_size=(40, 24)))
    found = read(tmp_path, clip, {"rates": (8, 25), "size": (40, 24), "mmaudio": True})
    video = load_pictures(tmp_path, found)
    fits = [
        lambda picture: MMAudioEncoders.fit_frames(sizes, torch.from_numpy(picture)).numpy(),
        lambda picture: MMAudioEncoders.fit_sync(sizes, torch.from_numpy(picture)).numpy(),
    ]
    stream = VideoStream(tmp_path / "upload", (8, 25), fit=fits, pick="next")
    expected = [np.concatenate(pieces) for pieces in zip(*_blocks(stream), strict=True)]
    for frames, same in zip(video.frames, expected, strict=True):
        assert np.array_equal(frames, same)


def _blocks(stream: VideoStream) -> list[tuple[np.ndarray, ...]]:
    return [tuple(np.concatenate(pieces) for pieces in block) for block in stream]


def test_pictures_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="are gone"):
        load_pictures(tmp_path, {})


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
