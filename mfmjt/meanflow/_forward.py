"""du/dt in forward mode, and in one line what of PyTorch's has no forward mode."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["derivative"]

_CHECKPOINT = "torch.utils.checkpoint"
_WORDS = {
    _CHECKPOINT: (
        "The network calls torch.utils.checkpoint, which fails inside torch.func.jvp. Call "
        "mfmjt.kernels.recompute(block, *args) in its place."
    ),
    "torch.nn.parallel.distributed": (
        "DistributedDataParallel with find_unused_parameters or static_graph fails inside "
        "torch.func.jvp. Wrap a module that computes the loss, not the network: docs/accelerate.md "
        "shows one."
    ),
}
"""By the module of PyTorch that cannot be differentiated."""


def derivative(
    f: Callable[..., Tensor],
    z: Tensor,
    r: Tensor,
    t: Tensor,
    direction: Tensor,
    cond: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Give u = f(z, r, t, **cond), with its graph, and du/dt along (direction, 0, 1).

    Raises:
        InputError: f calls a part of PyTorch that fails in forward mode and is known here.
    """

    def run() -> tuple[Tensor, Tensor]:
        # r has no tangent, so it is no input of the derivative.
        u, du_dt, *_ = torch.func.jvp(
            lambda z, t: f(z, r, t, **cond), (z, t), (direction, torch.ones_like(t))
        )
        return u, du_dt

    if torch.compiler.is_compiling():
        return run()  # where PyTorch's checkpoints are right
    begin = torch.empty(0, device="cpu", requires_grad=True).view(0).grad_fn
    try:
        u, du_dt = run()
    except RuntimeError as error:
        words = _WORDS.get(_apply_called_by(error))
        if words is None:
            raise
        raise InputError(words) from error
    if begin is not None and _is_checkpointed(u, begin._sequence_nr()):
        raise InputError(_WORDS[_CHECKPOINT])
    return u, du_dt


def _apply_called_by(error: Exception) -> str:
    """Return the module that called the `autograd.Function` that failed; empty for other errors."""
    places = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if places[-1] != "torch.autograd.function":
        return ""
    return next(place for place in reversed(places) if place != places[-1])


def _is_checkpointed(u: Tensor, begin: int) -> bool:
    """Return whether the graph of u, where younger than `begin`, waits to be computed again.

    The backward pass would find that it saves less without tangents than it did with them, and
    fail far from here, with words that do not help.
    """
    left, seen = [u.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen or node._sequence_nr() < begin:
            continue
        seen.add(node)
        for name in _saved(node):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, (tuple, list)) else (saved,):
                hook = getattr(one, "unpack_hook", None)
                if getattr(hook, "__module__", "") == _CHECKPOINT:
                    return True
        left += [n for n, _ in node.next_functions]
    return False


def _saved(node: Any) -> list[str]:
    """Attributes that hold what a node saved."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # of Python, a class a call
        return ["_raw_saved_tensors"]
    kind = type(node)
    if kind not in _names:
        _names[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return _names[kind]


_names: dict[type, list[str]] = {}
