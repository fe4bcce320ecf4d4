"""Functions of tensors as CUDA graphs, one graph for each combination of shapes and options.

A replayed graph costs one launch instead of thousands, so the GPU does not wait for the host. It
reads and writes the same memory each time: arguments are copied into it before each replay.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Captured", "CapturedStep", "floats_as_tensors"]

KEPT = 8
"""Graphs that `Captured` keeps; the one used longest ago is dropped first."""
WARM_UP = 3
"""Calls before a capture: kernels are compiled, and libraries allocate their workspaces."""


class _Graph(NamedTuple):
    """A graph and the memory it uses; `kept` is what else must stay in memory for it."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Tensor
    kept: object = None

    def replay(self, inputs: list[Tensor]) -> Tensor:
        """Run the graph for these inputs; the next replay overwrites the result."""
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.result


class Captured:
    """Replays a function without gradients as CUDA graphs.

    The first call with new shapes takes as long as a few calls. The function must not read a
    tensor's value on the host, and its operations may depend on shapes and options only. Where the
    first argument is not on a CUDA device, the function itself is called.

    A graph serves all values of a float, which the function gets as a tensor of one element; but
    1.0 stays a number, because a function may omit work there.

    Args:
        function: Takes tensors, floats, None and hashable options; returns one tensor.
        reads: Returns what the last call read in addition to its arguments and may be dropped
            later, such as cache entries. A graph knows addresses only, so it keeps these objects.
    """

    def __init__(
        self, function: Callable[..., Tensor], reads: Callable[[], object] | None = None
    ) -> None:
        self._function = function
        self._reads = reads or (lambda: None)
        self._graphs: OrderedDict[object, _Graph] = OrderedDict()
        self._pools: dict[torch.device, tuple[Any, torch.cuda.Stream]] = {}

    def __call__(self, first: Tensor, **given: Any) -> Tensor:
        """`function(first, **given)`, in memory of its own."""
        if first.device.type != "cuda":
            return self._function(first, **given)
        # Tensors of inference mode could not be written to outside of it, at a later call.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(first.device):
            given = floats_as_tensors(given, first.device)
            inputs, key = _inputs_and_key([first, *given.values()], tuple(given))
            if key in self._graphs:
                self._graphs.move_to_end(key)
            else:
                if len(self._graphs) >= KEPT:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._capture(first, given)
            return self._graphs[key].replay(inputs).clone()

    def _capture(self, first: Tensor, given: dict[str, Any]) -> _Graph:
        first, given = pytree.tree_map_only(Tensor, torch.clone, (first, given))
        if first.device not in self._pools:
            self._pools[first.device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        pool, stream = self._pools[first.device]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._function(first, **given)
        torch.cuda.current_stream().wait_stream(stream)
        with _capturing(pool, stream) as graph:
            result = self._function(first, **given)
        inputs, _ = _inputs_and_key([first, *given.values()])
        return _Graph(graph, inputs, result, self._reads())


class CapturedStep:
    """Calls a training step, and from the fourth call with the same shapes on replays it.

    The step must not wait for the GPU, must allocate what it keeps itself, and must change what
    exists already in place. Each call does the step's work once: the first three run it, and a
    capture runs nothing. CPU tensors among the arguments are for the host: a graph cannot read
    them.

    Args:
        step: Takes nested tuples and dictionaries of tensors; returns a tensor.
        device: The GPU.
        settle: Called before a capture: waits until other threads no longer use the GPU.
    """

    def __init__(
        self, step: Callable[..., Tensor], device: torch.device, settle: Callable[[], None]
    ) -> None:
        self._step, self._settle, self._device = step, settle, device
        # Warm-up and capture share a stream: a gradient is accumulated on the stream that its
        # parameter was first used on.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[object, _Graph] = {}
        self._calls: Counter[object] = Counter()

    def __call__(self, *args: Any) -> Tensor:
        """`step(*args)`; the next call overwrites the result."""
        leaves, layout = pytree.tree_flatten(args)
        inputs, key = _inputs_and_key(leaves, str(layout))
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        if key not in self._graphs:
            self._calls[key] += 1
            if self._calls[key] <= WARM_UP:
                with torch.cuda.stream(self._stream):
                    result = self._step(*args)
                current.wait_stream(self._stream)
                return result
            self._graphs[key] = self._capture(args)
        return self._graphs[key].replay(inputs)

    def _capture(self, args: tuple[Any, ...]) -> _Graph:
        self._settle()
        args = pytree.tree_map_only(Tensor, torch.clone, args)
        with _capturing(self._pool, self._stream) as graph:
            result = self._step(*args)
        return _Graph(graph, _inputs_and_key(pytree.tree_leaves(args))[0], result)


@contextmanager
def _capturing(pool: Any, stream: torch.cuda.Stream) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what is launched inside as a graph, which is complete when the block has ended.

    By default a capture also fails where another thread allocates pinned memory or queries an
    event meanwhile, as threads that load data do; here only this thread's own calls are checked.

    Args:
        pool: Memory of graphs that never run at once, from `torch.cuda.graph_pool_handle`.
        stream: The stream to capture on; the same for all graphs of a pool.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer block restores the stream, which PyTorch does not after a failed capture.
    with (
        torch.cuda.stream(torch.cuda.current_stream(stream.device)),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        yield graph


def floats_as_tensors(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Floats other than 1.0 as tensors, filled on the device: a copy from the host would wait."""
    return {
        name: torch.full((1,), value, dtype=torch.float64, device=device)
        if isinstance(value, float) and value != 1
        else value
        for name, value in given.items()
    }


def _inputs_and_key(leaves: Sequence[Any], layout: object = None) -> tuple[list[Tensor], object]:
    """Return the tensors that a graph reads, and what the graph depends on."""
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cpu]
    kinds = (
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    return inputs, (layout, *kinds)
