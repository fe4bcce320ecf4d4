"""Conditions of any nesting, batch first: rows of them, and two of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cond", "rows", "stack"]

Cond = Mapping[str, Any]
"""Keyword arguments for a network: tensors with the batch first, or nested tuples of them."""


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, Mapping):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple):
        parts = [_map(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first  # None, or an option that is no tensor


def rows(cond: Cond, index: slice | Tensor) -> dict[str, Any]:
    """The samples `index` of every tensor."""
    return _map(lambda tensor: tensor[index], dict(cond))


def _signature(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, Mapping):
        return {key: _signature(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return [_signature(value) for value in tree]
    return tree


def stack(first: Cond, second: Cond) -> dict[str, Any] | None:
    """Both, one after the other along the batch; None where names or shapes differ."""
    if _signature(first) != _signature(second):
        return None
    return _map(lambda a, b: torch.cat((a, b)), dict(first), dict(second))
