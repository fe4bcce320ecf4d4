"""A training step as one CUDA graph, so that the GPU does not wait for thousands of launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfmjt.meanflow.capture import recording

__all__ = ["WARM_UP", "Recorded"]

WARM_UP = 3
"""Steps that run as they are before one of their shapes is recorded: what is made once, such as a
kernel, a table or a workspace, is made in them. They train like any other."""


class Recorded:
    """Calls a function, and from a call on replays what it did on the GPU.

    A graph belongs to the shapes of the arguments, and to those that are no tensors. The function
    must not wait for the GPU, must allocate what it keeps itself, and must change what was there
    before in place. Recording does none of its work, so that each call does it exactly once.
    Tensors of the CPU among the arguments are for the host: what is recorded cannot read them.

    Args:
        work: Takes nested tuples and dictionaries of tensors; returns a tensor.
        device: The GPU.
        settle: Called before a recording: lets other threads finish what they do with the GPU.
    """

    def __init__(
        self, work: Callable[..., Tensor], device: torch.device, settle: Callable[[], None]
    ) -> None:
        self.work, self.settle, self.device = work, settle, device
        # Warm-up and recording share a stream: a gradient is accumulated on the stream that its
        # parameter was first used on.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.calls: dict[Any, int] = {}

    def __call__(self, *args: Any) -> Tensor:
        """`work(*args)`; the result is overwritten by the next call."""
        leaves, layout = pytree.tree_flatten(args)
        given = _on_gpu(leaves)
        key = (
            str(layout),
            tuple(
                (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ),
        )
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if key not in self.graphs:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= WARM_UP:
                with torch.cuda.stream(self.stream):
                    result = self.work(*args)
                current.wait_stream(self.stream)
                return result
            self.graphs[key] = self._record(args)
        graph, places, result = self.graphs[key]
        torch._foreach_copy_(places, given)
        graph.replay()
        return result

    def _record(self, args: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        self.settle()
        held = pytree.tree_map_only(Tensor, torch.clone, args)
        with recording(self.pool, self.stream) as graph:
            result = self.work(*held)
        return graph, _on_gpu(pytree.tree_leaves(held)), result


def _on_gpu(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_cpu]
