"""How an op meets the dispatcher and the two differentiation modes; the only file that knows.

An op is a plain Python *front door*: it takes the dual numbers of its inputs apart (`split`),
calls one opaque library op (`mfmjt::<op>_fwd`, or `mfmjt::<op>_jvp` which computes value and
tangent together) and puts the result together again (`join`). PyTorch's own hooks do not serve:
forward mode through a bare library op gives a tangent of exactly zero and no error, and
`torch.compile` ignores the `jvp` rule of an `autograd.Function` (both measured on torch 2.13).

Reverse mode goes through values only. `split` detaches tangents, so nothing of them is kept for
backward, and a gradient that arrives at a tangent raises.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mfmjt.kernels import _ext, _triton

__all__ = [
    "autocast",
    "backward_of",
    "check",
    "check_tensors",
    "define",
    "join",
    "reference",
    "refuse_gradient",
    "refuse_tangent",
    "split",
    "use_reference",
    "work_dtype",
]

_library = torch.library.Library("mfmjt", "FRAGMENT")
_forced_reference = False


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Let every op of this package run its plain PyTorch reference inside the block."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def use_reference() -> bool:
    """Whether a `reference()` block is open."""
    return _forced_reference


def check(condition: bool, op: str, needs: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the op, what it needs, and the shape and dtype it got."""
    if not condition:
        got = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
            if tensor is not None
        )
        raise ValueError(f"mfmjt.kernels.{op} needs {needs}; got {got}.")


def check_tensors(op: str, optional: dict[str, Any] | None = None, /, **tensors: Any) -> None:
    """Raise a TypeError that names what is no tensor, or no tuple of tensors."""
    given = tensors | {n: t for n, t in (optional or {}).items() if t is not None}
    for name, value in given.items():
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, Tensor):
                what = type(x).__name__
                raise TypeError(f"mfmjt.kernels.{op} needs {name} to be a tensor; got {what}.")


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast to autocast's dtype where it is on, as PyTorch does for its own matrix products.

    Arguments and results are tensors or None.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _levels() -> int:
    """How many levels of forward mode are open.

    A compiler that traces a call of this must run it instead. It remembers what it has once read
    from a global variable, so that an op called before `torch.func.jvp` in a compiled function
    would make all later ones believe that no tangent is alive: tangents of zero, and no error.
    """
    if forward_ad._current_level < 0:
        return 0
    stack = torch._C._functorch.get_interpreter_stack() or []
    return max(1, sum(s.key() == _JVP for s in stack))


# What torch.compiler.assume_constant_result sets; it would import the compiler.
_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def split(x: Tensor | None) -> tuple[Any, Tensor | None]:
    """Take a dual number apart.

    Returns:
        The value, still on the tape, and the tangent, off it; None where there is no tangent.

    Raises:
        NotImplementedError: Forward mode is nested in forward mode.
    """
    levels = _levels()
    if levels == 0 or x is None:
        return x, None
    if levels > 1:
        raise NotImplementedError(
            "mfmjt.kernels: nested forward-mode differentiation would lose the outer tangent. "
            "Use `with mfmjt.kernels.reference():` for second derivatives."
        )
    value, tangent = forward_ad.unpack_dual(x, level=0)
    return value, None if tangent is None else tangent.detach()


_JVP = torch._C._functorch.TransformType.Jvp


def join(y: Tensor, y_dot: Tensor | None) -> Tensor:
    """Make the dual number y + y_dot; y itself where there is no tangent."""
    return y if y_dot is None else forward_ad.make_dual(y, y_dot, level=0)


def refuse_tangent(op: str, **tensors: Tensor | None) -> None:
    """Raise if an input carries a tangent that the op does not propagate.

    Raises:
        NotImplementedError: Names the op and the input.
    """
    if _levels() == 0:
        return
    for name, tensor in tensors.items():
        if split(tensor)[1] is not None:
            raise NotImplementedError(
                f"mfmjt.kernels.{op} does not propagate a tangent of its {name}. "
                f"Differentiate with respect to the activations only, or use "
                f"`with mfmjt.kernels.reference():`."
            )


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the library op `mfmjt::<schema>`.

    Args:
        schema: Name and signature in PyTorch's schema language.
        implementation: Computes the result with ATen operations on any device. Results are
            contiguous and alias neither an argument nor one another.
        fake: Gives results of the right shape without data. Default: `implementation`, which then
            must not look at values.
        cpu: Takes the place of `implementation` on the CPU. Default: the C++ kernel, where built.
        triton: Launches the Triton kernel: takes its place on a GPU, and on the CPU too where
            TRITON_INTERPRET is set.

    Returns:
        The op, to be called with positional arguments.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.mfmjt, name).default
    names = [argument.name for argument in op._schema.arguments]

    def guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return _checked(name, names, _without_autocast(kernel))

    _library.impl(name, guarded(implementation), "CompositeExplicitAutograd")
    if triton is not None and _triton.AVAILABLE:
        _library.impl(name, guarded(_on_its_device(triton)), "CUDA")
    if triton is not None and _triton.ON_CPU:
        cpu = triton
    cpu = cpu or _ext.kernel(name, implementation)
    if cpu is not None:
        _library.impl(name, guarded(cpu), "CPU")
    torch.library.register_fake(f"mfmjt::{name}", guarded(fake or implementation), lib=_library)
    return op


def _checked(op: str, names: list[str], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What holds for the arguments of every op; what PyTorch's own functions would read past.

    Tensors are dense, real and on one device (integers may stay on the CPU), and the tangent
    `x_dot` has the shape of `x`.
    """
    tangents = [
        (i, names.index(name[:-4]))
        for i, name in enumerate(names)
        if name.endswith("_dot") and name[:-4] in names
    ]

    def tensors(arg: Any) -> Any:
        return arg if isinstance(arg, (list, tuple)) else (arg,)

    @functools.wraps(implementation)
    def kernel(*args: Any) -> Any:
        first = None
        for name, arg in zip(names, args, strict=True):
            for x in tensors(arg):
                if not isinstance(x, Tensor):
                    continue
                first = x if first is None else first
                if x.device != first.device and (x.is_floating_point() or x.device.type != "cpu"):
                    where = f"on {first.device} as its first argument"
                    raise ValueError(f"mfmjt::{op} needs {name} {where}; got {x.device}.")
                if x.layout is not torch.strided or x.is_complex():
                    got = f"{x.layout}, {x.dtype}".replace("torch.", "")
                    raise ValueError(f"mfmjt::{op} needs {name} dense and real; got {got}.")
        for i, j in tangents:
            for dot, x in zip(tensors(args[i]), tensors(args[j]), strict=True):
                if dot is not None and dot.shape != x.shape:
                    needs = f"{names[i]} of the shape of {names[j]}, {tuple(x.shape)}"
                    raise ValueError(f"mfmjt::{op} needs {needs}; got {tuple(dot.shape)}.")
        return implementation(*args)

    return kernel


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast acts on what enters an op, in its front door; inside, dtypes are chosen."""

    @functools.wraps(implementation)
    def kernel(*args: Any) -> Any:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return implementation(*args)
        return implementation(*args)

    return kernel


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the arguments."""

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        flat = (x for a in args for x in (a if isinstance(a, (list, tuple)) else [a]))
        device = next(x.device for x in flat if isinstance(x, Tensor))
        if device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return launch


def backward_of(
    op: Callable[..., Any],
    backward: Callable[..., Any],
    saves: Callable[..., tuple[Tensor | None, ...]],
    outputs: int,
    constants: Callable[..., Any] | None = None,
) -> None:
    """Attach reverse mode to a library op.

    Args:
        op: What `define` returned.
        backward: (ctx, *cotangents of all results) -> cotangents of all arguments;
            `ctx.saved_tensors` and `ctx.constants` are what was kept. Cotangents that did not
            arrive are None.
        saves: (inputs, output) -> tensors to keep; of values, never of tangents.
        outputs: How many leading results are differentiable; the rest are statistics.
        constants: (inputs) -> what else to keep.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[outputs:])
        ctx.save_for_backward(*saves(inputs, results))
        ctx.constants = None if constants is None else constants(inputs)

    name = op._schema.name  # type: ignore[attr-defined]
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def _refuse(y_bar: Tensor, y_dot_bar: Tensor) -> Tensor:
    if bool(y_dot_bar.any()):
        raise RuntimeError(
            "A gradient arrived at a tangent, and mfmjt.kernels keep no tape of tangents: "
            "detach the tangent before it enters the loss."
        )
    return y_bar.clone()


_refuse_op = define(
    "refuse_gradient(Tensor y_bar, Tensor y_dot_bar) -> Tensor",
    _refuse,
    lambda y_bar, y_dot_bar: torch.empty_like(y_bar),
)


def refuse_gradient(y_bar: Any, *y_dot_bars: Tensor | None) -> Any:
    """Pass the cotangent of a value (a tensor or None) on, unless a gradient is at a tangent.

    The check is an op of its own, because a compiled backward is handed zeros for every tangent
    that leaves the graph: those must pass, and only when it runs can they be told from a gradient.

    Raises:
        RuntimeError: The cotangent of a tangent is not zero.
    """
    for y_dot_bar in y_dot_bars:
        if y_dot_bar is not None:
            y_bar = torch.zeros_like(y_dot_bar) if y_bar is None else y_bar
            y_bar = _refuse_op(y_bar, y_dot_bar)
    return y_bar
