from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mfmjt.experiment.grid import Grid, Job
from mfmjt.experiment.objectives import Compared
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import NetworkTraining


@pytest.fixture(scope="module")
def config(grid: Grid) -> NetworkTraining:
    """A trained network of the grid to start from: a fresh one gives exactly zero."""
    job = Job("10 %", 0)
    return dataclasses.replace(grid.network(job), init_from=str(grid.file(job)))


def compared(config: NetworkTraining, tmp_path: Path, **changes: object) -> dict[str, float]:
    config = dataclasses.replace(config, out=str(tmp_path), **changes)
    with Processes("cpu") as processes:
        return Compared(config, processes).validate()


def test_the_exact_gradient_is_itself(config: NetworkTraining, tmp_path: Path) -> None:
    found = compared(config, tmp_path)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["length"] == 1
    assert found["noise"] < 1 - 1e-6  # other rows


def test_a_difference_over_more_is_further_away(config: NetworkTraining, tmp_path: Path) -> None:
    near, far = (
        compared(config, tmp_path, target="finite_difference", target_options={"h": h})["cosine"]
        for h in (1e-2, 0.5)
    )
    assert far < near < 1
