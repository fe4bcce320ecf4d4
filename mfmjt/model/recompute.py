"""Activation checkpointing that never computes a tangent twice.

A block that recomputes keeps its inputs for the backward pass and nothing of its inside. Under
forward mode its value and tangent are computed together, once; the backward pass, which goes
through values only, repeats the value alone. `torch.utils.checkpoint` fails inside
`torch.func.jvp`, because what it repeats outside of it saves other tensors than were saved inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfmjt.kernels import _op

__all__ = ["recomputable"]


def recomputable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `forward` of a module that has a flag `recompute`.

    While the flag is set and gradients are wanted, the call keeps only its arguments: tensors in
    nested tuples, None elsewhere. It is the inside of the module that is wrapped, so that hooks of
    FSDP, which fetch its weights, run before the first computation and before the second.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return forward(self, *args)
        leaves, layout = pytree.tree_flatten(args)
        device = next(x.device.type for x in leaves if isinstance(x, Tensor))
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def again(*values: Tensor | None) -> list[Any]:
            with torch.autocast(device, autocast[1], enabled=autocast[0]):
                results = pytree.tree_leaves(forward(self, *pytree.tree_unflatten(values, layout)))
            return [y for y in results if y is not None]

        with torch.no_grad():
            results, shape = pytree.tree_flatten(forward(self, *args))
        made = [_op.split(y) for y in results if y is not None]
        values = [_op.split(x)[0] for x in leaves]
        params = [p for p in self.parameters() if p.requires_grad]
        ys = _Recompute.apply(
            again, params, len(made), *(y.detach() for y, _ in made), *values, *params
        )
        joined = iter([_op.join(y, y_dot) for y, (_, y_dot) in zip(ys, made, strict=True)])
        return pytree.tree_unflatten([None if y is None else next(joined) for y in results], shape)

    return wrapped


class _Recompute(torch.autograd.Function):
    """Results that are there already, whose gradients are found by computing them again.

    Arguments: what computes the results, its parameters, the number of results, the results, the
    inputs, and the parameters again, for the graph.
    """

    @staticmethod
    def forward(
        again: Callable[..., Any], params: list[Tensor], count: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        again, params, count, *tensors = inputs
        ctx.again, ctx.params, ctx.count = again, params, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count : len(tensors) - len(params)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * (3 + ctx.count)
        kept = ctx.saved_tensors
        if all(bar is None for bar in cotangents):
            return (*nothing, *(None for _ in kept), *(None for _ in ctx.params))
        wanted = ctx.needs_input_grad[len(nothing) :][: len(kept)]
        with torch.enable_grad():
            inputs = [
                x if x is None else x.detach().requires_grad_(wants)
                for x, wants in zip(kept, wanted, strict=True)
            ]
            ys = ctx.again(*inputs)
        sources = [x for x, wants in zip(inputs, wanted, strict=True) if wants]
        pairs = [
            (y, bar)
            for y, bar in zip(ys, cotangents, strict=True)
            if bar is not None and y.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [*sources, *ctx.params],
                [bar for _, bar in pairs],
                allow_unused=True,
            )
        )
        of_inputs = [next(found) if wants else None for wants in wanted]
        return (*nothing, *of_inputs, *found)
