"""Timing that can be trusted, and where it was taken.

Every row is a provider in a mode on a case. What a provider computes is verified before it is timed
(`bench.judge`); what it cannot do is a row with the reason. Providers of the same work take turns,
call by call, so that a machine that slows down slows all of them.

On a GPU, device time is that of a CUDA graph of many calls, each on operands of its own, together
over three times the L2 cache; host time is that of issuing one call. On a CPU the process's own CPU
time, which a busy machine stretches less, stands beside wall time.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Operands, operands
from bench.judge import Truth
from bench.providers import Provider, Unsupported, step
from mfmjt.errors import RunError

__all__ = [
    "KEY",
    "MAX_SETS",
    "Ceilings",
    "DeviceLost",
    "Rows",
    "Sampler",
    "Timing",
    "cuda_events",
    "dtype_name",
    "environment",
    "l2_bytes",
    "on_cpu",
    "peak_mib",
    "prepare",
    "replayed",
    "row_of",
    "take_turns",
]

MIN_CALLS = 5
MAX_SETS = 64
"""Of operands, in one CUDA graph."""

KEY = ("op", "case", "dtype", "mode", "provider", "malloc", "threads")
"""What identifies a row."""

Sampler = Callable[[], tuple[float, float]]
"""Does one call, or several, and returns the milliseconds (of one, of the host or CPU for one)."""


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


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms_p20, ms_p50, ms_p80: Quantiles of the time: of the device on a GPU, else wall time.
        cpu_ms_p20, cpu_ms_p50, cpu_ms_p80: On a CPU, CPU time of the process; with a GPU, what it
            takes the host to issue the call.
        n: Samples.
    """

    ms_p20: float
    ms_p50: float
    ms_p80: float
    cpu_ms_p20: float
    cpu_ms_p50: float
    cpu_ms_p80: float
    n: int


def take_turns(samplers: Mapping[str, Sampler], seconds: float = 1.0) -> dict[str, Timing]:
    """Sample all, alternating, for about `seconds` in all.

    Args:
        samplers: What to compare; each does the same work and has been warmed up.
        seconds: Time to spend; each is sampled at least five times.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    end = time.monotonic() + seconds
    order = list(samplers)
    while order and (time.monotonic() < end or len(taken[order[0]]) < MIN_CALLS):
        for name in order:
            taken[name].append(samplers[name]())
        order.reverse()  # nobody is always the one after the same other
    return {name: _timing(samples) for name, samples in taken.items()}


def _timing(samples: list[tuple[float, float]]) -> Timing:
    columns = ([s[i] for s in samples] for i in (0, 1))
    quantiles = []
    for column in columns:
        p20, _, _, p80 = statistics.quantiles(column, n=5, method="inclusive")
        quantiles.append((p20, statistics.median(column), p80))
    return Timing(*quantiles[0], *quantiles[1], n=len(samples))


def on_cpu(call: Callable[[], object]) -> Sampler:
    """Wall and CPU time of a call."""

    def sample() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)

    return sample


def cuda_events(call: Callable[[], object], device: torch.device) -> Sampler:
    """Time between events around a call, after a write over three times the L2 cache."""
    flush = torch.empty(3 * l2_bytes(device), dtype=torch.uint8, device=device)

    def sample() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        host = time.perf_counter()
        start.record()
        call()
        end.record()
        host = time.perf_counter() - host
        end.synchronize()
        return start.elapsed_time(end), 1e3 * host

    return sample


def replayed(call: Callable[[Operands], object], sets: list[Operands]) -> Sampler:
    """One CUDA graph of a call on each set of operands; host time is of an ordinary call.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in sets:
            call(given)
    graph.replay()

    def sample() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        host = time.perf_counter()
        call(sets[0])
        host = time.perf_counter() - host
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(sets), 1e3 * host

    return sample


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.L2_cache_size)


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Device memory that `call` takes beyond what is held before it, MiB; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def prepare(
    case: Case,
    dtype: torch.dtype,
    mode: str,
    providers: Iterable[Provider],
    device: torch.device,
    truth: Truth | None,
) -> tuple[dict[str, tuple[Callable[[Operands], object], float | None]], dict[str, dict[str, str]]]:
    """Build every provider's call, run it, and compare with the truth.

    Args:
        case: What to compute.
        dtype: Of the operands.
        mode: One of `cases.MODES`.
        providers: Who.
        device: Where.
        truth: What is right; None for calls that were verified elsewhere.

    Returns:
        For those who may be timed the call and its error over the limit; for the others the fields
        `status` and `reason` of their row.

    Raises:
        DeviceLost: A call broke the GPU's state.
    """
    good: dict[str, tuple[Callable[[Operands], object], float | None]] = {}
    bad: dict[str, dict[str, str]] = {}
    given = operands(case, dtype, device)
    torch.compiler.reset()  # what was compiled for other comparisons counts against a limit
    for provider in providers:
        try:
            call = step(provider, case, mode)
            found = call(given)
            error = None
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
            bad[provider.name] = {"status": "unsupported", "reason": _line(error)}
        except Exception as error:  # other people's code may fail in any way
            reason = f"{type(error).__name__}: {_line(error)}"
            bad[provider.name] = {"status": "unsupported", "reason": reason}
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()  # where a kernel went wrong, the next one would be blamed
            except RuntimeError as error:
                raise DeviceLost(provider.name, _line(error)) from error
    gc.collect()
    return good, bad


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[0][:200]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best, measured in the same run.

    Attributes:
        copy_gbps: Bytes read and written by a copy of a large tensor, GB/s.
        gemm_tflops: A large square matrix product, TFLOP/s, by dtype.
    """

    copy_gbps: float
    gemm_tflops: dict[str, float]

    @classmethod
    def measure(
        cls, device: torch.device, dtypes: Iterable[torch.dtype], tiny: bool = False
    ) -> Ceilings:
        """Take both; on small tensors, which says nothing, where everything is tiny."""
        cuda = device.type == "cuda"
        size = 2**12 if tiny else 2**31 if cuda else 2**28
        x = torch.ones(size, dtype=torch.uint8, device=device)
        y = torch.ones_like(x)
        ms = _best(lambda: y.copy_(x), device)
        copy = 2 * x.nbytes / ms / 1e6
        n = 64 if tiny else 8192 if cuda else 2048
        gemm = {}
        for dtype in dtypes:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            ms = _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
            gemm[dtype_name(dtype)] = _short(2 * n**3 / ms / 1e9)
        return cls(_short(copy), gemm)

    def floor_ms(self, case: Case, dtype: torch.dtype, mode: str) -> float:
        """The least time in which the case's FLOPs and bytes can be done here, milliseconds."""
        flops, elements = case.flops.of(mode), case.elements.of(mode)
        compute = flops / (1e9 * self.gemm_tflops[dtype_name(dtype)])
        return max(compute, elements * dtype.itemsize / (1e6 * self.copy_gbps))


def _best(call: Callable[[], object], device: torch.device, times: int = 8) -> float:
    call()
    sample = cuda_events(call, device) if device.type == "cuda" else on_cpu(call)
    return min(sample()[0] for _ in range(times))


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on."""
    return str(dtype).removeprefix("torch.")


def row_of(case: Case, dtype: torch.dtype, mode: str, ceilings: Ceilings) -> dict[str, Any]:
    """The fields that all providers' rows of a case share."""
    return {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "batch": case.batch,
        "length": case.length,
        "dtype": dtype_name(dtype),
        "mode": mode,
        "flops": case.flops.of(mode),
        "bytes": case.elements.of(mode) * dtype.itemsize,
        "floor_ms": _short(ceilings.floor_ms(case, dtype, mode)),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on: machine, driver, versions, commit, time."""
    stamp: dict[str, Any] = {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "commit": _run("git", "rev-parse", "HEAD"),
        "dirty": bool(_run("git", "status", "--porcelain", "--untracked-files=no")),
    }
    if device.type == "cuda":
        stamp |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return stamp


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Rows:
    """Rows of results in a JSON-lines file; a row that is there already is not made again.

    Args:
        path: The file; rows are appended.
        key: The fields that identify a row.
    """

    def __init__(self, path: Path, key: tuple[str, ...] = KEY) -> None:
        self.path, self.key = path, key
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._known = {self._of(row) for row in self.rows}

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in self.key)

    def has(self, **fields: Any) -> bool:
        """Whether some row has these values in the identifying fields."""
        return self._of(fields) in self._known

    def add(self, fields: dict[str, Any], timing: Timing | None = None) -> dict[str, Any]:
        """Append a row."""
        row = fields | ({k: _short(v) for k, v in asdict(timing).items()} if timing else {})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known.add(self._of(row))
        return row


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
