"""How networks are called: in which dtype, and with conditions of which samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Cond", "Network", "called_in", "in_one_pass", "network_dtype", "rows", "stack"]

Network = Callable[..., Tensor]
"""f(z, r, t, **cond) -> u, shaped like z."""
Cond = Mapping[str, Any]
"""Keyword arguments for a network: tensors with the batch first, or nested tuples of them."""
Tree = TypeVar("Tree")
P = ParamSpec("P")
R = TypeVar("R")


def network_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to call a network in: that of x, whatever else is computed in.

    It is float32 where autocast is on with another dtype of 16 bits: autocast casts float32 itself,
    and PyTorch mixes float16 and bfloat16 in no concatenation.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    device = x.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device)
    if cast and x.dtype != torch.get_autocast_dtype(device):
        return work
    return x.dtype if x.is_floating_point() else work


def called_in(dtype: torch.dtype, f: Network) -> Network:
    """Return f(z, r, t, **cond) with its latents and times cast to `dtype`; `args[0]` is f."""

    def call(f: Network, z: Tensor, r: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return f(z.to(dtype), r.to(dtype), t.to(dtype), **cond)

    return functools.partial(call, f)


class _OnePass(nn.Module):
    """What `DistributedDataParallel` calls in place of its network while a loss is computed."""

    def __init__(self, loss: Callable[[nn.Module, Tensor, Cond], Any], network: nn.Module) -> None:
        super().__init__()
        self.loss, self.network = loss, network

    def forward(self, x: Tensor, cond: Cond) -> Any:
        return self.loss(self.network, x, cond)


def in_one_pass(loss: Callable[P, R]) -> Callable[P, R]:
    """Let a function of (f, x, cond, ...) take an f that is `DistributedDataParallel`.

    The whole loss is then one forward pass of the wrapper, around the network itself. Called by the
    loss, its forward would run inside forward mode, where PyTorch's fails, and twice a backward.
    """

    @functools.wraps(loss)
    def call(f: Any, x: Tensor, cond: Cond | None = None, *args: Any, **kwargs: Any) -> Any:
        def of(network: nn.Module, x: Tensor, cond: Cond) -> Any:
            return loss(network, x, cond, *args, **kwargs)  # type: ignore[arg-type]

        if not isinstance(f, nn.parallel.DistributedDataParallel):
            return of(f, x, cond)  # type: ignore[arg-type]
        network = f.module
        f.module = _OnePass(of, network)
        try:
            return f(x, dict(cond or {}))
        finally:
            f.module = network

    return cast("Callable[P, R]", call)


def rows(tree: Tree, index: slice | Tensor) -> Tree:
    """Return the samples `index` of every tensor in nested tuples, lists and dictionaries."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], tree)


def stack(first: Cond, second: Cond) -> dict[str, Any] | None:
    """Both, one after the other along the batch; None where names, shapes or options differ."""

    def kind(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

    leaves, layout = pytree.tree_flatten(dict(first))
    try:
        others = layout.flatten_up_to(dict(second))
    except ValueError:  # another layout
        return None
    pairs = list(zip(leaves, others, strict=True))
    if any(kind(a) != kind(b) for a, b in pairs):
        return None
    both = [torch.cat(pair) if isinstance(pair[0], Tensor) else pair[0] for pair in pairs]
    return pytree.tree_unflatten(both, layout)
