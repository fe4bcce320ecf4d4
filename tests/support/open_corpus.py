"""A corpus of strokes and of sounds that last, of which the open set makes clips."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from mfmjt.data.foley import SAMPLE_RATE, SPLITS
from mfmjt.data.recordings import COLUMNS, SOUND, TABLE

STRUCK = ("footsteps", "wood hit", "glass hit", "bell", "clock")
LASTING = ("rain", "engine", "machine", "wind")
PITCH = {split: 400.0 * 3**i for i, split in enumerate(SPLITS)}
"""Hz of all that sounds in a split: two semitones do not make one of them another."""


def stroke(rng: np.random.Generator, pitch: float) -> np.ndarray:
    t = np.arange(SAMPLE_RATE // 3) / SAMPLE_RATE
    rung = np.sin(2 * np.pi * pitch * t) + 0.5 * rng.standard_normal(len(t)) * np.exp(-t / 0.004)
    return rung * np.exp(-t / 0.04)


def lasting(rng: np.random.Generator, pitch: float) -> np.ndarray:
    t = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    return np.sin(2 * np.pi * pitch * t) + 0.05 * rng.standard_normal(len(t))


def write_corpus(folder: Path) -> Path:
    """Write two recordings of each label and split: of two strokes, or of a tone in noise."""
    folder.mkdir(exist_ok=True)
    rng, rows, parts, start = np.random.default_rng(0), [], [], 0
    for split in SPLITS:
        for label in STRUCK + LASTING:
            for take in range(2):
                if label in STRUCK:
                    pause = np.zeros(SAMPLE_RATE // 5)
                    strokes = [stroke(rng, PITCH[split]) for _ in range(2)]
                    sound = np.concatenate([pause, strokes[0], pause, 0.8 * strokes[1]])
                else:
                    sound = lasting(rng, PITCH[split])
                parts.append(np.round(sound / np.abs(sound).max() * 30000).astype(np.int16))
                row = dict.fromkeys(COLUMNS, "x") | {"id": f"{split}_{label}_{take}_000"}
                row |= {"start": start, "samples": len(sound), "split": split}
                rows.append(row | {"label": label, "caption": f"the {label}"})
                start += len(sound)
    np.save(folder / SOUND, np.concatenate(parts))
    with (folder / TABLE).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder
