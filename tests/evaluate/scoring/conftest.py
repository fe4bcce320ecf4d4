"""Folders of short sounds: tones and noise, the generated ones with more noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16000
SECONDS = 1.0

Write = Callable[..., Path]


def sound(seed: int, seconds: float = SECONDS, rate: int = RATE, noise: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tone = sum(0.1 * np.sin(2 * np.pi * f * time) for f in rng.uniform(100, 4000, 4))
    return (tone + noise * rng.standard_normal(len(time))).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write samples below the temporary folder, by default those of `sound`."""

    def written(name: str, samples: np.ndarray | int = 0, rate: int = RATE, **how: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = sound(samples, rate=rate) if isinstance(samples, int) else samples
        soundfile.write(path, values, rate, **how)
        return path

    return written


@pytest.fixture
def folders(write: Write, tmp_path: Path) -> tuple[Path, Path]:
    """Ten generated and ten real sounds."""
    for i in range(10):
        write(f"made/clip{i}.wav", sound(i, noise=0.05))
        write(f"real/clip{i}.wav", i)
    return tmp_path / "made", tmp_path / "real"
