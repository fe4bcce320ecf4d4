"""One process of a grid: train one network, unless that is done, and judge it.

`python -m mfmjt.experiment.work GRID JOB`, both JSON objects, is what `mfmjt experiment` starts.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import MfmjtError, RunError
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.examples import Examples, stored
from mfmjt.experiment.base import Row, Trained
from mfmjt.experiment.grid import CLIPS, QUICK_CLIPS, Grid, Job, load_experiment
from mfmjt.experiment.measures import measure
from mfmjt.families import Bundle
from mfmjt.features.store import FeatureStore
from mfmjt.files import atomic_path
from mfmjt.model import MFMJT
from mfmjt.train.tasks.network import train_network

__all__ = ["work"]


def work(grid: Grid, job: Job) -> None:
    """Train and judge one network; write its rows, whole or not at all.

    Raises:
        RunError: The training was stopped. The same call goes on.
        MfmjtError: What training and judging raise.
    """
    torch.set_num_threads(1)
    config = grid.network(job)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of an interrupted grid another process may be at work
        if not grid.result(job).exists():
            spent = _trained(grid, job, folder / "done.json")
            rows, probes = _judged(grid, job)
            rows = [{**row, "train_s": round(spent, 1)} for row in rows]
            with atomic_path(grid.result(job)) as temporary:
                temporary.write_text(json.dumps({"rows": rows, "probes": probes}))


def _trained(grid: Grid, job: Job, done: Path) -> float:
    """Train the network unless that is done; return the seconds of CPU that it took."""
    if not done.exists():
        before = done.with_name("spent.json")
        spent = float(before.read_text()) if before.exists() else 0.0
        began = time.process_time()
        train = load_experiment(grid.name).train or train_network
        result = train(grid.network(job))
        spent += time.process_time() - began
        name = done if result.finished else before
        with atomic_path(name) as temporary:
            temporary.write_text(json.dumps(spent))
        if not result.finished:
            raise RunError(str(result))
    return float(json.loads(done.read_text()))


def _judged(grid: Grid, job: Job) -> tuple[list[Row], list[Row]]:
    features, experiment, arm = grid.features(), load_experiment(grid.name), grid.arms()[job.arm]
    bundle = Bundle(
        MFMJT.load(grid.file(job)),
        NanoCodec.load(features.codec),
        NanoEncoders.load(features.encoders),
    ).to(grid.device)
    examples, classifier = _examples(grid, bundle), load_classifier()
    about: dict[str, Any] = {"arm": arm.name, **arm.at, "seed": job.seed}
    rows = []
    for way in arm.ways:
        rows.append(about | way.about | measure(bundle, examples, classifier, way))
        sys.stderr.write(f"Judged {way.about}.\n")
    probes: list[Row] = []
    if experiment.probe is not None:
        trained = Trained(bundle, examples, grid.network(job), grid.quick)
        probes = [about | row for row in experiment.probe(trained)]
    return rows, probes


def _examples(grid: Grid, bundle: Bundle) -> Examples:
    store = FeatureStore(grid.features().out, "validation")
    store.latent_mean = bundle.network.latent_mean.flatten().cpu()
    store.latent_std = bundle.network.latent_std.flatten().cpu()
    clips = QUICK_CLIPS if grid.quick else CLIPS
    return stored(store, bundle, clips, split="validation")


def main(arguments: list[str]) -> int:
    """Do one job and return the exit status."""
    try:
        grid, job = (json.loads(text) for text in arguments)
        work(Grid(**grid), Job(**job))
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
