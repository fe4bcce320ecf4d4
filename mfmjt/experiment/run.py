"""The grid of an experiment: every network in a process of its own, some at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mfmjt.devices import cpu_name
from mfmjt.errors import InputError, RunError
from mfmjt.experiment.base import Arm, Row
from mfmjt.experiment.grid import Grid, Job, load_experiment
from mfmjt.experiment.measures import MOST, SEEDS
from mfmjt.experiment.page import ABOUT, PROBES, ROWS, write_page
from mfmjt.features.procedural import extract_all
from mfmjt.files import atomic_path
from mfmjt.plotting import check_matplotlib
from mfmjt.progress import ProgressBar

__all__ = ["digest", "run"]

TIMED = ("rtf", "train_s", "seconds")
"""Figures that no two runs share."""


def run(grid: Grid, seeds: int = SEEDS, jobs: int = 1) -> Path:
    """Train and judge every network of an experiment; write rows, plots and page.

    What is done already is not done again: features and networks are shared by all experiments of
    one folder, and of an interrupted grid the same call does the rest.

    Args:
        grid: Which experiment, at which size, where.
        seeds: Each network is trained with the seeds 0, 1, ...
        jobs: Processes at a time, each with one thread.

    Returns:
        The page.

    Raises:
        InputError: An unknown experiment, too few seeds, or a folder with other results.
        RunError: A process failed; the message has its last line.
    """
    load_experiment(grid.name)
    if not SEEDS <= seeds <= MOST:
        raise InputError(f"--seeds {seeds}: an interval needs {SEEDS} to {MOST}. Give as many.")
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: at least one process has to work. Give 1 or more.")
    check_matplotlib()
    grid = dataclasses.replace(grid, out=str(Path(grid.out).resolve()))
    _claim(grid)
    extract_all(grid.features(jobs))
    done = _work(grid, seeds, jobs)
    return _write(grid, done)


def _claim(grid: Grid) -> None:
    """Make the folder this grid's, or see that it is."""
    path = grid.folder / ABOUT
    try:
        (grid.folder / "parts").mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(
            f"Cannot use {grid.folder}: {type(error).__name__}. Give another --out."
        ) from error
    about = grid.about()
    if found is not None:
        wrong = [key for key, value in about.items() if found.get(key) != value]
        if wrong:
            raise InputError(
                f"{grid.folder} holds results of another {' and '.join(wrong)}. Give another "
                "--out, or delete that folder; features and networks are elsewhere."
            )
    else:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")


def _waves(arms: dict[str, Arm]) -> Iterator[list[str]]:
    """Yield the arms in groups, each after those that its arms need."""
    left, done = list(arms), set[str]()
    while left:
        ready = [name for name in left if set(arms[name].needs) <= done]
        assert ready, f"arms that need one another: {left}"
        yield ready
        done |= set(ready)
        left = [name for name in left if name not in done]


def _work(grid: Grid, seeds: int, count: int) -> list[Job]:
    """Do what is left of the jobs, and return all."""
    arms = grid.arms()
    waves = [[Job(a, s) for s in range(seeds) for a in wave] for wave in _waves(arms)]
    jobs = [job for wave in waves for job in wave]
    before = sum(grid.result(job).exists() for job in jobs)
    running: set[subprocess.Popen[str]] = set()
    stop = threading.Event()
    with ProgressBar(f"experiment {grid.name}", len(jobs), before, "networks") as bar:

        def start(job: Job) -> None:
            if stop.is_set():
                return
            try:
                _one(grid, job, running)
            except RunError:
                stop.set()
                raise
            bar.update(bar.done + 1)

        for wave in waves:
            stop.clear()
            left = [job for job in wave if not grid.result(job).exists()]
            with ThreadPoolExecutor(count) as pool:
                futures: list[Future[None]] = [pool.submit(start, job) for job in left]
                try:
                    wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    stop.set()  # there is something left only where one failed, or after Ctrl-C
                    for process in list(running):
                        process.terminate()  # a training saves its state
            for future in futures:
                future.result()
    return jobs


def _one(grid: Grid, job: Job, running: set[subprocess.Popen[str]]) -> None:
    log = grid.folder / "parts" / f"{job.stem}.log"
    command = [sys.executable, "-m", "mfmjt.experiment.work"]
    command += [json.dumps(dataclasses.asdict(given)) for given in (grid, job)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.add(process)
        try:
            status = process.wait()
        finally:
            running.discard(process)
    if status:
        last = (log.read_text().strip().splitlines() or [f"status {status}"])[-1]
        raise RunError(
            f"{job.arm}, seed {job.seed}, failed: {last.removeprefix('Error: ')} (All of it is in "
            f"{log}; the same command goes on.)"
        )


def digest(rows: Sequence[Row]) -> str:
    """Return a digest of rows without what was timed: equal on one kind of CPU."""
    kept = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def _write(grid: Grid, jobs: list[Job]) -> Path:
    rows: list[Row] = []
    probes: list[Row] = []
    spent: dict[Job, float] = {}
    for job in jobs:
        part: dict[str, Any] = json.loads(grid.result(job).read_text())
        rows += part["rows"]
        probes += part["probes"]
        spent[job] = part["rows"][0]["train_s"] if part["rows"] else 0.0
    about = grid.about() | {
        "seeds": 1 + max(job.seed for job in jobs),
        "cpu": cpu_name(),
        "digest": digest([*rows, *probes]),
        "training_core_minutes": round(sum(spent.values()) / 60, 1),
    }
    for name, lines in ((ROWS, rows), (PROBES, probes)):
        if lines or name == ROWS:
            with atomic_path(grid.folder / name) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with atomic_path(grid.folder / ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    return write_page(grid.folder, grid.folder / f"{grid.name}.md")
