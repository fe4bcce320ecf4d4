"""Dual numbers: a value and its tangent, as PyTorch's forward mode carries them.

PyTorch's own hooks do not serve an op of ours: forward mode through a bare library op gives a
tangent of exactly zero and no error, and `torch.compile` ignores the `jvp` rule of an
`autograd.Function` (both measured on torch 2.13). So a dual number is taken apart (`split`), the op
computes value and tangent on plain tensors, and the results are put together again (`join`).

Reverse mode goes through values only. Tangents are detached, so nothing of them is kept for
backward, and a gradient that arrives at a tangent raises (`refuse_gradient`; `seal` for a tangent
that no library op of ours computed). Inside `differentiable_tangents()` tangents have a graph too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from mfmjt.kernels import _eager

__all__ = [
    "are_differentiable",
    "differentiable_tangents",
    "join",
    "levels",
    "no_tangent",
    "refuse_derivatives",
    "refuse_gradient",
    "seal",
    "split",
]

_JVP = torch._C._functorch.TransformType.Jvp
_NO_TANGENT = (
    "mfmjt.kernels.{op} does not propagate a tangent of its {name}. Differentiate with respect to "
    "the activations only, or use `with mfmjt.kernels.reference():`."
)
_ARRIVED = (
    "A gradient arrived at a tangent, and mfmjt.kernels keep no tape of tangents: detach the "
    "tangent before it enters the loss, or compute it inside "
    "mfmjt.kernels.differentiable_tangents()."
)
_graph_of_tangents = False


@contextlib.contextmanager
def differentiable_tangents() -> Iterator[None]:
    """Keep the graph of tangents inside the block, so that a gradient reaches them.

    For losses of which a derivative of the network is a part, as in LSD and TVM: an op keeps its
    tangents for the backward pass then, which may run outside. Eager calls have formulas of ours;
    compiled ones, those under a mode and those under `accelerate_jvp` are PyTorch's own. An op
    without a gradient of its tangents (`snake`) raises in the backward pass as outside.

    PyTorch's gradient of the tangent of `layer_norm` is wrong (torch 2.13; found by `gradcheck`),
    and so is that of batch statistics. The block computes the first from differentiable pieces, and
    refuses the second.

    Example:
        >>> import torch
        >>> from mfmjt import kernels
        >>> gate = torch.randn(3, requires_grad=True)
        >>> with kernels.differentiable_tangents():
        ...     _, dot = torch.func.jvp(lambda x: kernels.swiglu(x, x), (gate,), (torch.ones(3),))
        >>> dot.sum().backward()
        >>> gate.grad.shape
        torch.Size([3])

    Raises:
        NotImplementedError: `batch_norm` computes statistics of what has a tangent.
    """
    global _graph_of_tangents
    before, _graph_of_tangents = _graph_of_tangents, True
    try:
        with _RightNorms():
            yield
    finally:
        _graph_of_tangents = before


class _RightNorms(TorchFunctionMode):
    """Norms of PyTorch whose tangents have a wrong gradient, computed in another way."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _WRONG_NORMS or levels() == 0 or split(args[0])[1] is None:
            return func(*args, **kwargs)
        return _WRONG_NORMS[func](*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    wide = wide - wide.mean(axes, keepdim=True)
    n = wide * (wide.square().mean(axes, keepdim=True) + eps).rsqrt()
    n = n if weight is None else n * weight
    return (n if bias is None else n + bias).to(input.dtype)


def _refuse_statistics(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "PyTorch's gradient of the tangent of batch_norm and instance_norm is wrong. Use layer "
        "or group norm where a derivative is part of the loss."
    )


def _batch_norm(input: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Tensor:
    given = dict(zip(("weight", "bias", "training"), args, strict=False)) | kwargs
    if given.get("training"):
        _refuse_statistics()
    result: Tensor = F.batch_norm(input, mean, var, *args, **kwargs)
    return result


_WRONG_NORMS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _refuse_statistics,
}
_eager.TRANSPARENT.append(_RightNorms)


def are_differentiable() -> bool:
    """Return True inside a `differentiable_tangents()` block."""
    return _graph_of_tangents


def levels() -> int:
    """Return how many levels of forward mode are open.

    A compiler that traces a call of this must run it instead. It remembers what it has once read
    from a global variable, so that an op called before `torch.func.jvp` in a compiled function
    would make all later ones believe that no tangent is alive: tangents of zero, and no error.
    """
    if forward_ad._current_level < 0:
        return 0
    stack = torch._C._functorch.get_interpreter_stack() or []
    return max(1, sum(s.key() == _JVP for s in stack))


# What torch.compiler.assume_constant_result sets; it would import the compiler.
levels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def split(x: Any) -> tuple[Any, Tensor | None]:
    """Take a dual number apart.

    Returns:
        The value, still on the tape, and the tangent, off it; None where there is no tangent, and
        for what is no tensor.

    Raises:
        NotImplementedError: Forward mode is nested in forward mode.
    """
    count = levels()
    if count == 0 or not isinstance(x, Tensor):
        return x, None
    if count > 1:
        raise NotImplementedError(
            "mfmjt.kernels: nested forward-mode differentiation would lose the outer tangent. "
            "Use `with mfmjt.kernels.reference():` for second derivatives."
        )
    value, tangent = forward_ad.unpack_dual(x, level=0)
    return value, None if tangent is None else tangent.detach()


def join(y: Any, y_dot: Any) -> Any:
    """Return the dual number y + y_dot, or y itself where there is no tangent; or lists of them."""
    if isinstance(y, (list, tuple)):
        return list(map(join, y, y_dot))
    return y if y_dot is None else forward_ad.make_dual(y, y_dot, level=0)


def no_tangent(op: str, name: str) -> NotImplementedError:
    """Return the error that names an input whose tangent the op does not propagate."""
    return NotImplementedError(_NO_TANGENT.format(op=op, name=name))


# --- Gradients of tangents

_library = torch.library.Library("mfmjt", "FRAGMENT")


def _refuse(y_bar: Tensor, y_dot_bar: Tensor, wait: bool) -> Tensor:
    if y_dot_bar.numel():
        arrived = torch.stack(y_dot_bar.aminmax()).any()  # any() alone takes six times as long
        if not wait:
            torch._assert_async(arrived.logical_not(), _ARRIVED)
        elif arrived:
            raise RuntimeError(_ARRIVED)
    return y_bar.clone()


_library.define(
    "refuse_gradient(Tensor y_bar, Tensor y_dot_bar, bool wait) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("refuse_gradient", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mfmjt::refuse_gradient", lambda y_bar, *_: torch.empty_like(y_bar), lib=_library
)


def refuse_gradient(y_bar: Any, *y_dot_bars: Tensor | None) -> Any:
    """Pass the cotangent of a value (a tensor or None) on, unless a gradient is at a tangent.

    The check is an op of its own, because a compiled backward is handed zeros for every tangent
    that leaves the graph: those must pass, and only when it runs can they be told from a gradient.
    There the host does not wait for a GPU's answer, which it would do once an op and step: the GPU
    prints the message when it comes to the check, and fails as by any assertion on the device.

    Raises:
        RuntimeError: The cotangent of a tangent is not zero.
    """
    for y_dot_bar in y_dot_bars:
        if y_dot_bar is not None:
            y_bar = torch.zeros_like(y_dot_bar) if y_bar is None else y_bar
            wait = not _eager.is_intercepted()
            y_bar = torch.ops.mfmjt.refuse_gradient.default(y_bar, y_dot_bar, wait)
    return y_bar


def refuse_derivatives(op: str, instead: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a gradient or a tangent is wanted of an op for inference.

    Raises:
        NotImplementedError: Names the ops to use instead.
    """
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if gradient or any(split(t)[1] is not None for t in tensors):
        raise NotImplementedError(
            f"mfmjt.kernels.{op} is for inference and has no derivatives; an input "
            f"{'requires a gradient' if gradient else 'carries a tangent'}. Use mfmjt.kernels."
            f"{instead}, or torch.no_grad() where no gradient is wanted."
        )


class _Sealed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, y_dot: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return y_dot.detach()

    @staticmethod
    def backward(ctx: Any, y_dot_bar: Tensor | None) -> tuple[Tensor | None, None]:
        return refuse_gradient(None, y_dot_bar), None


def _alias(y: Tensor, y_dot: Tensor) -> Tensor:
    return y_dot.detach()


def _with_tape(keyset: Any, y: Tensor, y_dot: Tensor) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # on to the level below
        with torch._C._AutoDispatchBelowAutograd():
            return _seal_op.redispatch(keyset & torch._C._after_autograd_keyset, y, y_dot)
    if torch.is_grad_enabled() and y.requires_grad:
        return _Sealed.apply(y, y_dot)
    return _alias(y, y_dot)


_library.define("seal(Tensor y, Tensor(a) y_dot) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("seal", _alias, "CompositeExplicitAutograd")
_library.impl("seal", _with_tape, "Autograd", with_keyset=True)
_seal_op = torch.ops.mfmjt.seal.default


def seal(y: Tensor, y_dot: Tensor) -> Tensor:
    """Return the tangent y_dot of y as one whose gradient is refused; both of one shape.

    It is the same memory, attached to y's tape by a node that keeps no tensor and raises when a
    gradient other than zero arrives. An `autograd.Function` alone would lose that node under
    `torch.func.jvp`, whose level has no tape; a library op reaches the level that has one.
    `torch.compile` traces through it and leaves nothing of it in the forward graph.
    """
    return _seal_op(y, y_dot) if torch.is_grad_enabled() else y_dot
