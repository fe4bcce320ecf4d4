"""A tiny grid that really trains: five networks of three seeds, two steps each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfmjt.experiment.grid import Grid, Job
from mfmjt.experiment.run import run
from mfmjt.experiment.work import work
from mfmjt.features.procedural import extract_all

PRETRAINED = "mfmjt/pretrained/nano"
RECIPE = {
    "features": {
        "codec": f"{PRETRAINED}/codec.safetensors",
        "encoders": f"{PRETRAINED}/encoders.safetensors",
        "clips": 4,
        "validation": 2,
        "workers": 0,
    },
    "network": {
        "model": "nano",
        "overrides": {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1},
        "steps": 2,
        "batch": 4,
        "window": 20,
        "full_every": 0,
        "ratio": 0.5,
        "warmup": 1,
        "ema": [0.5],
    },
}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(RECIPE))
    return path


@pytest.fixture(scope="session")
def features(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The grid `ratio` with its features, and nothing else."""
    grid = Grid("ratio", str(tmp_path_factory.mktemp("experiments").resolve()), str(recipe))
    extract_all(grid.features(0))
    return grid


@pytest.fixture(scope="session")
def grid(features: Grid) -> Grid:
    """The grid `ratio`, whose last network was left to `run`: it had been killed before."""
    grid = features
    (grid.folder / "parts").mkdir(parents=True)
    jobs = [Job(arm, seed) for seed in range(3) for arm in grid.arms()]
    for job in jobs[:-1]:
        work(grid, job)
    before = {job: grid.file(job).stat().st_mtime_ns for job in jobs[:-1]}
    run(grid, 3, 1)
    assert {job: grid.file(job).stat().st_mtime_ns for job in before} == before
    return grid
