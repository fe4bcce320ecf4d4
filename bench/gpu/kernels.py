"""Every op against plain PyTorch, torch.compile and other people's kernels; ours first."""

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
from bench.machine import Ceilings, row_of
from bench.providers import OURS, Provider, providers, step
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
    rows, limits = job.rows(KERNELS), ceilings(job)
    first = turn != "rest"
    turns = [(TIMED[0], True)] if first else [(TIMED[1], True), *((d, False) for d in TIMED)]
    for dtype, headlines in turns:
        for case in (case for op in ops for case in cases(op, "tiny" if job.smoke else "gpu")):
            if case.headline == headlines or (job.smoke and headlines):
                _Case(job, rows, case, dtype, limits, turn == "compiled").time()
                gc.collect()
                if job.cuda:
                    torch.cuda.empty_cache()


class _Case:
    """A case in a dtype: its operands and its truth, made when they are wanted."""

    def __init__(
        self,
        job: Job,
        rows: Rows,
        case: Case,
        dtype: torch.dtype,
        limits: Ceilings,
        compiled: bool,
    ) -> None:
        self.job, self.rows, self.case, self.dtype = job, rows, case, dtype
        self.limits, self.compiled = limits, compiled
        self.device = job.torch_device
        self.sets: list[Operands] = []
        self.truth: Truth | None = None

    def time(self) -> None:
        """Return a row for each provider in each mode."""
        for mode in self.case.modes:
            fields = row_of(self.case, self.dtype, mode, self.limits)
            fields |= {"threads": torch.get_num_threads(), "malloc": self.device.type}
            found = providers(self.case, self.device, mode)
            for provider in sorted(found, key=lambda p: p.name != OURS):
                mine = {**fields, "provider": provider.name}
                if provider.compiled != self.compiled or self.rows.has(**mine):
                    continue
                if self.job.stand_in and provider.name != OURS:
                    continue
                if not self.job.has_time(self.rows, mine):
                    return
                with self.job.trying(self.rows, mine):
                    self._provider(provider, mode, mine)

    def _provider(self, provider: Provider, mode: str, fields: dict[str, Any]) -> None:
        began = time.monotonic()
        self.sets = self.sets or _operand_sets(self.case, self.dtype, self.device)
        if self.job.stand_in:
            step(provider, self.case, mode)(self.sets[0])
            return
        self.truth = self.truth or exact(self.case, self.sets[0])
        try:
            good, bad = prepare(
                *(self.case, self.dtype, mode, [provider], self.device, self.truth, self.sets[0])
            )
        except DeviceLost as lost:
            self.job.note(self.rows, {**fields, "reason": lost.reason})
            self.job.leave(lost.reason)
            return
        for reason in bad.values():
            self.rows.add({**fields, **reason})
        for call, error in good.values():
            one = functools.partial(call, self.sets[0])
            peak = peak_mib(one, self.device)
            sampler, timer = _sampler(call, one, self.sets, self.device)
            (timing,) = take_turns({"": sampler}, 0.0 if self.job.smoke else 0.3).values()
            more = {"status": "ok", "error_of_limit": error, "peak_mib": peak, "timer": timer}
            ms = timing.ms_p50
            rates = {
                "of_roofline": round(fields["floor_ms"] / ms, 4),
                "tflops": round(fields["flops"] / ms / 1e9, 2),
                "gbps": round(fields["bytes"] / ms / 1e6, 1),
                "seconds": round(time.monotonic() - began, 1),
            }
            self.rows.add({**fields, **more, **rates}, timing)
            if timer == "events":
                self.job.note()
                self.job.leave("a failed capture; others are not to be trusted")


def exact(case: Case, given: Operands) -> Truth:
    """In float64, or in float32 where operands are large or memory is short."""
    if given.bytes <= LARGE:
        try:
            return Truth(case, given)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the very tensors, so nothing is tried again in here
    gc.collect()
    if given.bars[0].is_cuda:
        torch.cuda.empty_cache()
    return Truth(case, given, exact=torch.float32)


def _operand_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[Operands]:
    """Operands that together exceed the L2 cache three times."""
    sets = [operands(case, dtype, device)]
    if device.type == "cuda":
        count = min(MAX_SETS, -(-3 * l2_bytes(device) // max(1, sets[0].bytes)))
        sets += [operands(case, dtype, device, seed) for seed in range(1, count)]
    return sets


def _sampler(
    call: Callable[[Operands], object],
    one: Callable[[], object],
    sets: list[Operands],
    device: torch.device,
) -> tuple[Sampler, str]:
    """Return how to time a call, and the name of that."""
    if device.type != "cuda":
        return on_cpu(one), "cpu"
    try:
        return replayed(call, sets), "graph"
    except CaptureFailed as error:  # it waits for the device, or allocates where a graph may not
        print(f"No graph ({error}); timed between events.")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return cuda_events(one, device), "events"
