"""The piece that times ops: against plain PyTorch, the compiler and other people's; ours first."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Case, Operands, cases, operands
from bench.gpu.job import Job
from bench.gpu.look import TIMED, ceilings
from bench.harness import (
    MAX_SETS,
    CaptureFailed,
    DeviceLost,
    Sampler,
    cuda_events,
    l2_bytes,
    on_cpu,
    peak_mib,
    prepare,
    replayed,
    take_turns,
)
from bench.judge import Truth
from bench.machine import row_of
from bench.providers import OURS, providers, step
from bench.rows import KERNELS, Rows

__all__ = ["exact", "kernels"]

LARGE = 2**26
"""Bytes of operands above which the truth is float32's: float64 takes seconds, and much memory."""


def kernels(job: Job, turn: str, ops: tuple[str, ...]) -> None:
    """Time ops.

    Args:
        job: The piece.
        turn: "headline", the first cases in bfloat16; "compiled", these through the compiler; or
            "rest", these in float32, and the other cases.
        ops: Which.
    """
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    low, single = TIMED
    turns = [(single, True), (low, False), (single, False)] if turn == "rest" else [(low, True)]
    for dtype, headlines in turns:
        for case in (case for op in ops for case in cases(op, "tiny" if job.smoke else "gpu")):
            if case.headline == headlines or (job.smoke and headlines):
                _time_case(job, case, dtype, turn == "compiled")
                _free(job.cuda)


def _free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _time_case(job: Job, case: Case, dtype: torch.dtype, compiled: bool) -> None:
    """Make a row of each provider in each mode; operands and the truth are made when wanted."""
    rows, limits, device = job.rows(KERNELS), ceilings(job), job.torch_device
    sets = functools.lru_cache(lambda: _operand_sets(case, dtype, device))
    truth = functools.lru_cache(lambda: exact(case, sets()[0]))
    for mode in case.modes:
        fields = row_of(case, dtype, mode, limits)
        fields |= {"threads": torch.get_num_threads(), "malloc": device.type}
        for provider in sorted(providers(case, device, mode), key=lambda p: p.name != OURS):
            about = {**fields, "provider": provider.name}
            if provider.compiled != compiled or rows.has(**about):
                continue
            if job.stand_in and provider.name != OURS:
                continue
            if not job.has_time(rows, about):
                return
            with job.trying(rows, about):
                began = time.monotonic()
                if job.stand_in:
                    step(provider, case, mode)(sets()[0])
                    continue
                try:
                    good, bad = prepare(
                        *(case, dtype, mode, [provider], device, truth(), sets()[0])
                    )
                except DeviceLost as lost:
                    job.note(rows, {**about, "reason": lost.reason})
                    job.leave(lost.reason)
                    return
                for reason in bad.values():
                    rows.add({**about, **reason})
                for call, error in good.values():
                    row = {**about, "status": "ok", "error_of_limit": error}
                    _time_call(job, rows, row, call, sets(), began)


def _time_call(
    job: Job,
    rows: Rows,
    row: dict[str, Any],
    call: Callable[[Operands], object],
    sets: list[Operands],
    began: float,
) -> None:
    """Make the row of a call that is right."""
    one = functools.partial(call, sets[0])
    peak = peak_mib(one, job.torch_device)
    sampler, timer = _sampler(call, sets, job.torch_device)
    (timing,) = take_turns({"": sampler}, 0.0 if job.smoke else 0.3).values()
    ms = timing.ms_p50
    row |= {
        "peak_mib": peak,
        "timer": timer,
        "of_roofline": round(row["floor_ms"] / ms, 4),
        "tflops": round(row["flops"] / ms / 1e9, 2),
        "gbps": round(row["bytes"] / ms / 1e6, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    rows.add(row, timing)
    if timer == "events":
        job.note()
        job.leave("a failed capture; others are not to be trusted")


def exact(case: Case, inputs: Operands) -> Truth:
    """Return the truth in float64, or in float32 where operands are large or memory is short."""
    if inputs.bytes <= LARGE:
        try:
            return Truth(case, inputs)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the very tensors, so nothing is tried again in here
    _free(inputs.bars[0].is_cuda)
    return Truth(case, inputs, exact=torch.float32)


def _operand_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[Operands]:
    """Draw operands that together exceed the L2 cache three times."""
    sets = [operands(case, dtype, device)]
    if device.type == "cuda":
        count = min(MAX_SETS, -(-3 * l2_bytes(device) // max(1, sets[0].bytes)))
        sets += [operands(case, dtype, device, seed) for seed in range(1, count)]
    return sets


def _sampler(
    call: Callable[[Operands], object], sets: list[Operands], device: torch.device
) -> tuple[Sampler, str]:
    """Return how to time a call, and the name of that."""
    one = functools.partial(call, sets[0])
    if device.type != "cuda":
        return on_cpu(one), "cpu"
    try:
        return replayed(call, sets), "graph"
    except CaptureFailed as error:  # it waits for the device, or allocates where a graph may not
        print(f"No graph ({error}); timed between events.")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return cuda_events(one, device), "events"
