"""`recompute()`: activation checkpointing that never computes a tangent twice.

A block that is computed again keeps its arguments for the backward pass and nothing of its inside.
Under forward mode its value and tangent are computed together, once; the backward pass, which goes
through values only, repeats the value alone. `torch.utils.checkpoint` fails inside
`torch.func.jvp`, because what it repeats outside of it saves other tensors than were saved inside.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from mfmjt.kernels import _dual

__all__ = ["recompute"]


def recompute(block: Any, *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Any:
    """Call `block` and keep only its arguments for the backward pass, which calls it again.

    It takes the place of `torch.utils.checkpoint.checkpoint` in a network that is trained by
    MeanFlow: it works inside `torch.func.jvp` and outside, eager and compiled, under autocast and
    in `DistributedDataParallel`. Gradients are those of the values, as everywhere in this package.

    Args:
        block: A module, a method of one, or `functools.partial` of either. Gradients reach its
            parameters and the arguments; another tensor that wants one must become an argument.
        args: Its arguments: tensors and anything else, in nested tuples, lists and dicts.
        preserve_rng_state: Draw the same random numbers the second time, as dropout needs it.
        kwargs: Its arguments by name.

    Returns:
        What the block returns; there is nothing to compute again without gradients. Where tangents
        are differentiable (`differentiable_tangents`) all is kept.

    Raises:
        TypeError: `block` is no module and no method of one.
        RuntimeError: In the backward pass, where a gradient is wanted of a tensor that is neither
            an argument nor a parameter, or where gradients are differentiated.
    """
    if torch.compiler.is_compiling():
        # Compiled, PyTorch's own is right in forward mode, and knows the compiler's random numbers.
        def call(*args: Any, **kwargs: Any) -> Any:  # the compiler wants a function here
            return block(*args, **kwargs)

        return checkpoint(
            call, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )
    while isinstance(block, functools.partial):
        block, args, kwargs = block.func, block.args + args, block.keywords | kwargs
    owner = block if isinstance(block, nn.Module) else getattr(block, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise TypeError(
            f"mfmjt.kernels.recompute needs a module, or a method of one, whose parameters it can "
            f"ask for; got {block!r}. Make it a method of the module that has its layers."
        )
    leaves, layout = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not (torch.is_grad_enabled() and places):
        return block(*args, **kwargs)
    if _dual.are_differentiable() and _dual.levels():  # the graph of tangents has to stay
        return block(*args, **kwargs)
    tensors = [leaves[i] for i in places]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    same = _Surroundings(tensors, preserve_rng_state)

    def again(*values: Tensor) -> list[Tensor]:
        given = list(rest)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        args, kwargs = pytree.tree_unflatten(given, layout)
        with same.restored():
            results = pytree.tree_leaves(block(*args, **kwargs))
        return [y for y in results if isinstance(y, Tensor)]

    with torch.no_grad():
        results, shape = pytree.tree_flatten(block(*args, **kwargs))
    made = [_dual.split(y) for y in results if isinstance(y, Tensor)]
    values = [_dual.split(x)[0] for x in tensors]
    params = [p for p in owner.parameters() if p.requires_grad]
    ys = _Recompute.apply(
        again, params, len(made), *(y.detach() for y, _ in made), *values, *params
    )
    joined = iter([_dual.join(y, y_dot) for y, (_, y_dot) in zip(ys, made, strict=True)])
    return pytree.tree_unflatten(
        [next(joined) if isinstance(y, Tensor) else y for y in results], shape
    )


class _Surroundings:
    """Autocast and random numbers as they are now, for a later time.

    Args:
        tensors: Whose devices count.
        random: Whether random numbers do.
    """

    def __init__(self, tensors: list[Tensor], random: bool) -> None:
        self.device = next((x.device.type for x in tensors if not x.is_cpu), "cpu")
        self.autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in {"cpu", self.device}
            if torch.amp.is_autocast_available(device)
        ]
        self.random = random
        if random:
            self.cpu_state = torch.get_rng_state()
            self.devices, self.states = get_device_states(*tensors)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            if self.random:
                fork = torch.random.fork_rng(self.devices, device_type=self.device)
                stack.enter_context(fork)
                torch.set_rng_state(self.cpu_state)
                set_device_states(self.devices, self.states, device_type=self.device)
            yield


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * (3 + ctx.count)
        kept = ctx.saved_tensors
        if all(bar is None for bar in cotangents):
            return (*nothing, *(None for _ in kept), *(None for _ in ctx.params))
        wanted = ctx.needs_input_grad[len(nothing) :][: len(kept)]
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(wants) for x, wants in zip(kept, wanted, strict=True)
            ]
            ys = ctx.again(*inputs)
        sources = [x for x, wants in zip(inputs, wanted, strict=True) if wants]
        pairs = [
            (y, bar)
            for y, bar in zip(ys, cotangents, strict=True)
            if bar is not None and y.requires_grad
        ]
        _refuse_others([y for y, _ in pairs], [*sources, *ctx.params])
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


def _refuse_others(ys: list[Tensor], known: list[Tensor]) -> None:
    """Raise where the results depend on a leaf that gets no gradient here."""
    places = {id(x) for x in known}
    left, seen = [y.grad_fn for y in ys], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in places:
            raise RuntimeError(
                f"mfmjt.kernels.recompute: the block uses a tensor of shape {tuple(leaf.shape)} "
                "that wants a gradient and is neither its parameter nor an argument. Give it as "
                "an argument."
            )
        left += [n for n, _ in node.next_functions]
