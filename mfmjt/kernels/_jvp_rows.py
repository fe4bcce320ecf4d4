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
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["jvp_rows", "known", "made"]

Product = tuple[torch.Size, Tensor | None]
"""Shape of a weight, and the first rows of what was multiplied by it; None where not kept."""

_OTHERWISE = (
    "mfmjt.kernels.jvp_rows: the function multiplied the first rows by other weights, or in "
    "another shape, than all rows. It must treat every row of the batch, the first dimension, "
    "alike and apart; use torch.func.jvp for one that does not."
)

# Of one thread, whose number is the last entry; what others multiply meanwhile is their own.
_making: tuple[list[Product], float, int] | None = None
_known: tuple[Iterator[Product], int] | None = None


def made(weight: Tensor, y: Tensor) -> Tensor:
    """Remember the first rows of a product with `weight`, where someone will ask; return it.

    What has no tape is not remembered: where blocks compute their inside again for the backward
    pass, nothing of it is to stay in memory.
    """
    if _making is not None and _making[-1] == threading.get_ident():
        products, share, _ = _making
        first = y[: round(share * y.shape[0])] if y.shape[0] > 1 else y
        products.append((weight.shape, first.detach().clone() if y.requires_grad else None))
    return y


def known(weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The next product, which is with `weight` and of this shape, if it was kept.

    Raises:
        RuntimeError: Products come in another order, or in other shapes.
    """
    if _known is None or _known[-1] != threading.get_ident():
        return None
    of_weight, y = next(_known[0], (None, None))
    if of_weight != weight.shape or (y is not None and y.shape != shape):
        raise RuntimeError(_OTHERWISE)
    return y


@contextlib.contextmanager
def _remembering(products: list[Product], share: float) -> Iterator[None]:
    global _making
    before, _making = _making, (products, share, threading.get_ident())
    try:
        yield
    finally:
        _making = before


@contextlib.contextmanager
def _knowing(products: Iterator[Product]) -> Iterator[None]:
    global _known
    before, _known = _known, (products, threading.get_ident())
    try:
        yield
    finally:
        _known = before


def jvp_rows(
    f: Callable[..., Tensor], primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """Value of all rows of a batch, and the tangent of the first ones.

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

    products: list[Product] = []
    with _remembering(products, rows / batch):
        value = f(*primals)

    first = pytree.tree_map_only(Tensor, lambda x: x[:rows], primals)

    def of_moving(*xs: Tensor) -> Tensor:
        given = list(first)
        for i, x in zip(moving, xs, strict=True):
            given[i] = x
        return f(*given)

    left = iter(products)
    with torch.no_grad(), _knowing(left):
        _, tangent, *_ = torch.func.jvp(
            of_moving,
            tuple(first[i].detach() for i in moving),
            tuple(tangents[i].detach() for i in moving),  # type: ignore[union-attr]
        )
    if next(left, None) is not None:
        raise RuntimeError(_OTHERWISE)
    return value, tangent
