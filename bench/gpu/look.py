"""What machine this is, and what it reaches at best."""

from __future__ import annotations

import hashlib
import json

import torch

from bench.gpu.job import Job
from bench.machine import Ceilings
from bench.machine import environment as stamp_of
from bench.rows import Row, output_of
from mfmjt.kernels import _backends

__all__ = ["TIMED", "ceilings", "environment"]

TIMED = (torch.bfloat16, torch.float32)
"""Dtypes in which ops are timed, the one that matters most first."""


def environment(job: Job) -> None:
    """Write environment.json; ceilings stay those of the rows that are there."""
    path, known = job.out / "environment.json", _known(job)
    stamp = stamp_of(job.torch_device) | {"triton_available": _backends.AVAILABLE, **_compiler()}
    if job.cuda:
        asked = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        stamp["clocks"] = output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
    stamp["ceilings"] = known
    path.write_text(json.dumps(stamp, indent=2) + "\n")  # a GPU that fails next leaves this behind
    stamp["ceilings"] = vars(ceilings(job))
    path.write_text(json.dumps(stamp, indent=2) + "\n")
    print(json.dumps(stamp, indent=2))


def ceilings(job: Job) -> Ceilings:
    """Return those of environment.json, or measure them where that piece could not."""
    known = _known(job)
    return Ceilings(**known) if known else Ceilings.measure(job.torch_device, TIMED, job.smoke)


def _known(job: Job) -> Row | None:
    path = job.out / "environment.json"
    return json.loads(path.read_text()).get("ceilings") if path.exists() else None


def _compiler() -> Row:
    """Return what kernels in a cache are known by: they fit where these agree."""
    try:
        from triton import knobs
        from triton.runtime.cache import triton_key

        key = hashlib.sha256(triton_key().encode()).hexdigest()
        return {"triton_key": key, "ptxas": knobs.nvidia.ptxas.version}
    except Exception as error:  # of another version, or without ptxas: a cache may still fit
        return {"triton_key": None, "ptxas": repr(error)}
