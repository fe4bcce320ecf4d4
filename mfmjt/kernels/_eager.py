"""A shortcut for eager calls: plain tensors go straight to the kernel.

On the way to a kernel of some microseconds lie layers that cost several times as much: functorch's,
which wraps and unwraps every tensor of every call of PyTorch, the dispatcher's, and reverse mode by
torch.library. Where nobody watches and all tensors are plain, all they do is done here at once: the
op runs outside functorch, on the device's kernel, with one `autograd.Function` for its gradient.

Nothing depends on this file: with `ENABLED` false every call takes the library op, and gives the
same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = ["ENABLED", "Direct", "call", "flatten", "is_intercepted", "nest", "run"]

try:  # PyTorch's own and private: where any of it has gone, there is no shortcut
    from torch._C import (
        _any_requires_grad,
        _get_function_stack_at,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import (
        _wrap_for_grad,
        get_unwrapped,
        maybe_current_level,
        maybe_get_level,
        peek_interpreter_stack,
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
    from torch._VF import _make_dual, _unpack_dual

    _KNOWN = True
except ImportError:
    _KNOWN = False
ENABLED = _KNOWN

_JVP = torch._C._functorch.TransformType.Jvp
_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
TRANSPARENT: list[type] = [DeviceContext]
"""Function modes that need not see what is called on tensors."""


def is_intercepted() -> bool:
    """Return True if a dispatch mode, function mode or tracer must see this call.

    Modes of `TRANSPARENT` do not count, such as `with torch.device(...)`. True as well if this
    PyTorch lacks the private functions that tell.
    """
    if not _KNOWN:
        return True
    modes = map(_get_function_stack_at, range(_len_torch_function_stack()))
    watched = any(type(mode) not in TRANSPARENT for mode in modes)
    return watched or _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


def run(op: Any, args: tuple[Any, ...], graphed: bool = False) -> tuple[Any, ...] | None:
    """Run an op outside functorch, on its device's kernel.

    Unwraps all inputs once, leaves the level of `torch.func.jvp`, computes on plain tensors,
    re-enters, and wraps the results as duals.

    Args:
        op: An `_op.Op`.
        args: Its arguments, tensors dual or not; a list of tensors for several streams.
        graphed: Tangents have a graph, which `op.graphed` goes on with.

    Returns:
        The op's results, or None, and nothing has been done, where a shortcut is not safe: anything
        but one plain `torch.func.jvp` is open, a mode or a tracer watches, an input is a subclass,
        sparse, complex, of a finished transform, or on another device than the rest.

    Raises:
        NotImplementedError: An input that must not move carries a tangent.
    """
    level = maybe_current_level() if ENABLED else 0
    if level is not None and (level != 1 or peek_interpreter_stack().key() != _JVP):
        return None
    watched = _len_torch_function_stack() or _len_torch_dispatch_stack() or _get_tracing_state()
    if watched and is_intercepted():
        return None
    flat, sizes = flatten(args) if op.lists else (args, None)
    plain = _plain(flat, level, graphed)
    if plain is None:
        return None
    values, dots, device = plain
    if sizes is not None:
        values, dots = nest(values, sizes), None if dots is None else nest(dots, sizes)
    if dots is not None and any(dots[i] is not None for i in op.fixed_places):
        op.refuse_tangents(dots)
    opened = None if level is None else pop_dynamic_layer_stack()
    try:
        ys, y_dots = _compute(op, values, dots, device, graphed)
    finally:
        if opened is not None:
            push_dynamic_layer_stack(opened)
    if y_dots is None and level is None:
        return ys
    if y_dots is None:
        return tuple([_wrapped(y) for y in ys])
    return tuple([_joined(*pair) for pair in zip(ys, y_dots, strict=True)])


def _plain(
    flat: Sequence[Any], level: int | None, graphed: bool = False
) -> tuple[Sequence[Any], Sequence[Any] | None, str] | None:
    """Return values and tangents without functorch's wrappers, and "cpu" or "cuda".

    The tangents are None where nothing moves. Returns None where more than the device's kernel must
    see these arguments.
    """
    forward = level is not None or forward_ad._current_level >= 0
    values: Sequence[Any] = list(flat) if forward else flat
    dots: Any = None
    place: Any = None
    for i, x in enumerate(flat):
        if not isinstance(x, Tensor):
            continue
        if forward and type(x) in _PLAIN:
            dot = None
            if level is None:
                value, dot = _unpack_dual(x, level=0)
                x = x if dot is None else value
            elif maybe_get_level(x) == 1 and not x.requires_grad:
                dot = _unpack_dual(x, level=0)[1]
                x = get_unwrapped(x)
            values[i] = x  # type: ignore[index]
            if dot is not None:
                dot = get_unwrapped(dot) if maybe_get_level(dot) == 1 else dot
                if maybe_get_level(dot) != -1 or type(dot) not in _PLAIN:
                    return None
                if (
                    dot.requires_grad and not graphed
                ):  # what is detached in here is functorch's again
                    dot = dot.detach()
                    dot = get_unwrapped(dot) if maybe_get_level(dot) == 1 else dot
                dots = [None] * len(flat) if dots is None else dots
                dots[i] = dot
        if (
            type(x) not in _PLAIN
            or x.layout is not _STRIDED
            or maybe_get_level(x) != -1
            or x.is_complex()
        ):
            return None
        where = "cpu" if x.is_cpu else x.device
        place = where if place is None else place
        if where != place:
            return None
    if place == "cpu":
        return values, dots, "cpu"
    return (values, dots, "cuda") if place is not None and place.type == "cuda" else None


def _wrapped(y: Any) -> Any:
    """Return a result, or the list of its streams, as tensors of functorch's level."""
    return [_wrapped(x) for x in y] if isinstance(y, list) else _wrap_for_grad(y, 1)


def _joined(y: Any, y_dot: Any) -> Any:
    """Return a result, or the list of its streams, as dual numbers."""
    if isinstance(y, list):
        return [_joined(*pair) for pair in zip(y, y_dot, strict=True)]
    return _make_dual(y, y_dot, level=0)


def _compute(
    op: Any, values: Sequence[Any], dots: Sequence[Any] | None, device: str, graphed: bool
) -> tuple[tuple[Any, ...], Any]:
    """Return the results and their tangents, None where nothing moves."""
    if dots is None and op.plain is not None and forward_ad._current_level >= 0:  # not asked yet
        ys = op.by_pytorch(values)
        if ys is not None:
            return ys, None
    if op.autocasts:
        values, dots = op.cast(values, dots)
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # inside, the op chooses dtypes
            return _compute(op, values, dots, device, graphed)
    part, args = op.fwd, values
    if dots is not None:
        both = (*values, *dots)
        part, args = op.graphed if graphed else op.jvp, [both[i] for i in op.order]
    on_cpu = device == "cpu"
    if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
        outputs: Any = part.pick(on_cpu, args)(*args)
    elif not op.lists:
        outputs = Direct.apply(part, on_cpu, None, None, *args)
    else:
        flat, sizes = flatten(args)
        lengths: list[Any] = []
        outputs = tuple(nest(Direct.apply(part, on_cpu, sizes, lengths, *flat), lengths))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if dots is None:
        return outputs[: part.count], None
    return outputs[: part.count : 2], outputs[1 : part.count : 2]


class Direct(torch.autograd.Function):
    """A part of an op on plain tensors, in place of what torch.library would put on the tape.

    Arguments: the part, whether it is on a CPU, the lengths of its lists of streams (None if it has
    none), a list that receives those of its results, and its arguments, lists flat.
    """

    @staticmethod
    def forward(ctx: Any, part: Any, on_cpu: bool, sizes: Any, lengths: Any, *flat: Any) -> Any:
        args = flat if sizes is None else nest(flat, sizes)
        outputs = part.pick(on_cpu, args)(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        part.keep(ctx, args, outputs)
        ctx.part, ctx.sizes, ctx.lengths = part, sizes, lengths
        results = outputs[: part.count]
        if sizes is None:
            return results
        flat_results, lengths[:] = flatten(results)
        return tuple(flat_results)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        wanted: Any = ctx.needs_input_grad[4:]
        if ctx.sizes is not None:
            bars, wanted = tuple(nest(bars, ctx.lengths)), nest(wanted, ctx.sizes)
        found = ctx.part.backward(ctx, bars, wanted)
        if ctx.sizes is not None:
            found, _ = flatten(found, ctx.sizes)
        return None, None, None, None, *found


def flatten(args: Sequence[Any], sizes: Any = None) -> tuple[list[Any], list[int | None]]:
    """Return arguments with lists laid out one after the other, and the lists' lengths.

    With `sizes`, None may stand for a whole list.
    """
    flat: list[Any] = []
    found: list[int | None] = []
    for i, arg in enumerate(args):
        size = len(arg) if isinstance(arg, (list, tuple)) else None if sizes is None else sizes[i]
        flat += arg if isinstance(arg, (list, tuple)) else [arg] if size is None else [None] * size
        found.append(size)
    return flat, found


def nest(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Undo `flatten`."""
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in sizes]


def call(part: Any, *args: Any) -> Any:
    """Call a part of an op in a backward pass: its kernel, or the library op where one must.

    That also refuses a second derivative, and switches autocast off.
    """
    if not torch.compiler.is_compiling() and ENABLED and maybe_current_level() is None:
        flat = flatten(args)[0] if part.op.lists else args
        plain = None if is_intercepted() else _plain(flat, None)
        taped = torch.is_grad_enabled() and _any_requires_grad(*flat)
        if plain is not None and plain[1] is None and not taped:
            device = plain[2]
            if not torch.is_autocast_enabled(device):
                return part.pick(device == "cpu", args)(*args)
    return part.library(*args)
