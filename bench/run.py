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
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor as Worker
from unittest.mock import patch

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
from bench.rows import Row, Rows, dtype_name, failure, name_of, write_json
from mfmjt.devices import parse_dtype
from mfmjt.testing import JVP_BACKWARD, Operands, Truth

__all__ = ["DTYPES", "IN_RAISED", "Trial", "main", "prepare", "truth_of"]

CPU = torch.device("cpu")
DTYPES = {name: parse_dtype(name) for name in ("float32", "bfloat16", "float16")}
MALLOC = {
    "default": {},
    "raised": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**30)},
}
IN_RAISED = (REFERENCE, OURS)
"""Who runs with raised thresholds too; it matters to those who allocate much."""
LARGE = 2**26
"""Bytes of a GPU's operands above which the truth is float32's: float64 takes time and memory."""
MAX_SETS = 64
"""Most sets of operands in one CUDA graph."""

Call = Callable[[Operands], object]


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
    provider: Provider, mode: str, given: Operands, truth: Truth | None
) -> tuple[Row, Call | None]:
    """Build a provider's call, run it, and compare with the truth.

    Args:
        provider: Who.
        mode: One of `mfmjt.testing.MODES`.
        given: Operands.
        truth: What is right; None for calls that were verified elsewhere.

    Returns:
        Fields of its row, `status` among them, and the call; None where it may not be timed.

    Raises:
        Exception: Of any kind, on a GPU only: whoever asked looks whether that is usable still.
    """
    try:
        call = step(provider, mode)
        found = call(given)
        verdict = truth.judge(found) if truth else None
        if provider.compiled:
            call(given)  # the first call compiled
    except Exception as error:  # other people's code may fail in any way
        unable = isinstance(error, Unsupported)
        if given.cotangents[0].is_cuda and not unable:
            raise
        return {"status": "unsupported", "reason": str(error) if unable else failure(error)}, None
    if verdict and verdict.wrong:
        return {"status": "wrong", "reason": verdict.wrong}, None
    return {"status": "ok", "error_of_limit": verdict.error if verdict else None}, call


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
        """
        if provider.compiled:
            torch.compiler.reset()  # what was compiled before counts against a limit
        row, call = prepare(provider, mode, self.sets[0], self.truth)
        if call is None:
            return row, None
        one = functools.partial(call, self.sets[0])
        row |= {"peak_mib": peak_mib(one, self.device), "timer": "cpu"}
        sampler = on_cpu(one)
        if self.device.type == "cuda":
            try:
                sampler, row["timer"] = replayed(call, self.sets), "graph"
            except CaptureFailed as error:  # it waits for the device, or allocates where none may
                print(f"No graph ({error}); timed between events.")
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                sampler, row["timer"] = cuda_events(one, self.device), "events"
        return row, take_turns({"": sampler}, seconds)[""]


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench ops`; return the exit status."""
    command = parser("ops", __doc__, out="output/ops")
    command.add_argument("ops", nargs="?", help="only these, separated by commas")
    command.add_argument("--quick", action="store_true", help="the first case of each op only")
    command.add_argument("--dtypes", default="float32,bfloat16", help="[float32,bfloat16]")
    command.add_argument("--seconds", type=float, default=0.5, help="for each comparison [0.5]")
    command.add_argument("--minutes", type=float, default=12.0, help="stop after so long [12]")
    command.add_argument("--threads", type=int, help="[all cores this process may use]")
    command.add_argument("--tiny", action="store_true", help="no real sizes: to see that it runs")
    given = command.parse_args(argv)
    end = time.monotonic() + 60 * given.minutes
    scale, cores = "tiny" if given.tiny else "cpu", len(os.sched_getaffinity(0))
    dtypes = [parse_dtype(name) for name in given.dtypes.split(",")]
    jobs = list(_jobs(named_ops(given.ops), scale, given.quick, dtypes))
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "kernels.jsonl")
    threads = given.threads or cores
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(threads, malloc)) for name, malloc in MALLOC.items()
        }
        stamp, ceilings = workers["default"].submit(_measure, given.tiny).result()
        stamp["cores"] = cores  # a bound thread sees its own only
        write_json(given.out / "environment.json", stamp)
        for number, (case, dtype, mode) in enumerate(jobs, 1):
            shared = {**row_of(case, dtype, mode, ceilings), "threads": threads}
            names = [p.name for p in providers(case, CPU, mode)]
            if all(rows.has(**shared, provider=n, malloc="default") for n in names):
                continue
            if time.monotonic() > end:
                print(f"The time is up at {number} of {len(jobs)}; the same command goes on.")
                return 1
            what = (case.op, case.name, scale, dtype_name(dtype))
            shared |= {"commit": stamp["commit"], "utc": stamp["utc"]}
            found = []
            for fields, timing in _compare(workers, what, mode, given.seconds):
                if not rows.has(**shared, **fields):
                    found.append(rows.add({**shared, **fields}, timing))
            left = max(0, end - time.monotonic())
            print(f"[{number}/{len(jobs)}, {left:.0f} s left] {_line(found)}", flush=True)
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


def _compare(
    workers: dict[str, Worker], what: tuple[str, ...], mode: str, seconds: float
) -> Iterator[tuple[Row, Timing | None]]:
    """Yield fields of the row, `provider` and `malloc` among them, and the timing of everyone."""
    everyone = workers["default"].submit(_prepare, what, mode, None).result()
    good = [name for name, row in everyone.items() if row["status"] == "ok"]
    again = [name for name in IN_RAISED if name in good]
    workers["raised"].submit(_prepare, what, mode, again).result()

    def sampler(name: str, malloc: str) -> Sampler:
        return lambda: workers[malloc].submit(_sample, name).result()

    who = [(name, "default") for name in good] + [(name, "raised") for name in again]
    timings = take_turns({key: sampler(*key) for key in who}, seconds)
    for name, malloc in [*((name, "default") for name in everyone if name not in good), *who]:
        fields = {"provider": name, "malloc": malloc, **everyone[name]}
        yield fields, timings.get((name, malloc))


def _line(found: list[Row]) -> str:
    """Return what a comparison came to: ours, and the others as multiples of it."""
    what = f"{found[0]['op']} {found[0]['case']} {found[0]['dtype']} {found[0]['mode']}:"
    times = {name_of(row): row["cpu_ms_p50"] for row in found if row["status"] == "ok"}
    failed = [f"{row['provider']} {row['status']}" for row in found if row["status"] != "ok"]
    own = times.pop(OURS, None)
    if own is None:
        return " ".join([what, *failed])
    ratios = [f"{name} x{ms / own:.2f}" for name, ms in times.items()]
    return f"{what} {own:.3f} ms of CPU; {', '.join([*ratios, *failed])}"


@contextlib.contextmanager
def _worker(threads: int, malloc: dict[str, str]) -> Iterator[Worker]:
    """Start a process whose allocator and threads are set from its first moment on."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "threads",
        "GOMP_SPINCOUNT": "100",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **malloc,
    }
    with Worker(1, multiprocessing.get_context("spawn")) as process:
        with patch.dict(os.environ, settings):
            # While one imports PyTorch, another's ceilings come out too low.
            process.submit(os.getpid).result()
        yield process


def _measure(tiny: bool) -> tuple[Row, Ceilings]:
    """Return, in a worker, what the machine is and what it reaches."""
    ceilings = Ceilings.measure(CPU, DTYPES.values(), tiny)
    return environment(CPU) | {"ceilings": vars(ceilings)}, ceilings


@functools.lru_cache(maxsize=1)
def _trial(op: str, name: str, scale: str, dtype: str) -> Trial:
    """Return the trial that all modes of a case share."""
    case = next(c for c in cases(op, scale) if c.name == name)
    return Trial(case, DTYPES[dtype], CPU)


_samplers: dict[str, Sampler] = {}
"""A worker's calls, by their provider."""


def _prepare(what: tuple[str, ...], mode: str, only: Sequence[str] | None) -> dict[str, Row]:
    """Prepare, in a worker, the calls of a case; verify them, unless they are `only` some."""
    _samplers.clear()
    trial, found = _trial(*what), {}
    everyone = providers(trial.case, CPU, mode)
    if any(provider.compiled for provider in everyone):
        torch.compiler.reset()  # what was compiled for other comparisons counts against a limit
    for provider in everyone:
        if only is None or provider.name in only:
            truth = trial.truth if only is None else None
            found[provider.name], call = prepare(provider, mode, trial.sets[0], truth)
            if call:
                _samplers[provider.name] = on_cpu(functools.partial(call, trial.sets[0]))
    gc.collect()
    return found


def _sample(name: str) -> tuple[float, float]:
    """Time, in a worker, one call."""
    return _samplers[name]()
