"""Gradients of tangents: the fourth formula of an op, and reverse mode through it.

`Op(..., jvp_bwd=formula)` lets a gradient reach the tangents of an op. The names of the formula's
parameters say what it needs, as those of `bwd` do; each result has two cotangents:

    jvp_bwd(y_bar, y_dot_bar, ..., x, x_dot, ..., eps, needs) -> cotangents

It returns those of the tensors that `bwd` serves, in order, then those of the tangents that jvp
has. A cotangent of a tangent, x_dot_bar = J^T y_dot_bar, is what bwd makes of y_dot_bar. That of x
has two parts, J^T y_bar and the derivative of J^T y_dot_bar along x_dot, since second derivatives
are symmetric: jvp_bwd is the tangent of bwd.

The graph then keeps the tangents beside what the value needs, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfmjt.kernels._eager import flatten, nest

__all__ = ["Graphed", "of_reference"]


class Graphed:
    """The value and tangent of an op on plain tensors, with a graph of both.

    It takes the place of the op's part `jvp` in the eager shortcut, and is computed by its kernels.

    Args:
        op: An `_op.Op`.
        formula: Its `jvp_bwd`.
    """

    def __init__(self, op: Any, formula: Callable[..., Any]) -> None:
        self.op, self.formula = op, formula
        self.pick, self.count = op.jvp.pick, op.jvp.count
        both = (*op.jvp.names, *op.jvp.outputs)
        bars = [f"{y}{dot}_bar" for y in op.results for dot in ("", "_dot")]
        kept = [n for n in inspect.signature(formula).parameters if n in both]
        self._kept = [both.index(n) for n in kept]
        given = (*bars, *kept, "needs")
        self._order = [given.index(n) for n in inspect.signature(formula).parameters]
        self._wanted = [*op.tensors[: op.bwd.count]]
        self._wanted += [f"{n}_dot" for n in op.tensors if f"{n}_dot" in op.jvp.names]

    def keep(self, ctx: Any, args: Sequence[Any], outputs: tuple[Any, ...]) -> None:
        """Keep for `backward` what the parameters of the formula name."""
        both = (*args, *outputs)
        flat, ctx.sizes_kept = flatten([both[i] for i in self._kept])
        ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in flat])
        ctx.set_materialize_grads(False)
        results = flatten(outputs[: self.count])[0]
        ctx.likes = [(y.shape, y.dtype, y.device) for y in results]

    def backward(self, ctx: Any, bars: Sequence[Any], wanted: Sequence[Any]) -> tuple[Any, ...]:
        """Return the cotangents of all arguments of jvp from those of all results."""
        flat, sizes = flatten(bars[: self.count])
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if bar is None else bar
            for bar, (shape, dtype, device) in zip(flat, ctx.likes, strict=True)
        ]
        pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
        kept = nest([constant if x is None else x for x, constant in pairs], ctx.sizes_kept)
        names = self.op.jvp.names
        by_name = {n: any(flatten([w])[0]) for n, w in zip(names, wanted, strict=True)}
        needs = [by_name[n] for n in self._wanted]
        args = [*nest(filled, sizes), *kept, needs]
        with torch.no_grad():
            found = self.formula(*[args[i] for i in self._order])
        by_place = dict(zip(self._wanted, found, strict=True))
        return tuple([by_place.get(n) if by_name[n] else None for n in names])


def of_reference(reference: Callable[..., Any], jvp: Callable[..., Any], *results: str) -> Any:
    """Return the `jvp_bwd` of an op by PyTorch's derivatives of its reference, computed again.

    Args:
        reference: Takes the op's inputs in their order; lists of streams where the op does.
        jvp: The op's formula of value and tangent, which names inputs and tangents.
        results: Names of the op's results.
    """
    kinds = {n: str(p.annotation) for n, p in inspect.signature(jvp).parameters.items()}
    inputs = [n for n in inspect.signature(reference).parameters if n in kinds]
    dots = [f"{n}_dot" for n in inputs if f"{n}_dot" in kinds]

    def formula(*args: Any) -> tuple[Any, ...]:
        bars, given, needs = args[: 2 * len(results)], args[2 * len(results) : -1], args[-1]
        by_name = dict(zip(kinds, given, strict=True))
        wanted = [*of_bwd(len(needs)), *dots]
        flat, sizes = flatten([by_name[n] for n in inputs])
        floats = [isinstance(x, Tensor) and x.is_floating_point() for x in flat]
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_() if is_float else x
                for x, is_float in zip(flat, floats, strict=True)
            ]
            wide = [
                x.to(torch.promote_types(x.dtype, torch.float32)) if is_float else x
                for x, is_float in zip(leaves, floats, strict=True)
            ]
            ys = reference(*nest(wide, sizes))
            ys = flatten(ys if isinstance(ys, tuple) else (ys,))[0]
        tree = dict(zip(inputs, nest(leaves, sizes), strict=True))
        return _cotangents(ys, bars, tree, by_name, wanted, needs)

    def of_bwd(count: int) -> list[str]:
        return [n for n in inputs if "Tensor" in kinds[n]][: count - len(dots)]

    names = [f"{y}{dot}_bar" for y in results for dot in ("", "_dot")]
    parameters = [*names, *kinds, "needs"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    formula.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind) for n in parameters]
    )
    return formula


def _cotangents(
    ys: list[Tensor],
    bars: Sequence[Any],
    leaves: dict[str, Any],
    given: dict[str, Any],
    wanted: list[str],
    needs: list[bool],
) -> tuple[Any, ...]:
    """Return the cotangents of the names wanted, by two passes of reverse mode.

    Args:
        ys: The results, with their graph; of all streams.
        bars: Cotangents of each result and of its tangent.
        leaves: The inputs that ys are made of, by name.
        given: The tangents by name.
        wanted: Names of inputs, then of tangents.
        needs: Which of them want a cotangent.
    """
    y_bars, y_dot_bars = (flatten(bars[i::2])[0] for i in range(2))
    moving = [
        (n, i, x, dot)
        for n in leaves
        if f"{n}_dot" in given
        for i, (x, dot) in enumerate(
            zip(flatten([leaves[n]])[0], flatten([given[f"{n}_dot"]])[0], strict=False)
        )
        if dot is not None
    ]
    first = torch.autograd.grad(
        ys,
        [x for _, _, x, _ in moving],
        [bar.to(y) for bar, y in zip(y_dot_bars, ys, strict=True)],
        create_graph=True,
        materialize_grads=True,
    )
    found: dict[str, Any] = {}
    for (n, i, _, _), bar in zip(moving, first, strict=True):
        found.setdefault(f"{n}_dot", {})[i] = bar.detach()
    outputs = [
        (y, bar)
        for y, bar in (
            *((y, bar.to(y)) for y, bar in zip(ys, y_bars, strict=True)),
            *((bar, dot.to(bar)) for (*_, dot), bar in zip(moving, first, strict=True)),
        )
        if y.requires_grad
    ]
    names = [n for n, needed in zip(wanted, needs, strict=True) if needed and n in leaves]
    xs = [(n, i, x) for n in names for i, x in enumerate(flatten([leaves[n]])[0]) if x is not None]
    if xs:
        second = torch.autograd.grad(
            [y for y, _ in outputs],
            [x for _, _, x in xs],
            [bar for _, bar in outputs],
            materialize_grads=True,
        )
        for (n, i, _), bar in zip(xs, second, strict=True):
            found.setdefault(n, {})[i] = bar
    return tuple([_shaped(found.get(n), leaves[n.removesuffix("_dot")]) for n in wanted])


def _shaped(found: dict[int, Tensor] | None, like: Any) -> Any:
    """Return the cotangents of an input, a list of one for each of its streams."""
    if found is None:
        return None
    if isinstance(like, (list, tuple)):
        return [found.get(i) for i in range(len(like))]
    return found[0]
