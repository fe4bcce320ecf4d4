"""Timing that can be trusted: calls that take turns, and two clocks.

Whoever does the same work takes turns, call by call, so that a machine that slows down slows all of
them. On a GPU, device time is that of a CUDA graph of many calls, each on operands of its own,
together over three times the L2 cache; host time is that of issuing one call. On a CPU the
process's own CPU time, which a busy machine stretches less, stands beside wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from bench.rows import failure
from mfmjt.cuda_graph import _capturing
from mfmjt.errors import RunError
from mfmjt.testing import Operands

__all__ = ["MIN_CALLS", "CaptureFailed", "Sampler", "Timing", "cuda_events", "l2_bytes"]
__all__ += ["of_graph", "on_cpu", "recorded", "replayed", "take_turns"]

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)

MIN_CALLS = 5

Sampler = Callable[[], tuple[float, float]]
"""Makes one call, or several; returns the milliseconds of one, and those of the host or the CPU."""


class CaptureFailed(RunError):
    """A call cannot be a CUDA graph, and its process must not try another one.

    PyTorch's allocator keeps a filter that belongs to the graph that failed.
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


def take_turns(
    samplers: Mapping[Name, Sampler], seconds: float = 1.0, least: int = MIN_CALLS
) -> dict[Name, Timing]:
    """Take samples of all, alternating, for about `seconds` in all.

    Args:
        samplers: What to compare; each does the same work and has been warmed up.
        seconds: Time to spend.
        least: Samples of each, however long they take.
    """
    taken: dict[Name, list[tuple[float, float]]] = {name: [] for name in samplers}
    end = time.monotonic() + seconds
    order = list(samplers)
    while order and (time.monotonic() < end or len(taken[order[0]]) < least):
        for name in order:
            taken[name].append(samplers[name]())
        order.reverse()  # nobody is always the one after the same other
    return {name: _timing(samples) for name, samples in taken.items()}


def _timing(samples: list[tuple[float, float]]) -> Timing:
    (a, b, c), (d, e, f) = np.quantile(samples, (0.2, 0.5, 0.8), axis=0).T.tolist()
    return Timing(a, b, c, d, e, f, n=len(samples))


def on_cpu(call: Callable[[], object]) -> Sampler:
    """Return how to take the wall and the CPU time of a call."""

    def sample() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)

    return sample


def _between_events(
    call: Callable[[], object], before: Callable[[], object], calls: int = 1
) -> Sampler:
    """Return how to take the GPU's time between events, over the calls in it, and the host's."""

    def sample() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        host = time.perf_counter()
        call()
        host = time.perf_counter() - host
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls, 1e3 * host

    return sample


def cuda_events(call: Callable[[], object], device: torch.device) -> Sampler:
    """Return how to time a call between events, after a write over three times the L2 cache."""
    flush = torch.empty(3 * l2_bytes(device), dtype=torch.uint8, device=device)
    return _between_events(call, flush.zero_)


def of_graph(graph: torch.cuda.CUDAGraph, calls: int = 1) -> Sampler:
    """Return how to time a replay between events, over the calls in it, and the host for it."""
    return _between_events(graph.replay, torch.cuda.synchronize, calls)


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            (warm_up or call)()
    torch.cuda.synchronize()
    try:
        with _capturing(torch.cuda.graph_pool_handle(), stream) as graph:
            result = call()
    except Exception as error:
        raise CaptureFailed(failure(error)) from error
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def replayed(call: Callable[[Operands], object], sets: list[Operands]) -> Sampler:
    """Return how to time a CUDA graph of a call on each set; host time is of an ordinary call.

    Raises:
        CaptureFailed: The call cannot be captured.
    """
    graph, _ = recorded(lambda: [call(given) for given in sets], lambda: call(sets[0]))
    device = of_graph(graph, len(sets))
    host = _between_events(lambda: call(sets[0]), torch.cuda.synchronize)
    return lambda: (device()[0], host()[1])


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.L2_cache_size)
