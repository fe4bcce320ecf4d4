"""How networks are called: in which dtype, and with conditions of which samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Cond", "Network", "called_in", "network_dtype", "rows", "stack"]

Network = Callable[..., Tensor]
"""f(z, r, t, **cond) -> u, shaped like z."""
Cond = Mapping[str, Any]
"""Keyword arguments for a network: tensors with the batch first, or nested tuples of them."""
Tree = TypeVar("Tree")


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
    """f(z, r, t, **cond), with its latents and times cast to `dtype`."""

    def call(z: Tensor, r: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return f(z.to(dtype), r.to(dtype), t.to(dtype), **cond)

    return call


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
