"""Timing that can be trusted, and where it was taken.

Providers of the same work take turns, call by call, so that a machine that slows down slows all of
them. On a GPU a call is timed by events on the device after a write over three times the L2 cache.
On the CPU wall time stands beside the process's own CPU time, which a busy machine stretches less.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rows", "Timing", "environment", "measure", "peak_mib"]

MIN_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms_p20, ms_p50, ms_p80: Quantiles of the time, on the device where there is one.
        cpu_ms_p50: Median CPU time of the process; on a GPU, what launching costs.
        n: Calls timed.
    """

    ms_p20: float
    ms_p50: float
    ms_p80: float
    cpu_ms_p50: float
    n: int


def measure(
    providers: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 1.0
) -> dict[str, Timing]:
    """Time `providers`, alternating, for about `seconds` in all after one warm-up call of each.

    Args:
        providers: Calls to compare; each does the same work.
        device: Where they run.
        seconds: Time to spend; each provider is called at least five times.
    """
    timer = _cuda_timer(device) if device.type == "cuda" else _cpu_timer
    for call in providers.values():
        call()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in providers}
    end = time.monotonic() + seconds
    order = list(providers)
    while time.monotonic() < end or len(taken[order[0]]) < MIN_CALLS:
        for name in order:
            taken[name].append(timer(providers[name]))
        order.reverse()  # nobody is always the one after the same other
    return {name: _timing(samples) for name, samples in taken.items()}


def _timing(samples: list[tuple[float, float]]) -> Timing:
    wall, cpu = ([s[i] for s in samples] for i in (0, 1))
    p20, _, _, p80 = statistics.quantiles(wall, n=5, method="inclusive")
    return Timing(p20, statistics.median(wall), p80, statistics.median(cpu), len(samples))


def _cpu_timer(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], tuple[float, float]]:
    properties: Any = torch.cuda.get_device_properties(device)
    flush = torch.empty(3 * properties.L2_cache_size, dtype=torch.uint8, device=device)

    def timer(call: Callable[[], object]) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        cpu = time.process_time()
        start.record()
        call()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end), 1e3 * cpu

    return timer


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

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **fields: Any) -> bool:
        """Whether some row has these values in the identifying fields."""
        return any(all(row.get(k) == fields[k] for k in self.key) for row in self.rows)

    def add(self, timing: Timing | None = None, **fields: Any) -> dict[str, Any]:
        """Append a row."""
        row = fields | ({k: _short(v) for k, v in asdict(timing).items()} if timing else {})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def _short(value: float) -> float:
    return float(f"{value:.5g}")
