"""One piece of a run, in a process that its parent starts ahead of its time.

It imports what it needs, and waits for a line with the seconds that it may take; where the parent
ends instead, so does this. Only then does it meet the GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.job import Job
from bench.rows import Row

__all__ = ["function", "listen", "main"]

RESERVE = 2.0
"""Seconds to end in."""


def function(part: str, what: str = "", *, ops: tuple[str, ...]) -> Callable[[Job], Any]:
    """Return what a piece does, its module imported."""
    arguments: tuple[Any, ...] = (what,) if what else ()
    if part in ("compiled", "rest"):
        part, arguments = what, (part,) if what in ("latency", "step") else (part, ops)
    elif part == "kernels":
        arguments = ("headline", (what,))
    names = {"features": ("nano", "features"), "train": ("nano", "training")}
    module, name = names.get(part, ("pieces", part))
    work = getattr(importlib.import_module(f"bench.gpu.{module}"), name)
    return lambda job: work(job, *arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, wait, and run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.piece", description=__doc__)
    parser.add_argument("name", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--ops", required=True, help="of a piece that has several")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    run = function(*given.name, ops=tuple(given.ops.split(",")))
    line = sys.stdin.readline()
    if not line:
        return 0
    seconds = float(line)
    faulthandler.dump_traceback_later(seconds + RESERVE, exit=True)
    end = time.monotonic() + seconds - RESERVE
    device = "cuda:0" if given.device == "cuda" else given.device
    job = Job(" ".join(given.name), given.out, given.work, device, given.smoke, end)
    # TF32 would be PyTorch's error in the reference's place.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if job.cuda:
        torch.cuda.set_device(job.device)
    listen(job.facts)
    began = time.monotonic()
    verdict = run(job)  # a row that the exit status decides upon, and where it belongs
    job.facts["worked"] = round(time.monotonic() - began, 1)
    job.note(*verdict or ())
    faulthandler.cancel_dump_traceback_later()
    return 0


def listen(facts: Row) -> None:
    """Keep in `facts` how many Triton kernels were compiled, and in how many seconds."""
    try:
        from triton import knobs
    except ImportError:
        return
    facts |= {"compiled": 0, "compile_s": 0.0, "from_cache": 0}

    def on_compilation(*, times: Any, cache_hit: bool, **_: Any) -> None:
        facts["from_cache" if cache_hit else "compiled"] += 1
        if not cache_hit:
            facts["compile_s"] = round(facts["compile_s"] + times.total / 1e6, 2)

    knobs.compilation.listener = on_compilation


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
