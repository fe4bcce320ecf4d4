"""A function of tensors as CUDA graphs, one for each combination of shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Captured", "recording"]

GRAPHS = 8
"""Combinations of shapes whose graphs are kept; the one that was asked longest ago goes first."""
_WARM_UP = 3  # calls before a capture: kernels are compiled, libraries make their workspaces


@contextmanager
def recording(pool: Any, stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Record what is launched inside as a graph, which is whole when the block has ended.

    By default a recording also fails where another thread allocates pinned memory or asks for an
    event meanwhile, as those do that fetch data; here only this thread's own calls are looked at.

    Args:
        pool: Memory of graphs that are not replayed at once, from `torch.cuda.graph_pool_handle`.
        stream: To record on; the same for all graphs of a pool.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer block puts the stream back: PyTorch does not where a recording has failed.
    with (
        torch.cuda.stream(torch.cuda.current_stream(stream.device)),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        yield graph


class Captured:
    """Replays a function as one CUDA graph, without work on the host in between.

    The first call with new shapes takes as long as a few calls. The function must not read a
    tensor's value on the host, and what it computes may depend on shapes and options only. Where
    the first argument is not on a CUDA device it is called as it is.

    A graph serves all values of a float, which the function is given as a tensor of one element;
    but 1.0 stays a number, for what a function leaves out there.

    Args:
        function: Takes tensors, floats, None and hashable options; returns one tensor.
        reads: Tells, after a call, what the function read beside its arguments and may let go of,
            such as entries of a cache. A graph knows addresses only, so it is kept as long as that.
    """

    def __init__(
        self, function: Callable[..., Tensor], reads: Callable[[], object] | None = None
    ) -> None:
        self._function = function
        self._reads = reads or (lambda: None)
        self._graphs: OrderedDict[
            Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor, object]
        ] = OrderedDict()
        self._pools: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}

    def __call__(self, first: Tensor, **given: Any) -> Tensor:
        """`function(first, **given)`, in memory of its own."""
        if first.device.type != "cuda":
            return self._function(first, **given)
        # Tensors of inference mode could not be written to outside of it, at a later call.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(first.device):
            given = _floats_as_tensors(given, first.device)
            tensors, key = _tensors_and_key(first, given)
            if key in self._graphs:
                self._graphs.move_to_end(key)
            else:
                if len(self._graphs) >= GRAPHS:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._capture(first, given)
            graph, places, result, _ = self._graphs[key]
            torch._foreach_copy_(places, tensors)
            graph.replay()
            return result.clone()

    def _capture(
        self, first: Tensor, given: dict[str, Any]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor, object]:
        held = first.clone()
        kept = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        if first.device not in self._pools:
            self._pools[first.device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        pool, stream = self._pools[first.device]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(held, **kept)
        torch.cuda.current_stream().wait_stream(stream)
        with recording(pool, stream) as graph:
            result = self._function(held, **kept)
        return graph, _tensors_and_key(held, kept)[0], result, self._reads()


def _floats_as_tensors(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Floats but 1.0 as tensors, filled on the device: a copy from the host would be waited for."""
    return {
        name: torch.full((1,), value, dtype=torch.float64, device=device)
        if isinstance(value, float) and value != 1
        else value
        for name, value in given.items()
    }


def _tensors_and_key(first: Tensor, given: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Return what a graph reads, and what it depends on."""
    tensors = [first, *(value for value in given.values() if isinstance(value, Tensor))]
    options = [(n, "tensor" if isinstance(value, Tensor) else value) for n, value in given.items()]
    return tensors, (tuple((t.shape, t.dtype, t.device) for t in tensors), tuple(options))
