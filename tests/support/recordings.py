"""Corpora of a few tones, as `mfmjt data real` lays them out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mfmjt.data.recordings import COLUMNS, SAMPLE_RATE, SOUND, TABLE


def write_recordings(
    folder: Path,
    labels: Sequence[str] = ("whistle",),
    splits: Sequence[str] = ("train", "validation", "test"),
    seconds: Sequence[float] = (0.1, 1.5),
) -> Path:
    """Write one recording per split, label and length: tones, an octave up for each label."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, parts, start = [], [], 0
    for split in splits:
        for octave, label in enumerate(labels):
            for length in seconds:
                t = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
                tone = 0.5 * np.sin(2 * np.pi * 1000 * 2**octave * t)
                parts.append(np.round(tone * 32767).astype(np.int16))
                row = dict.fromkeys(COLUMNS, "")
                row |= {"id": f"{split}_{len(rows)}", "start": str(start)}
                row |= {"samples": str(len(t)), "split": split, "label": label, "caption": label}
                rows.append(row)
                start += len(t)
    np.save(folder / SOUND, np.concatenate(parts))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder
