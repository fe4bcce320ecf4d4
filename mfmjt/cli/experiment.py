"""`mfmjt experiment`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mfmjt.cli import _common

__all__ = ["experiment"]


def experiment(
    name: Annotated[str, typer.Argument(help="An experiment, or list.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Train for seconds, on few clips.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Trainings of each network, at least 3.")] = 3,
    recipe: Annotated[
        str, typer.Option(help="Recipe of features and network: pico, nano or a JSON file.")
    ] = "pico",
    jobs: Annotated[
        int | None, typer.Option(help="Networks at a time. Default: CPU cores, or 1 on a GPU.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of features, networks and results.")] = Path(
        "output/experiments"
    ),
    device: _common.Device = None,
    debug: _common.Debug = False,
) -> None:
    """Train what a question needs, judge it, and write rows, intervals, plots and a page.

    Features and trained networks are kept in the folder and shared by experiments. An interrupted
    experiment goes on with the same command.

    For example:
    - `mfmjt experiment list`

    - `mfmjt experiment steps --quick --jobs 2`

    - `mfmjt experiment ratio --recipe nano --device cuda --seeds 5`
    """
    with _common.defer_interrupts():
        from mfmjt.devices import choose_device
        from mfmjt.experiment.grid import NAMES, Grid, load_experiment
        from mfmjt.experiment.run import run

    if name == "list":
        width = max(map(len, NAMES))
        for known in NAMES:
            typer.echo(f"{known:<{width}}  {load_experiment(known).title}")
        return
    chosen = choose_device(device)
    count = jobs if jobs is not None else 1 if chosen.type == "cuda" else os.cpu_count() or 1
    typer.echo(run(Grid(name, str(out), recipe, quick, str(chosen)), seeds, count))
