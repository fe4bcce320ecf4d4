"""A function of tensors as CUDA graphs, one for each combination of shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Captured"]

GRAPHS = 8
"""Combinations of shapes whose graphs are kept; the one that was asked longest ago goes first."""
_WARM_UP = 3  # calls before a capture: kernels are compiled, libraries make their workspaces


class Captured:
    """Replays a function as one CUDA graph, without work on the host in between.

    The first call with new shapes takes as long as a few calls. The function must not read a
    tensor's value on the host, and what it computes may depend on shapes and options only. Where
    the first argument is not on a CUDA device it is called as it is.

    Args:
        function: Takes tensors, None and hashable options; returns one tensor.
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
        self._pool: Any = None

    def __call__(self, first: Tensor, **given: Any) -> Tensor:
        """`function(first, **given)`, in memory of its own."""
        if first.device.type != "cuda":
            return self._function(first, **given)
        tensors = [first, *(value for value in given.values() if isinstance(value, Tensor))]
        key = (
            tuple((value.shape, value.dtype, value.device) for value in tensors),
            tuple(
                (name, "tensor" if isinstance(value, Tensor) else value)
                for name, value in given.items()
            ),
        )
        # Tensors of inference mode could not be written to outside of it, at a later call.
        with torch.inference_mode(False), torch.no_grad():
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
        with torch.cuda.device(first.device):
            held = first.clone()
            kept = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in given.items()
            }
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._function(held, **kept)
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = self._function(held, **kept)
        places = [held, *(value for value in kept.values() if isinstance(value, Tensor))]
        return graph, places, result, self._reads()
