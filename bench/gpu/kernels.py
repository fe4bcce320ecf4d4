"""The piece that times every op, ours first: against PyTorch, the compiler and other people's."""

from __future__ import annotations

import time

import torch

from bench.case import cases
from bench.gpu.job import Job
from bench.gpu.look import TIMED, ceilings
from bench.machine import row_of
from bench.providers import OURS, Provider, providers, step
from bench.rows import KERNELS, Row, Rows
from bench.run import Trial

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
    limits, rows, device = ceilings(job), job.rows(KERNELS), job.torch_device
    turns = [(TIMED[0], True)]
    if turn == "rest":
        turns = [(TIMED[1], True), *((dtype, False) for dtype in TIMED)]
    for dtype, compile_too in turns:
        for case in (case for op in ops for case in cases(op, "tiny" if job.smoke else "gpu")):
            if case.compile_too != compile_too and not (job.smoke and compile_too):
                continue
            trial = Trial(case, dtype, device)
            for mode in case.modes:
                about = row_of(case, dtype, mode, limits) | {"malloc": device.type}
                about |= {"threads": torch.get_num_threads()}
                # Stable, so that PyTorch comes right after ours.
                for provider in sorted(providers(case, device, mode), key=lambda p: p.name != OURS):
                    if provider.compiled == (turn == "compiled"):
                        _time(job, rows, trial, provider, {**about, "provider": provider.name})
            del trial
            job.free()


def _time(job: Job, rows: Rows, trial: Trial, provider: Provider, about: Row) -> None:
    """Make a row of a provider, if there is none and there is time."""
    if rows.has(**about) or (job.stand_in and provider.name != OURS):
        return
    if not job.has_time(rows, about):
        return
    with job.trying(rows, about):
        if job.stand_in:
            step(provider, about["mode"])(trial.sets[0])
            return
        began = time.monotonic()
        row, timing = trial.time(provider, about["mode"], 0.0 if job.smoke else 0.3)
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
