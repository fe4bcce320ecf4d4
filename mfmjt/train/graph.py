"""A training step as one CUDA graph, so that the GPU does not wait for thousands of launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["WARM_UP", "Recorded"]

WARM_UP = 3
"""Steps that run as they are before one of their shapes is recorded: what is made once, such as a
kernel, a table or a workspace, is made in them. They train like any other."""


class Recorded:
    """Calls a function, and from a call on replays what it did on the GPU.

    A graph belongs to the shapes of the arguments, and to those that are no tensors. The function
    must not wait for the GPU, must allocate what it keeps itself, and must change what was there
    before in place. Recording does none of its work, so that each call does it exactly once.

    Args:
        work: Takes nested tuples and dictionaries of tensors; returns a tensor.
        device: The GPU.
    """

    def __init__(self, work: Callable[..., Tensor], device: torch.device) -> None:
        self.work = work
        # Warm-up and recording share a stream: a gradient is accumulated on the stream that its
        # parameter was first used on.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.calls: dict[Any, int] = {}

    def __call__(self, *args: Any) -> Tensor:
        """`work(*args)`; the result is overwritten by the next call."""
        leaves, layout = pytree.tree_flatten(args)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (
            str(layout),
            tuple(
                (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ),
        )
        self.stream.wait_stream(torch.cuda.current_stream())
        if key not in self.graphs:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= WARM_UP:
                with torch.cuda.stream(self.stream):
                    result = self.work(*args)
                torch.cuda.current_stream().wait_stream(self.stream)
                return result
            self.graphs[key] = self._record(args)
        graph, places, result = self.graphs[key]
        torch._foreach_copy_(places, given)
        graph.replay()
        return result

    def _record(self, args: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        held = pytree.tree_map_only(Tensor, torch.clone, args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = self.work(*held)
        return (
            graph,
            [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, Tensor)],
            result,
        )
