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
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = ["ENABLED", "Direct", "call", "flatten", "is_intercepted", "nest", "run"]

# What is PyTorch's own and private. Where any of it has gone, there is no shortcut.
_PRIVATE = {
    torch._C: (
        "_any_requires_grad",
        "_get_function_stack_at",
        "_get_tracing_state",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
    ),
    torch._C._functorch: (
        "_wrap_for_grad",
        "get_unwrapped",
        "maybe_current_level",
        "maybe_get_level",
        "peek_interpreter_stack",
        "pop_dynamic_layer_stack",
        "push_dynamic_layer_stack",
    ),
    torch._VF: ("_make_dual", "_unpack_dual"),
}
_KNOWN = all(hasattr(module, name) for module, names in _PRIVATE.items() for name in names)
ENABLED = _KNOWN

_functorch: Any = torch._C._functorch
# Bound once: looking them up in torch._VF takes as long as a call of them.
_make_dual: Any = getattr(torch._VF, "_make_dual", None)
_unpack_dual: Any = getattr(torch._VF, "_unpack_dual", None)
_JVP = _functorch.TransformType.Jvp
_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_tracer: Any = getattr(torch._C, "_get_tracing_state", None)


def is_intercepted() -> bool:
    """Return True if a dispatch mode, function mode or tracer must see this call.

    `with torch.device(...)` does not count. True as well if this PyTorch lacks the private
    functions that tell.
    """
    if not _KNOWN:
        return True
    modes = torch._C._len_torch_function_stack()
    if modes == 1 and type(torch._C._get_function_stack_at(0)) is DeviceContext:
        modes = 0
    return (
        modes > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def run(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Run an op outside functorch, on its device's kernel.

    Unwraps all inputs once, leaves the level of `torch.func.jvp`, computes on plain tensors,
    re-enters, and wraps the results as duals.

    Args:
        op: An `_op.Op`.
        args: Its arguments, tensors dual or not; a list of tensors for several streams.

    Returns:
        The op's results, or None, and nothing has been done, where a shortcut is not safe: anything
        but one plain `torch.func.jvp` is open, a mode or a tracer watches, an input is a subclass,
        sparse, complex, of a finished transform, or on another device than the rest.

    Raises:
        NotImplementedError: An input that must not move carries a tangent.
    """
    level = _functorch.maybe_current_level() if ENABLED else 0
    if level is not None and (level != 1 or _functorch.peek_interpreter_stack().key() != _JVP):
        return None
    if (_function_modes() or _dispatch_modes() or _tracer() is not None) and is_intercepted():
        return None
    flat, sizes = flatten(args) if op.lists else (args, None)
    moves = level is not None or forward_ad._current_level >= 0
    dots: Any = None
    if moves:
        unwrapped = _unwrapped(flat, level)
        if unwrapped is None:
            return None
        flat, dots, moves = unwrapped
    place: Any = None
    for x in flat:
        if type(x) in _PLAIN:
            where = "cpu" if x.is_cpu else x.device
            place = where if place is None else place
            if (
                where != place
                or x.layout is not _STRIDED
                or _functorch.maybe_get_level(x) != -1
                or x.is_complex()
            ):
                return None
        elif isinstance(x, Tensor):
            return None
    if place != "cpu" and (place is None or place.type != "cuda"):
        return None
    dots = dots if moves else None
    if sizes is not None:
        flat, dots = nest(flat, sizes), None if dots is None else nest(dots, sizes)
    if moves and op.fixed:
        op.refuse_tangents(dots)
    opened = None if level is None else _functorch.pop_dynamic_layer_stack()
    try:
        ys, y_dots = _compute(op, flat, dots, place == "cpu")
    finally:
        if opened is not None:
            _functorch.push_dynamic_layer_stack(opened)
    if y_dots is None and level is None:
        return ys
    if y_dots is None:
        return tuple([_wrapped(y) for y in ys])
    return tuple([_joined(*pair) for pair in zip(ys, y_dots, strict=True)])


def _unwrapped(
    flat: Sequence[Any], level: int | None
) -> tuple[list[Any], list[Tensor | None], bool] | None:
    """Return values and tangents without functorch's wrappers, and whether there is a tangent."""
    get_level, unwrap = _functorch.maybe_get_level, _functorch.get_unwrapped
    values, dots, moves = list(flat), [cast("Tensor | None", None)] * len(flat), False
    for i, x in enumerate(flat):
        if type(x) not in _PLAIN:
            continue
        value, dot = x, None
        if level is None:
            value, dot = _unpack_dual(x, level=0)
            value = x if dot is None else value
        elif get_level(x) == 1 and not x.requires_grad:
            dot = _unpack_dual(x, level=0)[1]
            value = unwrap(x)
        values[i] = value
        if dot is None:
            continue
        dot = unwrap(dot) if get_level(dot) == 1 else dot
        if get_level(dot) != -1 or type(dot) not in _PLAIN:
            return None
        if dot.requires_grad:  # what is detached in here is functorch's again
            dot = dot.detach()
            dot = unwrap(dot) if get_level(dot) == 1 else dot
        dots[i], moves = dot, True
    return values, dots, moves


def _wrapped(y: Any) -> Any:
    """Return a result, or the list of its streams, as tensors of functorch's level."""
    return [_wrapped(x) for x in y] if isinstance(y, list) else _functorch._wrap_for_grad(y, 1)


def _joined(y: Any, y_dot: Any) -> Any:
    """Return a result, or the list of its streams, as dual numbers."""
    if isinstance(y, list):
        return [_joined(*pair) for pair in zip(y, y_dot, strict=True)]
    return _make_dual(y, y_dot, level=0)


def _compute(
    op: Any, values: Sequence[Any], dots: Sequence[Any] | None, on_cpu: bool
) -> tuple[tuple[Any, ...], Any]:
    """Return the results and their tangents, None where nothing moves."""
    device = "cpu" if on_cpu else "cuda"
    if dots is None and op.plain is not None:
        ys = op.by_pytorch(values)
        if ys is not None:
            return ys, None
    if op.autocasts:
        values, dots = op.cast(values, dots)
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # inside, the op chooses dtypes
            return _compute(op, values, dots, on_cpu)
    part, args = (op.fwd, values) if dots is None else (op.jvp, op.order((*values, *dots)))
    if op.required and dots is not None:
        args = op.moved(args)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
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
    """Call a part of an op in a backward pass: its kernel, or the library op where one must."""
    device = None if torch.compiler.is_compiling() else _plain_device(args)
    if device is None:
        return part.library(*args)
    if not torch.is_autocast_enabled(device):
        return part.pick(device == "cpu", args)(*args)
    with torch.autocast(device, enabled=False):
        return part.pick(device == "cpu", args)(*args)


def _plain_device(args: tuple[Any, ...]) -> str | None:
    """Return "cpu" or "cuda" if nothing but the kernel has to see these arguments."""
    if not ENABLED or _functorch.maybe_current_level() is not None or is_intercepted():
        return None
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return None  # a second derivative, which the library op refuses
    place: Any = None
    for arg in args:
        for x in arg if isinstance(arg, (list, tuple)) else (arg,):
            if not isinstance(x, Tensor):
                continue
            plain = type(x) in _PLAIN and x.layout is _STRIDED and not x.is_complex()
            if not plain or _functorch.maybe_get_level(x) != -1:
                return None
            where = "cpu" if x.is_cpu else x.device
            place = where if place is None else place
            if where != place:
                return None
    return (
        "cpu" if place == "cpu" else "cuda" if place is not None and place.type == "cuda" else None
    )
