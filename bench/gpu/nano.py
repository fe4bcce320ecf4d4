"""Pieces that train as users do: nano, on clips that are made while other pieces are measured."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from bench.case import TINY
from bench.gpu.job import Job
from bench.rows import TRAIN, read
from mfmjt.errors import InputError
from mfmjt.features.procedural import FeatureExtraction, extract_all
from mfmjt.train.recipe import NetworkTraining, load_config
from mfmjt.train.tasks.network import train_network

__all__ = ["clips", "extract", "features", "training"]

PRETRAINED = Path(__file__).parents[2] / "mfmjt" / "pretrained" / "nano"
ENDS = {name: str(PRETRAINED / f"{name}.safetensors") for name in ("codec", "encoders")}
CLIP_SECONDS = 0.5
"""CPU seconds that a clip takes to draw and encode, on a core that others use too."""
SHARD, MOST = 64, 8000


def clips(seconds: float, workers: int) -> int:
    """Return how many clips `workers` make in that time: whole shards, at least one for each."""
    shards = int(seconds * workers / CLIP_SECONDS) // SHARD
    return min(MOST, SHARD * max(workers, shards))


def features(job: Job) -> None:
    """Make as many clips as half of the time allows, on a part of the cores."""
    workers = 0 if job.smoke else max(1, len(os.sched_getaffinity(0)) * 3 // 8)
    count = 2 if job.smoke else clips(job.left() / 2, workers)
    job.facts["clips"] = count
    extract(job, count, validation=2 if job.smoke else 40, workers=workers)


def extract(job: Job, clips: int, validation: int, workers: int) -> None:
    """Make clips, and encode them."""
    extract_all(
        FeatureExtraction(
            out=str(job.work / "features"),
            codec=ENDS["codec"],
            encoders=ENDS["encoders"],
            clips=clips,
            validation=validation,
            workers=workers,
        )
    )


def training(job: Job, how: str, **changes: int) -> None:
    """Train for the time there is: through flow matching, and then MeanFlow.

    Args:
        job: The piece.
        how: "graph", every step replayed, or "eager".
        **changes: Of the recipe.
    """
    rows = job.rows(TRAIN)
    about = {"run": how, "device": job.device}
    if rows.has(**about, step=None):
        return
    if not (job.work / "features" / "train" / "index.json").exists():
        raise InputError("There are no clips: the piece `features` has not ended. Give more time.")
    out, graph = job.work / f"network_{how}", job.cuda and how == "graph"
    settings = {
        "store": job.work / "features",
        **ENDS,
        "out": out,
        "device": job.device,
        "cuda_graph": json.dumps(graph),
        "max_minutes": round(max(5.0, min(600.0, job.left() - 10)) / 60, 3),
        "steps": 3000,
        "flow_steps": 400,
        "warmup": 100,
        "log_every": 20,
        "validate_every": 0,
        "checkpoint_every": 10**6,
        "tensorboard": "false",
        "threads": 0,
    }
    if job.smoke:
        tiny = {"steps": 3, "flow_steps": 1, "log_every": 1, "batch": 4, "full_batch": 4}
        settings |= {**tiny, "window": 20, "dtype": "float32", "overrides": json.dumps(TINY)}
    words = [f"{name}={value}" for name, value in (settings | changes).items()]
    config = load_config(NetworkTraining, "nano_gpu", "network", words)
    began = time.monotonic()
    with job.trying(rows, about):
        result = train_network(config, stop_after=max(4.0, min(600.0, job.left() - 8)))
        for line in read(out / "log.jsonl"):
            if "step" in line and "loss" in line:
                rows.add({**about, **line})
        row = {
            "status": "ok",
            "graph": graph,
            "steps": result.step,
            "skipped": result.skipped,
            "finished": result.finished,
            "seconds": round(result.seconds, 1),
            "wall_s": round(time.monotonic() - began, 1),
            "steps_per_s": round(result.step / max(1e-9, result.seconds), 2),
        }
        if job.cuda:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        rows.add({**about, **row})
