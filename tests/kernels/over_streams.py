"""Ops over tuples of streams as the judge calls them: every tensor by its name and stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests import oracle


def check_streams(
    op: Callable,
    op_ref: Callable,
    streams: Sequence[Mapping[str, Tensor]],
    moving: Sequence[str],
    dtype: Any,
    terms: int,
    constants: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Judge an op of tuples, in all modes, against its reference of each stream.

    Args:
        op: Takes a tuple by each name; returns a tuple of streams, or several.
        op_ref: Its reference, of one stream.
        streams: Inputs of each stream by name.
        moving: Inputs that carry a tangent, "x0" for x of the first stream.
        dtype: As in `oracle.check_op`.
        terms: Likewise.
        constants: More arguments by name, one for each stream: no tensors of the op's gradient.
    """
    names, count = list(streams[0]), len(streams)
    constants = constants or {}

    def together(**given: Tensor) -> list[Tensor]:
        tuples = {n: tuple(given[f"{n}{i}"] for i in range(count)) for n in names}
        ys = op(**tuples, **{n: tuple(c) for n, c in constants.items()})
        return [y for result in (ys if isinstance(ys[0], tuple) else (ys,)) for y in result]

    def apart(**given: Tensor) -> list[Tensor]:
        results = []
        for i in range(count):
            y = op_ref(
                **{n: given[f"{n}{i}"] for n in names}, **{n: c[i] for n, c in constants.items()}
            )
            results.append(y if isinstance(y, tuple) else (y,))
        return [y for result in zip(*results, strict=True) for y in result]

    inputs = {f"{n}{i}": x for i, stream in enumerate(streams) for n, x in stream.items()}
    oracle.check_op(together, apart, inputs, moving or list(inputs), dtype, terms)


def launches(
    op: Callable,
    streams: Sequence[Mapping[str, Tensor]],
    moving: Sequence[str],
    monkeypatch: Any,
    **constants: Any,
) -> list[str]:
    """Return the interpreted kernels that are launched for value, tangent and gradient."""
    from triton.runtime.interpreter import GridExecutor

    launched, launch = [], GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    tuples = {
        n: tuple(stream[n].float().requires_grad_() for stream in streams) for n in streams[0]
    }
    xs = [x for n in moving for x in tuples[n]]

    def of_moving(*xs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(xs)
        given = {
            n: tuple(next(rest) for _ in tuples[n]) if n in moving else tuples[n] for n in tuples
        }
        ys = op(**given, **constants)
        return tuple(y for result in (ys if isinstance(ys[0], tuple) else (ys,)) for y in result)

    ys, _ = torch.func.jvp(of_moving, tuple(xs), tuple(x.detach() for x in xs))
    leaves = [x for one in tuples.values() for x in one]
    torch.autograd.grad(ys, leaves, [y.detach() for y in ys])
    return launched
