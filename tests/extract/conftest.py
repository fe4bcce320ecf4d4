"""Miniature copies of data sets: the repository's own clips, as these sets lay out theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from mfmjt.codec import Codec, NanoCodec
from mfmjt.data import foley
from mfmjt.data.preview import write_clip
from mfmjt.encoders import Encoders, NanoEncoders
from mfmjt.extract.clips import Cut
from mfmjt.extract.run import Settings
from mfmjt.families import Bundle
from mfmjt.model import MFMJT, config_for
from tests.support.bundles import CODEC

SECONDS = 0.96  # of clips: the shortest whole segments that leave the network something to see
RATE = foley.SAMPLE_RATE
SHORT = Settings(Cut(SECONDS, SECONDS), workers=2)
SOUND = Settings(Cut(SECONDS, SECONDS, pictures=False), workers=2)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """Untrained, and small."""
    torch.manual_seed(0)
    return bundle_of("nano", NanoCodec(CODEC), NanoEncoders())


def bundle_of(config: str, codec: Codec, encoders: Encoders) -> Bundle:
    """Codec and encoders beside an empty network."""
    with torch.device("meta"):
        network = MFMJT(config_for(config))
    return Bundle(network, codec, encoders).to("cpu")


@pytest.fixture(scope="session")
def clips() -> list[foley.Clip]:
    return [foley.clip(i, "train", duration=1.0) for i in range(3)]


@pytest.fixture(scope="session")
def videos(clips, tmp_path_factory) -> Path:
    """`a.mp4`, `b.mp4`, `c.mp4` and `clips.csv`."""
    folder = tmp_path_factory.mktemp("videos")
    for name, clip in zip("abc", clips, strict=True):
        write_clip(folder / f"{name}.mp4", clip.frames, clip.audio)
    write_table(
        folder / "clips.csv",
        ("path", "caption"),
        [(f"{name}.mp4", clip.caption) for name, clip in zip("abc", clips, strict=True)],
    )
    return folder


@pytest.fixture
def raw_media(tmp_path, monkeypatch) -> Path:
    """Tables and files that every version of FFmpeg decodes alike, under a relative path.

    `video.csv` and `sound.csv` are of 16 kHz, `16000.csv` and `44100.csv` have one video each; the
    first two have rows that cannot be used, too.
    """
    monkeypatch.chdir(tmp_path)
    folder = Path("media")
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, rate in (("a", 16_000), ("b", 16_000), ("44100", 44_100)):
        _write_raw(folder / f"{name}.avi", noise, rate)
        sound = noise.integers(-9000, 9000, RATE).astype(np.float32) / 2**15
        write_wave(folder / f"{name}.wav", sound)
    (folder / "bad.avi").write_bytes(b"no video")
    (folder / "bad.wav").write_bytes(b"no sound")
    header = ("path", "caption")
    for kind, suffix in (("video", "avi"), ("sound", "wav")):
        names = ("a", "b", "bad", "none", "a")
        captions = ("one", "", "bad", "none", "two words")
        rows = [(f"{name}.{suffix}", c) for name, c in zip(names, captions, strict=True)]
        write_table(folder / f"{kind}.csv", header, rows)
    for rate, name in ((16_000, "a"), (44_100, "44100")):
        write_table(folder / f"{rate}.csv", header, [(f"{name}.avi", "a dog barks")])
    return folder


def _write_raw(path: Path, noise: np.random.Generator, rate: int) -> None:
    """1.44 s of 64 x 64 pixels and of sound, neither compressed."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("rawvideo", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "bgr24"
        track = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for i in range(36):
            pixels = noise.integers(0, 255, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="bgr24")
            frame.pts = i
            container.mux(video.encode(frame))
        samples = noise.integers(-9000, 9000, (1, 36 * rate // 25), np.int16)
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        sound.sample_rate = rate
        container.mux(track.encode(sound))
        container.mux(video.encode())
        container.mux(track.encode())


def write_table(path: Path, header: tuple[str, ...] | None, rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows] if header else rows)
    return path


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def rejects(folder: Path) -> dict[str, str]:
    """Reason by id."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {r["id"]: r["reason"] for r in map(json.loads, lines)}
