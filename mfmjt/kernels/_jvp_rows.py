"""`torch.func.jvp` of the first rows of a batch, beside the value of all.

MeanFlow wants du/dt in few rows of a batch, and u with its tape in all. Two calls of a network, one
for either kind of row, make every gradient of a weight twice and multiply small matrices: on a CPU
that costs more than the tangent itself. Here the network is called with all rows, as in plain
training, and then with the first rows inside forward mode, without a tape. That second call would
compute the first rows' values again; but `linear` and `conv1d`, where nearly all of the time goes,
look them up among what the first call has made, so that only the tangent is multiplied.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfmjt.kernels import _dual

__all__ = ["jvp_rows", "product"]

Product = tuple[torch.Size, Tensor | None]
"""Shape of a weight, and the first rows of what was multiplied by it; None where not recorded."""

_OTHERWISE = (
    "mfmjt.kernels.jvp_rows: the function multiplied the first rows by other weights, or in "
    "another shape, than all rows. It must treat every row of the batch, the first dimension, "
    "alike and apart; use torch.func.jvp for one that does not."
)


@dataclass
class _Tape:
    """Products of one thread; what others multiply meanwhile is their own.

    Attributes:
        products: In the order of the first call.
        fraction: Of the batch that the first rows are.
        thread: Its number.
        replayed: How many the second call has asked for; None while they are recorded.
    """

    products: list[Product]
    fraction: float
    thread: int
    replayed: int | None = None


_tape: _Tape | None = None


def product(op: Callable[..., Any], x: Any, weight: Any, bias: Any, *constants: Any) -> Any:
    """Compute `op(x, weight, bias, *constants)`, recorded or replayed inside `jvp_rows`.

    Args:
        op: A linear map of x's last dimension, plus a bias; over tuples of streams too.
        x: Rows (B, ..., C), maybe dual.
        weight: (O, C, ...); does not move.
        bias: (O,), or None; does not move.
        *constants: The other arguments of op.

    Raises:
        RuntimeError: Products come in another order, or in other shapes, than they were recorded.
    """
    tape = _tape
    if tape is None or tape.thread != threading.get_ident():
        return op(x, weight, bias, *constants)
    if isinstance(x, tuple):
        biases = (None,) * len(x) if bias is None else bias
        streams = zip(x, weight, biases, strict=True)
        return tuple([product(op, *stream, *constants) for stream in streams])
    if tape.replayed is None:
        return _record(tape, weight, op(x, weight, bias, *constants))
    y = _replay(tape, weight, (*x.shape[:-1], weight.shape[0]))
    if y is None:
        return op(x, weight, bias, *constants)
    _, x_dot = _dual.split(x)
    return _dual.join(y, None if x_dot is None else op(x_dot, weight, None, *constants))


def _record(tape: _Tape, weight: Tensor, y: Tensor) -> Tensor:
    """Record the first rows of `y` for the replay and return `y`.

    Products without a graph are not recorded: activation checkpointing would otherwise keep them
    alive.
    """
    first = y[: round(tape.fraction * y.shape[0])] if y.shape[0] > 1 else y
    tape.products.append((weight.shape, first.detach().clone() if y.requires_grad else None))
    return y


def _replay(tape: _Tape, weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return the next product, which is with `weight` and of this shape, if it was recorded."""
    assert tape.replayed is not None
    i, tape.replayed = tape.replayed, tape.replayed + 1
    of_weight, y = tape.products[i] if i < len(tape.products) else (None, None)
    if of_weight != weight.shape or (y is not None and y.shape != shape):
        raise RuntimeError(_OTHERWISE)
    return y


@contextlib.contextmanager
def _opened(tape: _Tape) -> Iterator[None]:
    global _tape
    before, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = before


def jvp_rows(
    f: Callable[..., Tensor], primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """Return the value of all rows of a batch, and the tangent of the first ones.

    The same as `f(*primals)`, and `torch.func.jvp` of f at the first rows of the primals, detached.
    f is called twice; products of `linear` and `conv1d` are made once for every row, those of
    tangents beside. f must treat rows alike and apart, and without chance: neither batch norm nor
    dropout.

    Args:
        f: Gives a tensor (B, ...).
        primals: f's arguments: tensors (B, ...), or tuples, lists and dicts of them.
        tangents: For each primal that is a tensor its tangent in the first rows, (M, ...) with
            0 < M < B, or None where it does not move. At least one moves.

    Returns:
        f(*primals) with its graph, (B, ...), and the tangent (M, ...) without one.

    Raises:
        ValueError: Tangents and primals do not fit.
        RuntimeError: f multiplies the first rows in another way than all.
    """
    moving = [
        i for i, (_, dot) in enumerate(zip(primals, tangents, strict=False)) if dot is not None
    ]
    sizes = [(primals[i].shape, tangents[i].shape) for i in moving]  # type: ignore[union-attr]
    batch, rows = (size[0] if size else 0 for size in (sizes[0] if sizes else ((), ())))
    fits = len(tangents) == len(primals) and 0 < rows < batch
    if not (fits and all(x == (batch, *dot[1:]) and dot[0] == rows for x, dot in sizes)):
        raise ValueError(
            "mfmjt.kernels.jvp_rows needs primals (B, ...) and for each a tangent (M, ...) with "
            f"0 < M < B, or None; got {[(tuple(x), tuple(dot)) for x, dot in sizes]}."
        )

    tape = _Tape([], rows / batch, threading.get_ident())
    with _opened(tape):
        value = f(*primals)

    first = pytree.tree_map_only(Tensor, lambda x: x[:rows], primals)

    def of_moving(*xs: Tensor) -> Tensor:
        given = list(first)
        for i, x in zip(moving, xs, strict=True):
            given[i] = x
        return f(*given)

    tape.replayed = 0
    with torch.no_grad(), _opened(tape):
        _, tangent, *_ = torch.func.jvp(
            of_moving,
            tuple(first[i].detach() for i in moving),
            tuple(tangents[i].detach() for i in moving),  # type: ignore[union-attr]
        )
    if tape.replayed < len(tape.products):
        raise RuntimeError(_OTHERWISE)
    return value, tangent
