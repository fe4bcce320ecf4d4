"""Time every op on a CPU, against plain PyTorch and torch.compile.

Every result is verified before it is timed. Rows go to DIR/kernels.jsonl, what they were taken on
to DIR/environment.json; rows that are in the file already are not made again, so that a run that
was cut short goes on.

Two processes do the work and take turns, call by call: one with glibc's allocator as it is, one
with raised thresholds (MALLOC_MMAP_THRESHOLD_ and MALLOC_TOP_PAD_ of 1 GiB), in which eager PyTorch
keeps the memory that it would otherwise hand back and fault in again at every operation. Both have
pinned threads (OMP_NUM_THREADS, OMP_PROC_BIND) that do not spin while idle (GOMP_SPINCOUNT=100), so
that CPU time is work. Judge by `cpu_ms`: another program on the machine stretches wall time more.

Examples:
  python -m bench cpu --out bench/results/mine               all, some ten minutes on two cores
  python -m bench cpu --out /tmp/look --ops swiglu,adaln --quick
  python -m bench report bench/results/mine                  plots and tables of it
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.cases import JVP_BACKWARD, Case, cases, operands
from bench.harness import Sampler, dtype_name, on_cpu, prepare, take_turns
from bench.judge import Truth
from bench.kernels import named_ops
from bench.machine import Ceilings, environment, row_of
from bench.providers import OURS, REFERENCE, providers
from bench.rows import Rows
from mfmjt.kernels import _native

__all__ = ["add_arguments", "run"]

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**30)}
IN_RAISED = (REFERENCE, OURS)
"""Who runs with raised thresholds too; it matters to those who allocate much."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench cpu`."""
    command.add_argument("--out", required=True, type=Path, help="folder of the results")
    command.add_argument("--ops", help="only these, separated by commas")
    command.add_argument("--quick", action="store_true", help="the headline case of each op only")
    command.add_argument("--seconds", type=float, default=0.5, help="for each comparison [0.5]")
    command.add_argument("--minutes", type=float, default=12.0, help="stop after so long [12]")
    command.add_argument("--threads", type=int, help="[all cores this process may use]")
    command.add_argument("--tiny", action="store_true", help="no real sizes: to see that it runs")


def run(given: argparse.Namespace) -> int:
    """Run `python -m bench cpu`; return the exit status."""
    end = time.monotonic() + 60 * given.minutes
    ops = named_ops(given.ops)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "kernels.jsonl")
    threads = given.threads or len(os.sched_getaffinity(0))
    scale = "tiny" if given.tiny else "cpu"
    jobs = list(_jobs(ops, scale, given.quick))
    with contextlib.ExitStack() as stack:
        workers = {
            "default": stack.enter_context(_worker(threads, {})),
            "raised": stack.enter_context(_worker(threads, RAISED)),
        }
        stamp, ceilings = workers["default"].ask("environment", given.tiny)
        stamp["cores"] = len(os.sched_getaffinity(0))  # a bound thread sees its own only
        path = given.out / "environment.json"
        path.write_text(json.dumps(stamp, indent=2) + "\n")
        print(json.dumps(stamp, indent=2))
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


def _jobs(ops: tuple[str, ...], scale: str, quick: bool) -> Iterator[tuple[Case, torch.dtype, str]]:
    """What to compare: headline cases first, then what is quickest."""
    found = [case for op in ops for case in cases(op, scale)]
    found.sort(key=lambda c: (not c.headline, 0 if c.headline else c.flops.of(JVP_BACKWARD)))
    for case in found:
        if case.headline or not quick:
            for dtype in DTYPES.values():
                for mode in case.modes:
                    yield case, dtype, mode


Found = list[tuple[str, str, dict[str, Any], Any]]


def _compare(
    workers: dict[str, _Worker], case: Case, dtype: torch.dtype, mode: str, scale: str, s: float
) -> Found:
    """(provider, malloc, fields, timing or None) of everyone on one case."""
    about = (case.op, case.name, scale, dtype_name(dtype), mode)
    good, bad = workers["default"].ask("prepare", *about, None)
    again = [name for name in IN_RAISED if name in good]
    workers["raised"].ask("prepare", *about, again)
    samplers: dict[str, Sampler] = {
        f"{name} default": workers["default"].sampler(name) for name in good
    }
    samplers |= {f"{name} raised": workers["raised"].sampler(name) for name in again}
    found: Found = [(name, "default", fields, None) for name, fields in bad.items()]
    for key, timing in take_turns(samplers, s).items():
        name, malloc = key.split()
        found.append((name, malloc, {"status": "ok", "error_of_limit": good[name]}, timing))
    return found


def _line(shared: dict[str, Any], found: Found) -> str:
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


class _Worker:
    """A process that prepares calls, and runs one when told to."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def ask(self, *message: Any) -> Any:
        """Send a request; wait for the answer.

        Raises:
            RuntimeError: The process failed.
        """
        self.connection.send(message)
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"The benchmark process died at {message}.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sampler(self, name: str) -> Sampler:
        """Milliseconds of wall and CPU time of one call of a provider."""
        return functools.partial(self.ask, "call", name)


@contextlib.contextmanager
def _worker(threads: int, malloc: dict[str, str]) -> Iterator[_Worker]:
    """Start a process whose allocator and threads are set from its first moment on."""
    env = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "threads",
        "GOMP_SPINCOUNT": "100",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **malloc,
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    theirs.close()
    try:
        worker = _Worker(ours)
        worker.ask("started")  # while one imports PyTorch, another's ceilings come out too low
        yield worker
    finally:
        ours.close()
        process.join(timeout=30)
        process.kill()


def _serve(connection: Connection) -> None:
    """What the process does until its owner hangs up."""
    samplers: dict[str, Sampler] = {}
    truths = _Truths()

    def answer(request: str, *given: Any) -> Any:
        if request == "call":
            return samplers[given[0]]()
        if request == "started":
            return None
        samplers.clear()
        if request == "environment":
            stamp = environment(CPU) | {"extension": _native.status()}
            ceilings = Ceilings.measure(CPU, DTYPES.values(), *given)
            return stamp | {"ceilings": vars(ceilings)}, ceilings
        op, name, scale, dtype, mode, only = given
        case = next(c for c in cases(op, scale) if c.name == name)
        wanted = [p for p in providers(case, CPU, mode) if only is None or p.name in only]
        truth = truths.of(case, DTYPES[dtype]) if only is None else None
        good, bad = prepare(case, DTYPES[dtype], mode, wanted, CPU, truth)
        gc.collect()
        drawn = operands(case, DTYPES[dtype], CPU)
        for provider, (call, _) in good.items():
            samplers[provider] = on_cpu(functools.partial(call, drawn))
        return {provider: error for provider, (_, error) in good.items()}, bad

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            message = connection.recv()
            try:
                connection.send(answer(*message))
            except Exception as error:
                connection.send(RuntimeError(f"{message}: {type(error).__name__}: {error}"))


class _Truths:
    """The truth of the last case, which serves all its modes."""

    def __init__(self) -> None:
        self.key: tuple[str, str, torch.dtype] | None = None
        self.truth: Truth | None = None

    def of(self, case: Case, dtype: torch.dtype) -> Truth:
        key = (case.op, case.name, dtype)
        if self.truth is None or self.key != key:
            self.truth, self.key = Truth(case, operands(case, dtype, CPU)), key
        return self.truth
