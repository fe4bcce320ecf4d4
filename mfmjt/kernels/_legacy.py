"""How an op meets the dispatcher and the two differentiation modes; the only file that knows.

An op is a plain Python *front door*: `dual` takes the dual numbers of its inputs apart, calls one
opaque library op (`mfmjt::<op>_fwd`, or `mfmjt::<op>_jvp` which computes value and tangent
together) and puts the results together again. PyTorch's own hooks do not serve: forward mode
through a bare library op gives a tangent of exactly zero and no error, and `torch.compile` ignores
the `jvp` rule of an `autograd.Function` (both measured on torch 2.13).

Reverse mode goes through values only. `dual` detaches tangents, so nothing of them is kept for
backward, and a gradient that arrives at a tangent raises.

On the way to a kernel of some microseconds lie layers that cost several times as much, and both are
left out where nothing would come of them: functorch's, which wraps and unwraps every tensor of
every call (`_below`), and the dispatcher's, where nobody watches and no gradient is wanted
(`_is_plain`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mfmjt.kernels import _native, _triton

__all__ = [
    "autocast",
    "backward_of",
    "check",
    "check_tensors",
    "define",
    "dual",
    "is_watched",
    "join",
    "reference",
    "refuse_gradient",
    "refuse_tangent",
    "split",
    "use_reference",
    "work_dtype",
]

_library = torch.library.Library("mfmjt", "FRAGMENT")
_native_library = torch.library.Library("mfmjt_cpu", "FRAGMENT")  # what csrc/ has


from mfmjt.kernels._op import autocast, check, check_tensors, reference, use_reference, work_dtype  # noqa


def _levels() -> int:
    """How many levels of forward mode are open.

    A compiler that traces a call of this must run it instead. It remembers what it has once read
    from a global variable, so that an op called before `torch.func.jvp` in a compiled function
    would make all later ones believe that no tangent is alive: tangents of zero, and no error.
    """
    if forward_ad._current_level < 0:
        return 0
    if _functorch is not None and _functorch.maybe_current_level() in (None, 1):
        return 1
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
            raise NotImplementedError(_NO_TANGENT.format(op=op, name=name))


_NO_TANGENT = (
    "mfmjt.kernels.{op} does not propagate a tangent of its {name}. Differentiate with respect to "
    "the activations only, or use `with mfmjt.kernels.reference():`."
)


def dual(
    run: Callable[..., Sequence[Any]],
    moving: tuple[Tensor, ...],
    op: str = "",
    still: dict[str, Tensor | None] | None = None,
) -> Sequence[Any]:
    """Call an op with its inputs taken apart into values and tangents; put the results together.

    Args:
        run: (values, dots) -> results. `values` are those of the moving inputs, on the tape, and
            then of the still ones; `dots` the tangents of the moving ones, off the tape, None where
            one has none, and it gives y, y_dot, y, y_dot, ... in turn. Where none has one, `dots`
            is None, and it gives the values y alone.
        moving: Inputs that may carry a tangent.
        op: Its name, for messages.
        still: By their names, inputs that must not.

    Returns:
        The results, dual where an input was.

    Raises:
        NotImplementedError: A still input carries a tangent, or forward mode is nested.
    """
    still = still or {}
    if _levels() == 0:
        return run((*moving, *still.values()), None)
    if not torch.compiler.is_compiling():
        results = _below(run, moving, op, still)
        if results is not None:
            return results
    refuse_tangent(op, **still)
    parts = [split(x) for x in moving]
    values = (*(value for value, _ in parts), *still.values())
    dots = [dot for _, dot in parts]
    if all(dot is None for dot in dots):
        return run(values, None)
    ys = run(values, dots)
    return [join(y, y_dot) for y, y_dot in zip(ys[::2], ys[1::2], strict=True)]


# What is PyTorch's own and private. Where any of it has gone, nothing is left out of a call.
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
        "pop_dynamic_layer_stack",
        "push_dynamic_layer_stack",
    ),
}
# Bound once: looking them up in torch._VF takes as long as a call of them.
_make_dual: Any = getattr(torch._VF, "_make_dual", None)
_unpack_dual: Any = getattr(torch._VF, "_unpack_dual", None)
_known = all(hasattr(module, name) for module, names in _PRIVATE.items() for name in names)
_functorch = torch._C._functorch if _known and _make_dual and _unpack_dual else None
_PLAIN = (Tensor, torch.nn.Parameter)


def _below(
    run: Callable[..., Sequence[Any]],
    moving: tuple[Tensor, ...],
    op: str,
    still: dict[str, Tensor | None],
) -> Sequence[Any] | None:
    """What `dual` does, one level below the only one of functorch, on tensors without wrappers.

    functorch would take its wrappers off and put them on again for each call of PyTorch in here.
    That is done once instead, with its level left meanwhile: the op then runs as it does outside of
    `torch.func.jvp`, on the same tensors and the same tape as at functorch's hands.

    Returns:
        None, and nothing has been done, where anything but one plain `torch.func.jvp` is open, or
        where an input is not what that makes: a subclass, of another or a finished transform.
    """
    if (
        _functorch is None
        or _functorch.maybe_current_level() != 1
        or torch._C._functorch.peek_interpreter_stack().key() != _JVP
        or is_watched()
    ):
        return None
    get_level, unwrap = _functorch.maybe_get_level, _functorch.get_unwrapped
    values: list[Tensor | None] = []
    dots: list[Tensor | None] = []
    moves = False
    for x in (*moving, *still.values()):
        value, dot = x, None
        if x is not None:
            if get_level(x) == 1 and type(x) is Tensor and not x.requires_grad:
                value, dot = unwrap(x), _unpack_dual(x, level=0)[1]
            if dot is not None:
                dot = unwrap(dot) if get_level(dot) == 1 else dot
                if get_level(dot) != -1 or type(dot) not in _PLAIN:
                    return None
                moves = True
            if get_level(value) != -1 or type(value) not in _PLAIN:
                return None
        values.append(value)
        dots.append(dot)
    for name in reversed(still):
        if dots.pop() is not None:
            raise NotImplementedError(_NO_TANGENT.format(op=op, name=name))
    level = _functorch.pop_dynamic_layer_stack()
    try:
        if moves:
            dots = [d.detach() if d is not None and d.requires_grad else d for d in dots]
        ys = run(values, dots if moves else None)
    finally:
        _functorch.push_dynamic_layer_stack(level)
    if not moves:
        return [_functorch._wrap_for_grad(y, 1) for y in ys]
    pairs = zip(ys[::2], ys[1::2], strict=True)
    return [y if dot is None else _make_dual(y, dot, level=0) for y, dot in pairs]


def is_watched() -> bool:
    """Whether someone sees every call of PyTorch: a mode other than a default device, a tracer.

    Where PyTorch cannot be asked, someone may.
    """
    if not _known:
        return True
    modes = torch._C._len_torch_function_stack()
    if modes == 1 and type(torch._C._get_function_stack_at(0)) is DeviceContext:
        modes = 0
    return (
        modes > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
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
    fake = guarded(fake or implementation)
    torch.library.register_fake(f"mfmjt::{name}", fake, lib=_library)
    native = None if cpu else _native.native(name)
    if cpu is not None:
        _library.impl(name, guarded(cpu), "CPU")
    if native is None:
        return op
    _library.impl(name, _native.kernel(name, guarded(implementation)), "CPU")
    torch.library.register_fake(f"mfmjt_cpu::{name}", fake, lib=_native_library)
    return _or_straight(op, name, native)


def _or_straight(op: Any, name: str, native: Callable[..., Any]) -> Callable[..., Any]:
    """The op; or its C++ kernel alone, where all that lies between would do nothing.

    Between are the checks of the op, in Python, the dispatcher on either side of them, and reverse
    mode by torch.library, which is dearer than an `autograd.Function`. Compiled code, which is for
    this machine, has the kernel by its own name where no gradient can be wanted.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            straight = not (torch.is_grad_enabled() or torch.compiler.is_exporting())
            plain = straight and all(_is_on_cpu(x) for x in args if isinstance(x, Tensor))
            return native(*args) if plain and _native.takes(name, *args) else op(*args)
        if not (_is_plain(args) and _native.takes(name, *args)):
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return call.taped(*args)  # type: ignore[attr-defined]
        return native(*args)

    call._schema, call.native, call.taped = op._schema, native, op  # type: ignore[attr-defined]
    return call


def _is_on_cpu(x: Tensor) -> bool:
    """Whether a compiler knows of a CPU's memory here, and of nothing that is made of several."""
    return x.device.type == "cpu" and not is_traceable_wrapper_subclass(x)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether these are plain tensors on the CPU, outside of functorch, and nobody watches."""
    if _functorch is None or _functorch.maybe_current_level() is not None or is_watched():
        return False
    for x in args:
        if type(x) in _PLAIN:
            if not x.is_cpu or x.layout is not _STRIDED or _functorch.maybe_get_level(x) != -1:
                return False
        elif isinstance(x, Tensor):
            return False
    return True


_STRIDED = torch.strided


def _checked(op: str, names: list[str], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What holds for the arguments of every op; what PyTorch's own functions would read past.

    Tensors are dense, real and on one device, and the tangent `x_dot` has the shape of `x`.
    """
    tangents = [
        (i, names.index(name[:-4]))
        for i, name in enumerate(names)
        if name.endswith("_dot") and name[:-4] in names
    ]

    def tensors(arg: Any) -> Any:
        return arg if isinstance(arg, (list, tuple)) else (arg,)

    def check_places(args: tuple[Any, ...]) -> None:
        first = None
        for name, arg in zip(names, args, strict=True):
            for x in tensors(arg):
                if not isinstance(x, Tensor):
                    continue
                first = x if first is None else first
                if x.device != first.device:
                    where = f"on {first.device} as its first argument"
                    raise ValueError(f"mfmjt::{op} needs {name} {where}; got {x.device}.")
                if x.layout is not torch.strided or x.is_complex():
                    got = f"{x.layout}, {x.dtype}".replace("torch.", "")
                    raise ValueError(f"mfmjt::{op} needs {name} dense and real; got {got}.")

    @functools.wraps(implementation)
    def kernel(*args: Any) -> Any:
        for x in args:  # the usual, quickly
            if isinstance(x, Tensor):
                if not x.is_cpu or x.layout is not _STRIDED or x.is_complex():
                    check_places(args)
                    break
            elif isinstance(x, (list, tuple)):
                check_places(args)
                break
        for i, j in tangents:
            dots, xs = args[i], args[j]
            one = isinstance(xs, Tensor)
            for dot, x in ((dots, xs),) if one else zip(dots, xs, strict=True):
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
    native = getattr(op, "native", None)
    if native is not None:
        op.taped = _taped(native, backward, setup_context)  # type: ignore[attr-defined]


def _taped(
    native: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """A C++ kernel with reverse mode, what torch.library would do without the dispatcher."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = native(*args)
            setup_context(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            return backward(ctx, *bars)

    return Straight.apply


from mfmjt.kernels._dual import refuse_gradient  # noqa: E402
