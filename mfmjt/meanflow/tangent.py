"""A network's value and du/dt in forward mode, and which parts of PyTorch have no forward mode."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import differentiable_tangents
from mfmjt.meanflow._network import Cond, Network, rows

__all__ = ["derivative", "end_derivative", "one_call_is_cheaper", "value_and_tangent"]

_CHECKPOINT = "torch.utils.checkpoint"
_WORDS = {
    _CHECKPOINT: (
        "The network calls torch.utils.checkpoint, which fails inside torch.func.jvp. Call "
        "mfmjt.kernels.recompute(block, *args) in its place."
    ),
    "torch.nn.parallel.distributed": (
        "DistributedDataParallel fails inside torch.func.jvp. Give it to meanflow.loss itself, in "
        "place of a function that calls it."
    ),
}
"""By the module of PyTorch that fails in forward mode."""
_FSDP1 = (
    "FullyShardedDataParallel does not work inside torch.func.jvp. Shard the network with "
    "torch.distributed.fsdp.fully_shard."
)


def value_and_tangent(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: Cond, intervals: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate u = f(z, r, t) of all samples, and du/dt of the first ones along (v, 0, 1).

    This is the only place that chooses how: in two calls of f, one of them in forward mode, or in
    one call with all samples, as `mfmjt.model.MFMJT.jvp_rows` makes it.

    Args:
        f: The network.
        z: Latents (B, ...), in the dtype that f takes, as are r, t and v.
        r: Ends of the intervals (B,).
        t: Begins of the intervals (B,).
        v: dz/dt (B, ...).
        cond: Keyword arguments for f.
        intervals: Number M of samples with r < t, 0 to B; they come first, the others have r = t.

    Returns:
        u (M, ...) and du/dt (M, ...) of the first samples, and u (B - M, ...) of the others. Both u
        have their graph; du/dt may have one and is to be detached.

    Raises:
        InputError: See `derivative`.
    """
    jvp_rows = getattr(f, "jvp_rows", None)
    if jvp_rows is not None and one_call_is_cheaper(z, intervals):
        u, du_dt = jvp_rows(z, r, t, v[:intervals], **cond)
        return u[:intervals], du_dt, u[intervals:]
    u = du_dt = others = z[:0]
    if intervals:
        given = rows((z, r, t, v, dict(cond)), slice(intervals))
        u, du_dt = derivative(f, *given)
    if intervals < z.shape[0]:
        z, t, kept = rows((z, t, dict(cond)), slice(intervals, None))
        others = f(z, t, t, **kept)
    return u, du_dt, others


def one_call_is_cheaper(z: Tensor, intervals: int) -> bool:
    """Return whether one call with all samples is faster than one for each kind of sample.

    Two calls compute every weight's gradient twice and multiply smaller matrices, which costs more
    than the extra work of one call on a CPU, as long as few samples have a tangent.
    """
    few = 0 < intervals <= z.shape[0] // 2
    return few and z.device.type == "cpu" and not torch.compiler.is_compiling()


def derivative(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Evaluate u = f(z, r, t, **cond), with its graph, and du/dt along (v, 0, 1).

    Raises:
        InputError: f calls a part of PyTorch that is known to fail in forward mode.
    """
    # r has no tangent, so it is no input of the derivative.
    return _along(f, lambda z, t: f(z, r, t, **cond), (z, t), (v, torch.ones_like(t)))


def end_derivative(
    f: Network, z: Tensor, r: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Evaluate u = f(z, r, t, **cond) and du/dr, which is along (0, 1, 0), both with their graph.

    Raises:
        InputError: f calls a part of PyTorch that is known to fail in forward mode.
    """
    with differentiable_tangents():
        return _along(f, lambda r: f(z, r, t, **cond), (r,), (torch.ones_like(r),))


def _along(
    f: Network, function: Callable[..., Tensor], primals: Any, tangents: Any
) -> tuple[Tensor, Tensor]:
    """Evaluate a function that calls f once, and its derivative along tangents."""

    def run() -> tuple[Tensor, Tensor]:
        u, rate, *_ = torch.func.jvp(function, primals, tangents)
        return u, rate

    if torch.compiler.is_compiling():
        return run()  # where PyTorch's checkpoints are right
    network = f.args[0] if isinstance(f, functools.partial) and f.args else f
    if isinstance(network, nn.Module) and any(
        type(m).__name__ == "FullyShardedDataParallel" for m in network.modules()
    ):
        raise InputError(_FSDP1)  # it may end the process, with no error
    begin = torch.empty(0, device="cpu", requires_grad=True).view(0).grad_fn
    try:
        u, rate = run()
    except RuntimeError as error:
        words = _WORDS.get(_failed(error))
        if words is None:
            raise
        raise InputError(words) from error
    if begin is not None and _is_checkpointed(u, begin._sequence_nr()):
        raise InputError(_WORDS[_CHECKPOINT])
    return u, rate


def _failed(error: Exception) -> str:
    """Return the module that raised, or called the `autograd.Function` that did."""
    places = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return next(place for place in reversed(places) if place != "torch.autograd.function")


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
