"""Miniature copies of data sets: the repository's own clips, as these sets lay out theirs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mfmjt.codec import NanoCodec
from mfmjt.data import foley
from mfmjt.data.preview import write_clip
from mfmjt.encoders import NanoEncoders
from mfmjt.extract.clips import Cut
from mfmjt.extract.ends import Ends
from mfmjt.extract.work import Settings
from tests.support.bundles import CODEC

SECONDS = 0.96  # of clips: the shortest whole segments that leave the network something to see
RATE = foley.SAMPLE_RATE
SHORT = Settings(Cut(SECONDS, SECONDS), workers=2)
SOUND = Settings(Cut(SECONDS, SECONDS, pictures=False), workers=2)


@pytest.fixture(scope="session")
def ends() -> Ends:
    """Untrained, and small."""
    torch.manual_seed(0)
    return Ends(NanoCodec(CODEC), NanoEncoders()).to(torch.device("cpu"))


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


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def rejects(folder: Path) -> dict[str, str]:
    """Reason by id."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {r["id"]: r["reason"] for r in map(json.loads, lines)}
