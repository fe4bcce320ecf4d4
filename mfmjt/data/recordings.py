"""Recordings to train on: a folder that `mfmjt data real` writes, read with NumPy alone.

`sound.npy` holds the samples of all clips one after the other, `clips.csv` a line for each.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mfmjt.errors import InputError, reason

__all__ = ["COLUMNS", "SAMPLE_RATE", "SOUND", "TABLE", "Recording", "Recordings"]

SAMPLE_RATE = 16_000
"""Samples per second of every recording (Hz)."""
TABLE, SOUND = "clips.csv", "sound.npy"
COLUMNS = ("id", "start", "samples", "split", "label", "caption", "set", "licence", "credit")
"""Columns of the table."""


@dataclass(frozen=True)
class Recording:
    """One line of the table.

    Attributes:
        id: Name, unlike every other's.
        start: First sample in the array.
        samples: How many.
        split: "train", "validation" or "test".
        label: What sounds, in a word or two; empty where that is not known.
        caption: One sentence.
        set: The collection that it comes from.
        licence: Its licence.
        credit: Its author.
    """

    id: str
    start: int
    samples: int
    split: str
    label: str
    caption: str
    set: str
    licence: str
    credit: str

    @property
    def seconds(self) -> float:
        """Return how long it is."""
        return self.samples / SAMPLE_RATE


class Recordings:
    """A folder of recordings.

    Args:
        folder: What `mfmjt data real` wrote.

    Attributes:
        rows: All recordings, in the order of the table.
        digest: Of the table, hexadecimal: what is made of other recordings is not mixed up.

    Raises:
        InputError: No such folder, a table without a column, or an array that is not as it says.
    """

    def __init__(self, folder: Path) -> None:
        table, sound = folder / TABLE, folder / SOUND
        if not (table.is_file() and sound.is_file()):
            raise InputError(
                f"{folder} holds no recordings: {TABLE} and {SOUND} are needed. "
                f"Make them with `mfmjt data real {folder}`."
            )
        with table.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{table} has no column {missing[0]!r}. Make it anew with `mfmjt data real`."
                )
            try:
                self.rows = [
                    Recording(
                        line["id"], int(line["start"]), int(line["samples"]), line["split"],
                        line["label"], line["caption"], line["set"], line["licence"],
                        line["credit"],
                    )
                    for line in lines
                ]  # fmt: skip
                self._samples: NDArray[np.int16] = np.load(sound, mmap_mode="r")
            except (ValueError, TypeError, EOFError) as error:
                raise InputError(
                    f"{table} or {SOUND} beside it is damaged: {reason(error)}. "
                    "Make both anew with `mfmjt data real`."
                ) from error
        self.digest = hashlib.sha256(table.read_bytes()).hexdigest()[:32]
        last = max((row.start + row.samples for row in self.rows), default=0)
        first = min((min(row.start, row.samples) for row in self.rows), default=0)
        fits = self._samples.dtype == np.int16 and self._samples.ndim == 1 and first >= 0
        if not fits or len(self._samples) < last:
            raise InputError(
                f"{sound} is not what {table} describes: {last} int16 samples. "
                "Make both anew with `mfmjt data real`."
            )

    def of(self, split: str, label: str | None = None) -> list[Recording]:
        """Return the recordings of a split, or those of one label in it."""
        return [r for r in self.rows if r.split == split and label in (None, r.label)]

    def sound(self, recording: Recording) -> NDArray[np.float32]:
        """Return the samples of a recording, float32 in [-1, 1]."""
        part = self._samples[recording.start : recording.start + recording.samples]
        return part.astype(np.float32) / np.float32(32767)
