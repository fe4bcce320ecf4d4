from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mfmjt.data.recordings import COLUMNS, SOUND, TABLE, Recordings
from mfmjt.errors import InputError

LINES = [
    ("a", 0, 3, "train", "dog", "a dog", "x", "CC0", "me"),
    ("b", 3, 2, "test", "cat", "a cat", "x", "CC0", "me"),
]
SAMPLES = np.array([0, 32767, -32767, 1, -1], np.int16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / SOUND, SAMPLES)
    return table(tmp_path, LINES)


def table(folder: Path, lines: list[tuple], columns: tuple[str, ...] = COLUMNS) -> Path:
    with (folder / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])
    return folder


def test_recordings_are_read(folder: Path) -> None:
    corpus = Recordings(folder)
    assert [row.id for row in corpus.rows] == ["a", "b"]
    assert [row.id for row in corpus.of("train")] == ["a"]
    assert corpus.of("train", "cat") == []
    first, second = corpus.rows
    assert first.seconds == 3 / 16_000
    assert corpus.sound(first).tolist() == [0.0, 1.0, -1.0]
    assert corpus.sound(second).dtype == np.float32
    assert (corpus.sound(second) * np.float32(32767)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / SOUND).unlink(), "holds no recordings"),
        (lambda folder: table(folder, LINES, COLUMNS[1:]), "no column 'id'"),
        (lambda folder: table(folder, [("a", "x", *LINES[0][2:])]), "is damaged: invalid literal"),
        (lambda folder: table(folder, [("a",)]), "is damaged: int"),
        (lambda folder: (folder / SOUND).write_bytes(b"nothing"), "is damaged"),
        (lambda folder: (folder / SOUND).write_bytes(b""), "is damaged"),
        (lambda folder: table(folder, [("a", -1, *LINES[0][2:])]), "is not what"),
        (lambda folder: np.save(folder / SOUND, SAMPLES[:4]), "5 int16 samples"),
        (lambda folder: np.save(folder / SOUND, SAMPLES.astype(np.float32)), "int16"),
    ],
    ids=["missing", "column", "word", "short", "garbage", "empty", "negative", "cut", "float"],
)
def test_damaged_folders_are_refused(folder: Path, change, told: str) -> None:
    change(folder)
    with pytest.raises(InputError, match="mfmjt data real") as caught:
        Recordings(folder)
    assert told in str(caught.value)
