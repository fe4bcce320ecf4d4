"""Our tangents in anyone's network: PyTorch's functions, taken over while a tangent is alive.

`accelerate_jvp` is a torch function mode: it receives every PyTorch function that is called inside
the block. Where no input has a tangent it calls the function and does no more. Where one does:

    F.scaled_dot_product_attention               our `joint_attention`
    F.linear, conv1d, conv2d, conv3d             the function, on the value and on the tangent
    F.multi_head_attention_forward               both
    F.silu, gelu, layer_norm, rms_norm           the function on the value, and on the tangent
        silu, gelu     y_dot = f'(x) x_dot           by the function's own backward kernel, since
        layer_norm     y_dot = w J x_dot             a diagonal Jacobian is symmetric, and so is J
        rms_norm       y_dot = w r (x_dot - n mean(n x_dot)),  n = r x,  r = (mean x^2 + eps)^-1/2
    matmuls and the like, whose derivative       PyTorch's value and tangent, the tangent then
    would keep a tangent for backward            detached from the graph
    anything else                                PyTorch's

So a layer costs two matmuls where PyTorch's forward mode does three (it multiplies by a zero
tangent of the weight), attention has a forward mode, and the graph keeps what it keeps in plain
training. Gradients are those of the values; one that arrives at a tangent raises.

Values are results of PyTorch's function, not of a library op of ours that would give value and
tangent together, so that what follows may be in place (the results of an op that has several may
not), autocast keeps its copies of weights, and a compiler can fuse across.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mfmjt.kernels import _dual
from mfmjt.kernels._op import use_reference, work_dtype
from mfmjt.kernels.joint_attention import joint_attention

__all__ = ["AcceleratedJvp", "accelerate_jvp"]

Route = Callable[..., Any]  # the dual result of a call with a tangent; or raises NotOurs

_WIDEST_HEAD = 256  # that our attention takes on every device

_layer_norm_bar = torch.ops.aten.native_layer_norm_backward.default


class NotOurs(Exception):
    """A call with a tangent that stays PyTorch's; the argument says why."""


def _forward_mode() -> str | None:
    """Return None outside forward mode, "" inside, else why no call can be ours there.

    A compiler that traces a call of this must run it instead (`_dual.levels`).
    """
    if _dual.levels() == 0:
        return None
    if _dual.are_differentiable():
        return "inside kernels.differentiable_tangents()"
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Jvp for level in stack):
        return "inside torch.func.grad, vjp or vmap"
    return "nested forward mode" if len(stack) > 1 else ""


# What torch.compiler.assume_constant_result sets; it would import the compiler.
_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _join(y: Tensor, y_dot: Tensor) -> Tensor:
    return _dual.join(y, _dual.seal(y, y_dot))


def _moves(*arguments: Any) -> bool:
    """Return True if one of the arguments carries a tangent."""
    return any(isinstance(a, Tensor) and _dual.split(a)[1] is not None for a in arguments)


def _detached(result: Any) -> Any:
    """Return PyTorch's result, its tangent detached from the graph."""
    if type(result) is tuple:
        return tuple(map(_detached, result))
    if not (isinstance(result, Tensor) and torch.is_grad_enabled()):
        return result
    y, y_dot = _dual.split(result)
    return result if y_dot is None else _join(y, y_dot)


def _apart(function: Callable[..., Tensor], tangent: Callable[..., Tensor]) -> Route:
    """Return the route of a function of one moving input; `tangent` is of (x, x_dot, *others)."""

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _moves(*args, *kwargs.values()):
            raise NotOurs("tangent of a parameter")
        x, x_dot = _dual.split(input)
        y = function(x, *args, **kwargs)
        with torch.no_grad():
            y_dot = tangent(x.detach(), x_dot, *args, **kwargs).to(y.dtype)
        return _join(y, y_dot)

    return route


def _with_weight(function: Callable[..., Tensor]) -> Route:
    """Return the route of a function that is linear in its input but for a bias."""

    def tangent(
        x: Tensor, x_dot: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return function(x_dot, weight, None, *args, **kwargs)

    return _apart(function, tangent)


_linear = _with_weight(F.linear)


def _gelu_dot(x: Tensor, x_dot: Tensor, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(x_dot, x, approximate=approximate)


def _silu_dot(x: Tensor, x_dot: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(x_dot, x)


_silu_apart = _apart(F.silu, _silu_dot)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        raise NotOurs("in place")
    if input.is_complex():
        raise NotOurs("complex numbers")
    result: Tensor = _silu_apart(input)
    return result


def _layer_norm_dot(
    x: Tensor,
    x_dot: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    work = work_dtype(x)
    x, x_dot, shape = x.to(work), x_dot.to(work), list(normalized_shape)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    mask = [True, False, False]
    y_dot, _, _ = _layer_norm_bar(x_dot, x, shape, mean, rstd, None, None, mask)
    return y_dot if weight is None else y_dot * weight


def _rms_norm_dot(
    x: Tensor,
    x_dot: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    work = work_dtype(x)
    eps = torch.finfo(work).eps if eps is None else eps
    x, x_dot, axes = x.to(work), x_dot.to(work), tuple(range(-len(normalized_shape), 0))
    r = torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    n = x * r
    y_dot = r * (x_dot - n * (n * x_dot).mean(axes, keepdim=True))
    return y_dot if weight is None else y_dot * weight


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    reasons = {
        "attn_mask": attn_mask is not None,
        "dropout": dropout_p > 0,
        "is_causal": is_causal,
        "not (B, H, N, D)": not (query.ndim == key.ndim == value.ndim == 4),
        "queries and keys of different numbers": not (
            query.shape[:2] == key.shape[:2] == value.shape[:2]
        ),
        "values of a width of their own": not (query.shape[-1] == key.shape[-1] == value.shape[-1]),
        "no key": key.shape[-2] == 0,
        f"heads wider than {_WIDEST_HEAD}": query.shape[-1] > _WIDEST_HEAD,
    }
    _leave(reasons)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return joint_attention(q, k, v, scale=scale).transpose(1, 2)


def _leave(reasons: dict[str, bool]) -> None:
    """Raise NotOurs with the first reason that holds."""
    for why, holds in reasons.items():
        if holds:
            raise NotOurs(why)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward).parameters
_MULTI_HEAD_NAMES = tuple(_MULTI_HEAD)
_MULTI_HEAD_DEFAULTS = {n: p.default for n, p in _MULTI_HEAD.items() if p.default is not p.empty}
_MORE_KEYS = ("bias_k", "bias_v", "static_k", "static_v")


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    # What inspect.Signature.bind does, in words that a compiler traces
    given = {**_MULTI_HEAD_DEFAULTS, **dict(zip(_MULTI_HEAD_NAMES, args, strict=False)), **kwargs}
    query, key, value = inputs = given.pop("query"), given.pop("key"), given.pop("value")
    heads = given["num_heads"]
    reasons = {
        "tangent of a parameter": _moves(*given.values()),
        "need_weights=True": given["need_weights"],
        "attn_mask": given["attn_mask"] is not None or given["key_padding_mask"] is not None,
        "dropout": given["dropout_p"] > 0 and given["training"],
        "keys beyond those given": given["add_zero_attn"]
        or any(given[name] is not None for name in _MORE_KEYS),
        "not (N, B, C)": query.ndim != 3,
        f"heads wider than {_WIDEST_HEAD}": query.shape[-1] // heads > _WIDEST_HEAD,
    }
    _leave(reasons)
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if query is key is value and weight is not None:
        qkv = _linear(query, weight, bias).chunk(3, -1)
    else:
        separate = (given[f"{name}_proj_weight"] for name in "qkv")
        weights = separate if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        layers = zip(inputs, weights, biases, strict=True)
        qkv = [(_linear if _moves(x) else F.linear)(x, *layer) for x, *layer in layers]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in qkv)
    o = joint_attention(q, k, v).transpose(0, 1).flatten(2)
    return _linear(o, given["out_proj_weight"], given["out_proj_bias"]), None


_ROUTES: dict[Any, tuple[str, Route]] = {
    F.linear: ("linear", _linear),
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", _attention),
    F.multi_head_attention_forward: ("multi_head_attention_forward", _multi_head_attention),
    F.conv1d: ("conv1d", _with_weight(F.conv1d)),
    F.conv2d: ("conv2d", _with_weight(F.conv2d)),
    F.conv3d: ("conv3d", _with_weight(F.conv3d)),
    F.silu: ("silu", _silu),
    F.gelu: ("gelu", _apart(F.gelu, _gelu_dot)),
    F.layer_norm: ("layer_norm", _apart(F.layer_norm, _layer_norm_dot)),
    F.rms_norm: ("rms_norm", _apart(F.rms_norm, _rms_norm_dot)),
    # What a compiler makes of the two.
    torch.layer_norm: ("layer_norm", _apart(torch.layer_norm, _layer_norm_dot)),
    torch.rms_norm: ("rms_norm", _apart(torch.rms_norm, _rms_norm_dot)),
}
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

# Functions whose forward derivative would keep tangents for backward, by their names in torch,
# torch.Tensor and torch.nn.functional. None returns its input or a view of it.
_NAMES = (
    "mul div true_divide pow __rdiv__ __rtruediv__ __rpow__ matmul mm bmm addmm baddbmm einsum "
    "addcmul addcdiv lerp square sqrt rsqrt reciprocal exp log sin cos tanh sigmoid relu softplus "
    "elu leaky_relu mish hardswish softmax log_softmax glu group_norm instance_norm batch_norm "
    "normalize conv_transpose1d conv_transpose2d"
)
_KEEP_TANGENTS = {
    getattr(owner, name)
    for owner in (torch, Tensor, F)
    for name in _NAMES.split()
    if hasattr(owner, name)
}


class AcceleratedJvp(TorchFunctionMode):
    """The block that `accelerate_jvp` opens, and the report of what happened in it.

    Only calls with a tangent count (all calls, where forward mode is nested in another derivative).
    Under `torch.compile` they count when they are traced.

    Attributes:
        taken: Calls that were ours, by name of the function.
        left: Calls that stayed PyTorch's, by (name of the function, reason).
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, int] = {}
        self.left: dict[tuple[str, str], int] = {}

    def __str__(self) -> str:
        rows = [("function", "calls", "computed by")]
        rows += [(name, str(count), "mfmjt") for name, count in sorted(self.taken.items())]
        left = sorted(self.left.items())
        rows += [(name, str(count), f"PyTorch: {why}") for (name, why), count in left]
        if len(rows) == 1:
            return "No function was called with a tangent."
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is Tensor.unflatten:  # which a compiler cannot trace from inside a mode
            func = torch.unflatten
        obstacle = _forward_mode()
        if obstacle is None:
            return func(*args, **kwargs)
        if func in _ROUTES:
            return self._route(func, args, kwargs, obstacle)
        result = func(*args, **kwargs)
        # A compiled backward keeps what it needs, and a gradient of a tangent needs nothing.
        if func not in _KEEP_TANGENTS or obstacle or torch.compiler.is_compiling():
            return result
        return result if args and result is args[0] else _detached(result)

    def _route(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        name, route = _ROUTES[func]
        obstacle = "inside kernels.reference()" if use_reference() else why
        if not (obstacle or _moves(*args, *kwargs.values())):
            return func(*args, **kwargs)
        try:
            if obstacle:
                raise NotOurs(obstacle)
            result = route(*args, **kwargs)
        except NotOurs as left:
            reason = left.args[0]
        else:
            self.taken[name] = self.taken.get(name, 0) + 1
            return result
        self.left[name, reason] = self.left.get((name, reason), 0) + 1
        if func in _ATTENTION:  # PyTorch's fused kernels have no forward mode
            with sdpa_kernel(SDPBackend.MATH):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return result if obstacle or torch.compiler.is_compiling() else _detached(result)


def accelerate_jvp() -> AcceleratedJvp:
    """Give any network the tangents of this package, unchanged, inside a `with` block.

    While a tangent is alive (in `torch.func.jvp` or a `torch.autograd.forward_ad.dual_level`),
    these functions of `torch.nn.functional`, and the modules that call them, propagate it by our
    rules: linear, scaled_dot_product_attention, conv1d, conv2d, conv3d, layer_norm, rms_norm, silu,
    gelu, multi_head_attention_forward. A layer then costs two products instead of three, attention
    has a forward mode, and backward keeps no tangent. Calls without a tangent are PyTorch's own,
    bit for bit. What we do not take stays PyTorch's: masked, causal, grouped-query or dropout
    attention goes through its math backend; a tangent of a weight, nested forward mode, and
    forward mode inside `torch.func.grad` or `vmap` are left as they are.

    Works eagerly, and with `torch.compile(fullgraph=True)`, opened inside or around what is
    compiled. Gradients are those of the values; detach the tangent before it enters the loss.

    Returns:
        A context manager that gives itself, a report: `print(report)` is a table of what was taken
        and what was left, and why.

    Raises:
        RuntimeError: In the backward pass, where a gradient arrives at a tangent.
    """
    return AcceleratedJvp()
