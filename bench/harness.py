"""Timing that can be trusted.

Every row is a provider in a mode on a case. What a provider computes is verified before it is timed
(`bench.judge`); what it cannot do is a row with the reason. Providers of the same work take turns,
call by call, so that a machine that slows down slows all of them.

On a GPU, device time is that of a CUDA graph of many calls, each on operands of its own, together
over three times the L2 cache; host time is that of issuing one call. On a CPU the process's own CPU
time, which a busy machine stretches less, stands beside wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bench.cases import Case, Operands, operands
from bench.judge import Truth
from bench.providers import Provider, Unsupported, step
from mfmjt.errors import RunError

__all__ = [
    "MAX_SETS",
    "CaptureFailed",
    "DeviceLost",
    "Sampler",
    "Timing",
    "cuda_events",
    "dtype_name",
    "l2_bytes",
    "line_of",
    "of_graph",
    "on_cpu",
    "peak_mib",
    "prepare",
    "recorded",
    "replayed",
    "take_turns",
]

T = TypeVar("T")

MIN_CALLS = 5
MAX_SETS = 64
"""Of operands, in one CUDA graph."""

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


class CaptureFailed(RunError):
    """A call cannot be a CUDA graph; its process is not to be trusted with another one.

    PyTorch's allocator keeps a filter that belongs to the graph that is not.
    """

    taints = True


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


def recorded(
    call: Callable[[], T], warm_up: Callable[[], object] | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return a call as one CUDA graph, and what it returned: memory that every replay writes anew.

    What other threads do meanwhile, such as reading ahead, does not spoil the capture.

    Args:
        call: What to record; it must not wait for the GPU.
        warm_up: What to run twice before, on the same stream; the call itself by default.

    Raises:
        CaptureFailed: The call cannot be captured.
    """
    before = torch.cuda.current_stream()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                (warm_up or call)()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = call()
        except Exception as error:
            raise CaptureFailed(f"{type(error).__name__}: {line_of(error)}") from error
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    before.wait_stream(stream)
    return graph, result


def of_graph(graph: torch.cuda.CUDAGraph, calls: int = 1) -> Sampler:
    """Time of a replay between events, over the calls in it, and the host's time for it."""

    def sample() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        host = time.perf_counter()
        graph.replay()
        host = time.perf_counter() - host
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls, 1e3 * host

    return sample


def replayed(call: Callable[[Operands], object], sets: list[Operands]) -> Sampler:
    """Return one CUDA graph of a call on each set of operands; host time is of an ordinary call.

    Raises:
        CaptureFailed: The call cannot be captured.
    """
    graph, _ = recorded(lambda: [call(given) for given in sets], lambda: call(sets[0]))
    device = of_graph(graph, len(sets))

    def sample() -> tuple[float, float]:
        torch.cuda.synchronize()
        host = time.perf_counter()
        call(sets[0])
        host = time.perf_counter() - host
        return device()[0], 1e3 * host

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
    providers: Sequence[Provider],
    device: torch.device,
    truth: Truth | None,
    given: Operands | None = None,
) -> tuple[dict[str, tuple[Callable[[Operands], object], float | None]], dict[str, dict[str, str]]]:
    """Build every provider's call, run it, and compare with the truth.

    Args:
        case: What to compute.
        dtype: Of the operands.
        mode: One of `cases.MODES`.
        providers: Who.
        device: Where.
        truth: What is right; None for calls that were verified elsewhere.
        given: Operands, which are drawn otherwise.

    Returns:
        For those who may be timed the call and its error over the limit; for the others the fields
        `status` and `reason` of their row.

    Raises:
        DeviceLost: A call broke the GPU's state.
    """
    good: dict[str, tuple[Callable[[Operands], object], float | None]] = {}
    bad: dict[str, dict[str, str]] = {}
    given = given or operands(case, dtype, device)
    if any(provider.compiled for provider in providers):
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
            bad[provider.name] = {"status": "unsupported", "reason": line_of(error)}
        except Exception as error:  # other people's code may fail in any way
            reason = f"{type(error).__name__}: {line_of(error)}"
            bad[provider.name] = {"status": "unsupported", "reason": reason}
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()  # where a kernel went wrong, the next one would be blamed
            except RuntimeError as error:
                raise DeviceLost(provider.name, line_of(error)) from error
    return good, bad


def line_of(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[0][:200]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on."""
    return str(dtype).removeprefix("torch.")
