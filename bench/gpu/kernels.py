"""The piece that times every op, ours first: against PyTorch, the compiler and other people's."""

from __future__ import annotations

import gc
import time

import torch

from bench.case import cases
from bench.gpu.job import Job
from bench.gpu.look import TIMED, ceilings
from bench.machine import row_of
from bench.providers import OURS, providers, step
from bench.rows import KERNELS
from bench.run import DeviceLost, Row, Trial

__all__ = ["kernels"]


def kernels(job: Job, turn: str, ops: tuple[str, ...]) -> None:
    """Time ops.

    Args:
        job: The piece.
        turn: "headline", the first cases in bfloat16; "compiled", these through the compiler; or
            "rest", these in float32, and the other cases.
        ops: Which.
    """
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    limits, first = ceilings(job), turn != "rest"
    turns = [(TIMED[0], True)] if first else [(TIMED[1], True), *((d, False) for d in TIMED)]
    for dtype, compile_too in turns:
        for case in (case for op in ops for case in cases(op, "tiny" if job.smoke else "gpu")):
            if case.compile_too == compile_too or (job.smoke and compile_too):
                trial = Trial(case, dtype, job.torch_device)
                for mode in case.modes:
                    fields = row_of(case, dtype, mode, limits) | {"malloc": trial.device.type}
                    if not _mode(job, trial, mode, fields, turn == "compiled"):
                        break
                del trial
                gc.collect()
                if job.cuda:
                    torch.cuda.empty_cache()


def _mode(job: Job, trial: Trial, mode: str, fields: Row, compiled: bool) -> bool:
    """Make a row for each provider in a mode; return False if the time is up."""
    rows = job.rows(KERNELS)
    everyone = providers(trial.case, trial.device, mode)
    for provider in sorted(everyone, key=lambda p: p.name != OURS):
        about = {**fields, "threads": torch.get_num_threads(), "provider": provider.name}
        if provider.compiled != compiled or rows.has(**about):
            continue
        if job.stand_in and provider.name != OURS:
            continue
        if not job.has_time(rows, about):
            return False
        with job.trying(rows, about):
            if job.stand_in:
                step(provider, mode)(trial.sets[0])
                continue
            began = time.monotonic()
            try:
                row, timing = trial.time(provider, mode, 0.0 if job.smoke else 0.3)
            except DeviceLost as lost:
                job.note(rows, {**about, "reason": lost.reason})
                job.leave(lost.reason)
                continue
            if timing is not None:
                row |= {
                    "of_roofline": round(about["floor_ms"] / timing.ms_p50, 4),
                    "tflops": round(about["flops"] / timing.ms_p50 / 1e9, 2),
                    "gbps": round(about["bytes"] / timing.ms_p50 / 1e6, 1),
                    "seconds": round(time.monotonic() - began, 1),
                }
            rows.add({**about, **row}, timing)
            if row.get("timer") == "events":
                job.note()
                job.leave("a failed capture; others are not to be trusted")
    return True
