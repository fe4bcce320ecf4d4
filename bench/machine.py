"""The machine: what it is, what it reaches at best, and the least time that follows for a case."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from bench.case import Case
from bench.clock import cuda_events, on_cpu
from bench.rows import Row, commit, dtype_name, output_of, short
from mfmjt.devices import cpu_name
from mfmjt.kernels import _native, precision

__all__ = ["Ceilings", "environment", "peak_mib", "row_of"]


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best, measured in the same run.

    Attributes:
        copy_gbps: Bytes read and written by a copy of a large tensor, GB/s.
        gemm_tflops: A large square matrix product, TFLOP/s, by dtype; of float32 where a CPU has no
            instructions for the dtype.
    """

    copy_gbps: float
    gemm_tflops: dict[str, float]

    @classmethod
    def measure(
        cls, device: torch.device, dtypes: Iterable[torch.dtype], tiny: bool = False
    ) -> Ceilings:
        """Measure both; with `tiny` on small tensors, to see that it runs."""
        cuda = device.type == "cuda"
        size = 2**12 if tiny else 2**31 if cuda else 2**28
        x = torch.ones(size, dtype=torch.uint8, device=device)
        y = torch.ones_like(x)
        copy = 2 * x.nbytes / _best(lambda: y.copy_(x), device) / 1e6
        n = 64 if tiny else 8192 if cuda else 2048
        gemm = {}
        for dtype in dtypes:
            slow = not cuda and dtype in precision.SLOW
            a = torch.randn(n, n, device=device).to(torch.float32 if slow else dtype)
            b = torch.randn_like(a)
            ms = _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
            gemm[dtype_name(dtype)] = short(2 * n**3 / ms / 1e9)
        return cls(short(copy), gemm)

    def floor_ms(self, case: Case, dtype: torch.dtype, mode: str) -> float:
        """Return the least time for the case's FLOPs and bytes on this machine, in milliseconds."""
        flops, elements = case.flops.of(mode), case.elements.of(mode)
        compute = flops / (1e9 * self.gemm_tflops[dtype_name(dtype)])
        return max(compute, elements * dtype.itemsize / (1e6 * self.copy_gbps))


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Return the least milliseconds of eight calls."""
    call()
    sample = cuda_events(call, device) if device.type == "cuda" else on_cpu(call)
    return min(sample()[0] for _ in range(8))


def row_of(case: Case, dtype: torch.dtype, mode: str, ceilings: Ceilings) -> Row:
    """Return the fields that all providers' rows of a case share."""
    return {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "batch": case.batch,
        "length": case.length,
        "headline": case.compile_too,
        "dtype": dtype_name(dtype),
        "mode": mode,
        "flops": case.flops.of(mode),
        "bytes": case.elements.of(mode) * dtype.itemsize,
        "floor_ms": short(ceilings.floor_ms(case, dtype, mode)),
    }


def environment(device: torch.device) -> Row:
    """Return what a measurement depends on: machine, driver, versions, commit, time."""
    stamp: Row = {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "spin": os.environ.get("GOMP_SPINCOUNT"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": None,
        "numpy": importlib.metadata.version("numpy"),
        "commit": commit(),
        "dirty": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "extension": _native.status(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        stamp["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        stamp |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "driver": driver,
        }
    return stamp


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the device memory that `call` takes beyond what is held, MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
