"""Time every op on a CPU, against plain PyTorch and torch.compile.

Every result is verified before it is timed, and what cannot be computed is a row with the reason.
Rows go to DIR/kernels.jsonl, what they were taken on to DIR/environment.json; rows that are in the
file already are not made again, so that a run that was cut short goes on.

Two processes do the work and take turns, call by call: one with glibc's allocator as it is, one
with raised thresholds (MALLOC_MMAP_THRESHOLD_ and MALLOC_TOP_PAD_ of 1 GiB), in which eager PyTorch
keeps the memory that it would otherwise hand back and fault in again at every operation. Both have
pinned threads (OMP_NUM_THREADS, OMP_PROC_BIND) that do not spin while idle (GOMP_SPINCOUNT=100), so
that CPU time is work. Judge by `cpu_ms`: another program on the machine stretches wall time more.
A GPU's clock is in `python -m bench gpu --part kernels`.

Examples:
  python -m bench ops --out bench/results/mine               all, some ten minutes on two cores
  python -m bench ops swiglu,adaln --quick --out /tmp/look   the first case of each
  python -m bench report bench/results/mine                  plots and tables of it
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor as Worker
from pathlib import Path
from typing import Any

import torch

from bench import parser
from bench.case import Case, cases, operands
from bench.clock import (
    CaptureFailed,
    Sampler,
    Timing,
    cuda_events,
    l2_bytes,
    on_cpu,
    replayed,
    take_turns,
)
from bench.machine import Ceilings, environment, peak_mib, row_of
from bench.ops import named_ops
from bench.providers import OURS, REFERENCE, Provider, Unsupported, providers, step
from bench.rows import Rows, dtype_name, line_of
from mfmjt.devices import parse_dtype
from mfmjt.errors import RunError
from mfmjt.kernels import _native
from mfmjt.testing import JVP_BACKWARD, Operands, Truth

__all__ = ["DTYPES", "IN_RAISED", "DeviceLost", "Trial", "main", "prepare", "truth_of"]

CPU = torch.device("cpu")
DTYPES = {name: parse_dtype(name) for name in ("float32", "bfloat16", "float16")}
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**30)}
IN_RAISED = (REFERENCE, OURS)
"""Who runs with raised thresholds too; it matters to those who allocate much."""
LARGE = 2**26
"""Bytes of a GPU's operands above which the truth is float32's: float64 takes time and memory."""
MAX_SETS = 64
"""Most sets of operands in one CUDA graph."""

Row = dict[str, Any]
Call = Callable[[Operands], object]


class DeviceLost(RunError):
    """A call left the GPU unusable for this process.

    Attributes:
        provider: Who did it.
        reason: What the driver said.
    """

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(
            f"The GPU is unusable after {provider}: {reason}. Run the same command again: it goes "
            "on without that."
        )
        self.provider, self.reason = provider, reason


def truth_of(case: Case, given: Operands, large: float = LARGE) -> Truth:
    """Return the truth in float64; in float32 above `large` bytes, or where memory is short."""
    mode = JVP_BACKWARD if JVP_BACKWARD in case.modes else case.modes[0]
    make = functools.partial(Truth, case.reference, given, case.terms, mode)
    if given.bytes <= large:
        try:
            return make()
        except torch.OutOfMemoryError:
            pass  # its traceback holds the very tensors, so nothing is tried again in here
    gc.collect()
    if given.cotangents[0].is_cuda:
        torch.cuda.empty_cache()
    return make(exact=torch.float32)


def prepare(
    case: Case, mode: str, everyone: Sequence[Provider], given: Operands, truth: Truth | None
) -> tuple[dict[str, tuple[Call, float | None]], dict[str, dict[str, str]]]:
    """Build every provider's call, run it, and compare with the truth.

    Args:
        case: What to compute.
        mode: One of `mfmjt.testing.MODES`.
        everyone: The providers.
        given: Operands.
        truth: What is right; None for calls that were verified elsewhere.

    Returns:
        For those who may be timed the call and its error over the limit; for the others the fields
        `status` and `reason` of their row.

    Raises:
        DeviceLost: A call broke the GPU's state.
    """
    good: dict[str, tuple[Call, float | None]] = {}
    bad: dict[str, dict[str, str]] = {}
    if any(provider.compiled for provider in everyone):
        torch.compiler.reset()  # what was compiled for other comparisons counts against a limit
    for provider in everyone:
        try:
            call = step(provider, mode)
            found, error = call(given), None
            if truth is not None:
                verdict = truth.judge(found)
                error = verdict.error
                if verdict.wrong:
                    bad[provider.name] = {"status": "wrong", "reason": verdict.wrong}
                    continue
            if provider.compiled:
                call(given)  # the first call compiled
            good[provider.name] = call, error
        except Unsupported as error:
            bad[provider.name] = {"status": "unsupported", "reason": line_of(error)}
        except Exception as error:  # other people's code may fail in any way
            reason = f"{type(error).__name__}: {line_of(error)}"
            bad[provider.name] = {"status": "unsupported", "reason": reason}
        if given.cotangents[0].is_cuda:
            try:
                torch.cuda.synchronize()  # where a kernel went wrong, the next one would be blamed
            except RuntimeError as error:
                raise DeviceLost(provider.name, line_of(error)) from error
    return good, bad


class Trial:
    """A case in a dtype on a device; operands and truth are made when they are first wanted.

    Args:
        case: What to compute.
        dtype: Of the operands.
        device: Where.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device

    @functools.cached_property
    def sets(self) -> list[Operands]:
        """Operands; on a GPU as many sets as together exceed the L2 cache three times."""
        first = operands(self.case, self.dtype, self.device)
        count = 1
        if self.device.type == "cuda":
            count = min(MAX_SETS, -(-3 * l2_bytes(self.device) // max(1, first.bytes)))
        seeds = range(1, count)
        return [first, *(operands(self.case, self.dtype, self.device, seed) for seed in seeds)]

    @functools.cached_property
    def truth(self) -> Truth:
        """What is right."""
        return truth_of(self.case, self.sets[0], LARGE if self.device.type == "cuda" else math.inf)

    def time(
        self, provider: Provider, mode: str, seconds: float = 0.3
    ) -> tuple[Row, Timing | None]:
        """Verify and time a provider by itself: on a GPU a graph's replay, or between events.

        Returns:
            Fields of its row, and the timing; None where it cannot run or is wrong. `timer` is
            "events" where a capture failed: this process must not capture again.

        Raises:
            DeviceLost: A call broke the GPU's state.
        """
        good, bad = prepare(self.case, mode, [provider], self.sets[0], self.truth)
        if provider.name in bad:
            return dict(bad[provider.name]), None
        call, error = good[provider.name]
        one = functools.partial(call, self.sets[0])
        row: Row = {"status": "ok", "error_of_limit": error, "peak_mib": peak_mib(one, self.device)}
        sampler, row["timer"] = self._sampler(call, one)
        return row, take_turns({"": sampler}, seconds)[""]

    def _sampler(self, call: Call, one: Callable[[], object]) -> tuple[Sampler, str]:
        """Return how to time a call, and the name of that."""
        if self.device.type != "cuda":
            return on_cpu(one), "cpu"
        try:
            return replayed(call, self.sets), "graph"
        except CaptureFailed as error:  # it waits for the device, or allocates where none may
            print(f"No graph ({error}); timed between events.")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return cuda_events(one, self.device), "events"


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench ops`; return the exit status."""
    command = parser("ops", __doc__)
    command.add_argument("ops", nargs="?", help="only these, separated by commas")
    command.add_argument("--out", type=Path, default=Path("output/ops"), help="[output/ops]")
    command.add_argument("--quick", action="store_true", help="the first case of each op only")
    command.add_argument("--dtypes", default="float32,bfloat16", help="[float32,bfloat16]")
    command.add_argument("--seconds", type=float, default=0.5, help="for each comparison [0.5]")
    command.add_argument("--minutes", type=float, default=12.0, help="stop after so long [12]")
    command.add_argument("--threads", type=int, help="[all cores this process may use]")
    command.add_argument("--tiny", action="store_true", help="no real sizes: to see that it runs")
    given = command.parse_args(argv)
    end = time.monotonic() + 60 * given.minutes
    scale = "tiny" if given.tiny else "cpu"
    dtypes = [parse_dtype(name) for name in given.dtypes.split(",")]
    jobs = list(_jobs(named_ops(given.ops), scale, given.quick, dtypes))
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "kernels.jsonl")
    threads = given.threads or len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        workers = {
            malloc: stack.enter_context(_worker(threads, environ))
            for malloc, environ in (("default", {}), ("raised", RAISED))
        }
        stamp, ceilings = workers["default"].submit(_measure, given.tiny).result()
        stamp["cores"] = len(os.sched_getaffinity(0))  # a bound thread sees its own only
        text = json.dumps(stamp, indent=2)
        (given.out / "environment.json").write_text(text + "\n")
        print(text)
        for number, (case, dtype, mode) in enumerate(jobs, 1):
            shared = {**row_of(case, dtype, mode, ceilings), "threads": threads}
            names = [p.name for p in providers(case, CPU, mode)]
            if all(rows.has(**shared, provider=n, malloc="default") for n in names):
                continue
            if time.monotonic() > end:
                print(f"The time is up at {number} of {len(jobs)}; the same command goes on.")
                return 1
            found = _compare(workers, case, dtype, mode, scale, given.seconds)
            for provider, malloc, fields, timing in found:
                about = {"commit": stamp["commit"], "utc": stamp["utc"]}
                key = {**shared, "provider": provider, "malloc": malloc}
                if not rows.has(**key):
                    rows.add({**key, **fields, **about}, timing)
            left = max(0, end - time.monotonic())
            print(f"[{number}/{len(jobs)}, {left:.0f} s left] {_line(shared, found)}", flush=True)
    return 0


def _jobs(
    ops: tuple[str, ...], scale: str, quick: bool, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[Case, torch.dtype, str]]:
    """Yield what to compare: first what matters most, then what is quickest."""
    found = [case for op in ops for case in cases(op, scale)]
    found.sort(key=lambda c: (not c.compile_too, 0 if c.compile_too else c.flops.of(JVP_BACKWARD)))
    for case in found:
        if case.compile_too or not quick:
            for dtype in dtypes:
                for mode in case.modes:
                    yield case, dtype, mode


Found = list[tuple[str, str, Row, Timing | None]]


def _compare(
    workers: dict[str, Worker], case: Case, dtype: torch.dtype, mode: str, scale: str, s: float
) -> Found:
    """Return (provider, malloc, fields, timing or None) of everyone on one case."""
    about = (case.op, case.name, scale, dtype_name(dtype))
    good, bad = workers["default"].submit(_prepare, about, mode, None).result()
    again = [name for name in IN_RAISED if name in good]
    workers["raised"].submit(_prepare, about, mode, again).result()

    def sampler(name: str, malloc: str) -> Sampler:
        return lambda: workers[malloc].submit(_sample, name).result()

    who = [(name, "default") for name in good] + [(name, "raised") for name in again]
    timings = take_turns({key: sampler(*key) for key in who}, s)
    found: Found = [(name, "default", dict(fields), None) for name, fields in bad.items()]
    for (name, malloc), timing in timings.items():
        found.append((name, malloc, {"status": "ok", "error_of_limit": good[name]}, timing))
    return found


def _line(shared: Row, found: Found) -> str:
    what = f"{shared['op']} {shared['case']} {shared['dtype']} {shared['mode']}:"
    times = {
        name if malloc == "default" else f"{name} ({malloc})": timing.cpu_ms_p50
        for name, malloc, _, timing in found
        if timing
    }
    own = times.pop(OURS, None)
    failed = [f"{name} {fields['status']}" for name, _, fields, timing in found if not timing]
    if own is None:
        return " ".join([what, *failed])
    ratios = [f"{name} x{ms / own:.2f}" for name, ms in times.items()]
    return f"{what} {own:.3f} ms of CPU; {', '.join([*ratios, *failed])}"


@contextlib.contextmanager
def _worker(threads: int, malloc: dict[str, str]) -> Iterator[Worker]:
    """Start a process whose allocator and threads are set from its first moment on."""
    env = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "threads",
        "GOMP_SPINCOUNT": "100",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **malloc,
    }
    before = dict(os.environ)
    with Worker(1, multiprocessing.get_context("spawn")) as process:
        os.environ.update(env)
        try:
            started = process.submit(os.getpid)
        finally:
            for name in env:
                os.environ.pop(name)
            os.environ.update(before)
        started.result()  # while one imports PyTorch, another's ceilings come out too low
        yield process


def _measure(tiny: bool) -> tuple[Row, Ceilings]:
    """Return, in a worker, what the machine is and what it reaches."""
    stamp = environment(CPU) | {"extension": _native.status()}
    ceilings = Ceilings.measure(CPU, DTYPES.values(), tiny)
    return stamp | {"ceilings": vars(ceilings)}, ceilings


@functools.lru_cache(maxsize=1)
def _trial(op: str, name: str, scale: str, dtype: str) -> Trial:
    """Return the trial that all modes of a case share."""
    case = next(c for c in cases(op, scale) if c.name == name)
    return Trial(case, DTYPES[dtype], CPU)


_prepared: dict[str, Sampler] = {}
"""A worker's calls, by their provider."""


def _prepare(
    about: tuple[str, str, str, str], mode: str, only: Sequence[str] | None
) -> tuple[dict[str, float | None], dict[str, dict[str, str]]]:
    """Prepare, in a worker, the calls of a case; verify them, unless they are `only` some."""
    _prepared.clear()
    trial = _trial(*about)
    wanted = [p for p in providers(trial.case, CPU, mode) if only is None or p.name in only]
    truth = trial.truth if only is None else None
    good, bad = prepare(trial.case, mode, wanted, trial.sets[0], truth)
    gc.collect()
    for name, (call, _) in good.items():
        _prepared[name] = on_cpu(functools.partial(call, trial.sets[0]))
    return {name: error for name, (_, error) in good.items()}, bad


def _sample(name: str) -> tuple[float, float]:
    """Time, in a worker, one call."""
    return _prepared[name]()
