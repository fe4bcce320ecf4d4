"""Our tangents in anyone's network: PyTorch's functions, taken over while a tangent is alive.

`accelerate_jvp` is a torch function mode: it receives every PyTorch function that is called inside
the block. Where no input has a tangent it calls the function and does no more. Where one does:

    F.scaled_dot_product_attention               our `joint_attention`
    F.linear, conv1d, conv2d, conv3d,            the function, on the value and on the tangent
    F.conv_transpose1d, 2d, 3d
    matmul, mm, bmm, addmm, baddbmm, einsum      likewise, where one factor moves
    F.multi_head_attention_forward               attention and `linear`
    F.batch_norm of running statistics           the function on the value, and on the tangent
    F.silu, gelu, layer_norm, rms_norm,          the function on the value, and on the tangent
    F.group_norm
        silu, gelu     y_dot = f'(x) x_dot           by the function's own backward kernel, since
        layer_norm,    y_dot = w J x_dot             a diagonal Jacobian is symmetric, and so is J
        group_norm
        rms_norm       y_dot = w r (x_dot - n mean(n x_dot)),  n = r x,  r = (mean x^2 + eps)^-1/2
    matmuls of two that move and the like, whose PyTorch's value and tangent, the tangent then
    derivative would keep a tangent              detached from the graph
    anything else                                PyTorch's

So a layer costs two matmuls where PyTorch's forward mode does three (it multiplies by a zero
tangent of the weight), attention has a forward mode, and the graph keeps what it keeps in plain
training. Gradients are those of the values; one that arrives at a tangent raises.

Values are results of PyTorch's function, not of a library op of ours that would give value and
tangent together, so that what follows may be in place (the results of an op that has several may
not), autocast keeps its copies of weights, and a compiler can fuse across.
"""

from __future__ import annotations

import functools
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
_group_norm_bar = torch.ops.aten.native_group_norm_backward.default


class NotOurs(Exception):
    """A call with a tangent that stays PyTorch's; the argument says why."""


class NotCounted(Exception):
    """A call whose tangent costs PyTorch what it would cost us."""


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
    """Return True if one of the arguments, or of a list among them, carries a tangent."""
    return any(
        _moves(*a) if isinstance(a, (list, tuple)) else _dual.split(a)[1] is not None
        for a in arguments
    )


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


def _group_norm_dot(
    x: Tensor,
    x_dot: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    work = work_dtype(x)
    x, x_dot = (t.to(work).contiguous() for t in (x, x_dot))
    sizes = x.shape[0], x.shape[1], x[0, 0].numel(), num_groups
    _, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
    y_dot, _, _ = _group_norm_bar(x_dot, x, mean, rstd, None, *sizes, [True, False, False])
    return y_dot if weight is None else y_dot * _of_channels(weight, x)


def _of_channels(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (x.ndim - 2))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_var is None:
        raise NotOurs("statistics of the batch")

    def tangent(x: Tensor, x_dot: Tensor, mean: Tensor, var: Tensor, *others: Any) -> Tensor:
        r = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        return x_dot * _of_channels(r, x)

    route = _apart(F.batch_norm, tangent)
    y: Tensor = route(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return y


def _product(function: Callable[..., Tensor], first: int) -> Route:
    """Return the route of a product of its arguments from the first on; what precedes is added."""

    def route(*args: Any, **kwargs: Any) -> Tensor:
        if function is torch.einsum and isinstance(args[1], (list, tuple)):
            args = args[0], *args[1]
        values, dots = zip(*map(_dual.split, args), strict=True)
        moving = [i for i in range(first, len(args)) if dots[i] is not None]
        if len(moving) != 1:
            raise NotCounted
        y = function(*values, **kwargs)
        with torch.no_grad():
            given = [v.detach() if isinstance(v, Tensor) else v for v in values]
            given[moving[0]] = dots[moving[0]]
            if first and isinstance(values[0], Tensor):
                given[0] = y.new_zeros(()) if dots[0] is None else dots[0]
            y_dot = function(*given, **kwargs).to(y.dtype)
        return _join(y, y_dot)

    return route


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
    given = query, key, value
    _leave(
        {
            "tangent of attn_mask": _moves(attn_mask),
            "dropout": dropout_p > 0,
            "not (B, H, N, D)": {x.ndim for x in given} not in ({4}, {3}),
        }
    )
    if query.ndim == 3:  # no heads
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else attn_mask[:, None]
        query, key, value = (x[:, None] for x in given)
        return _attention(query, key, value, mask, 0.0, is_causal, scale)[:, 0]
    heads, of_keys = query.shape[1], max(1, key.shape[1])
    _leave(
        {
            "samples or heads of different numbers": not (
                query.shape[0] == key.shape[0]
                and key.shape[:2] == value.shape[:2]
                and (heads == of_keys or (enable_gqa and heads % of_keys == 0))
            ),
            "no key": key.shape[2] == 0,
            f"heads wider than {_WIDEST_HEAD}": max(query.shape[3], value.shape[3]) > _WIDEST_HEAD,
        }
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return joint_attention(q, k, v, scale, None, mask, is_causal).transpose(1, 2)


def _leave(reasons: dict[str, bool]) -> None:
    """Raise NotOurs with the first reason that holds."""
    for why, holds in reasons.items():
        if holds:
            raise NotOurs(why)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward).parameters
_MULTI_HEAD_NAMES = tuple(_MULTI_HEAD)
_MULTI_HEAD_DEFAULTS = {n: p.default for n, p in _MULTI_HEAD.items() if p.default is not p.empty}
_MORE_KEYS = ("bias_k", "bias_v", "static_k", "static_v")


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    # What inspect.Signature.bind does, in words that a compiler traces
    given = {**_MULTI_HEAD_DEFAULTS, **dict(zip(_MULTI_HEAD_NAMES, args, strict=False)), **kwargs}
    query, key, value = inputs = given.pop("query"), given.pop("key"), given.pop("value")
    if query.ndim == 2:  # one sample
        lone = {"query": query[:, None], "key": key[:, None], "value": value[:, None]}
        padding = given["key_padding_mask"]
        lone["key_padding_mask"] = None if padding is None else padding[None]
        o, weights = _multi_head_attention(**{**given, **lone})
        return o[:, 0], None if weights is None else weights[0]
    heads = given["num_heads"]
    reasons = {
        "tangent of a parameter": _moves(*given.values()),
        "dropout": given["dropout_p"] > 0 and given["training"],
        "keys beyond those given": given["add_zero_attn"]
        or any(given[name] is not None for name in _MORE_KEYS),
        f"heads wider than {_WIDEST_HEAD}": query.shape[-1] // heads > _WIDEST_HEAD,
    }
    _leave(reasons)
    mask = _multi_head_mask(given["attn_mask"], given["key_padding_mask"], heads, query.dtype)
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if query is key is value and weight is not None:
        qkv = _linear(query, weight, bias).chunk(3, -1)
    else:
        separate = (given[f"{name}_proj_weight"] for name in "qkv")
        three = separate if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        layers = zip(inputs, three, biases, strict=True)
        qkv = [(_linear if _moves(x) else F.linear)(x, *layer) for x, *layer in layers]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in qkv)
    p = None
    if given["need_weights"]:
        scores = torch.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            hides = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
        p = scores.softmax(-1)
        o = _detached(torch.einsum("bhnm,bmhd->bnhd", p, v))
        p = _detached(p.mean(1) if given["average_attn_weights"] else p)
    else:
        o = joint_attention(q, k, v, mask=mask)
    o = o.transpose(0, 1).flatten(2)
    return _linear(o, given["out_proj_weight"], given["out_proj_bias"]), p


def _multi_head_mask(
    mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the masks of multi-head attention, True for what is hidden, as `joint_attention`'s."""
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    rules = [
        m for m in (mask, None if padding is None else padding[:, None, None]) if m is not None
    ]
    if not rules:
        return None
    if all(m.dtype == torch.bool for m in rules):
        return ~functools.reduce(torch.logical_or, rules)
    zero = torch.zeros((), dtype=dtype, device=rules[0].device)
    added = [m if m.dtype != torch.bool else torch.where(m, -torch.inf, zero) for m in rules]
    return functools.reduce(torch.add, added).to(dtype)


_ROUTES: dict[Any, tuple[str, Route]] = {
    F.linear: ("linear", _linear),
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", _attention),
    F.multi_head_attention_forward: ("multi_head_attention_forward", _multi_head_attention),
    F.conv1d: ("conv1d", _with_weight(F.conv1d)),
    F.conv2d: ("conv2d", _with_weight(F.conv2d)),
    F.conv3d: ("conv3d", _with_weight(F.conv3d)),
    F.conv_transpose1d: ("conv_transpose1d", _with_weight(F.conv_transpose1d)),
    F.conv_transpose2d: ("conv_transpose2d", _with_weight(F.conv_transpose2d)),
    F.conv_transpose3d: ("conv_transpose3d", _with_weight(F.conv_transpose3d)),
    F.silu: ("silu", _silu),
    F.gelu: ("gelu", _apart(F.gelu, _gelu_dot)),
    F.layer_norm: ("layer_norm", _apart(F.layer_norm, _layer_norm_dot)),
    F.rms_norm: ("rms_norm", _apart(F.rms_norm, _rms_norm_dot)),
    F.group_norm: ("group_norm", _apart(F.group_norm, _group_norm_dot)),
    F.batch_norm: ("batch_norm", _batch_norm),
    # What a compiler makes of the two.
    torch.layer_norm: ("layer_norm", _apart(torch.layer_norm, _layer_norm_dot)),
    torch.rms_norm: ("rms_norm", _apart(torch.rms_norm, _rms_norm_dot)),
}
_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "mv": 0, "einsum": 1, "addmm": 1, "baddbmm": 1}
_ROUTES |= {
    getattr(owner, name): (name, _product(getattr(torch, name), first))
    for name, first in _PRODUCTS.items()
    for owner in (torch, Tensor)
    if hasattr(owner, name)
}
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

# Functions whose forward derivative would keep tangents for backward, by their names in torch,
# torch.Tensor and torch.nn.functional. None returns its input or a view of it.
_NAMES = (
    "mul div true_divide pow __rdiv__ __rtruediv__ __rpow__ "
    "addcmul addcdiv lerp square sqrt rsqrt reciprocal exp log sin cos tanh sigmoid relu softplus "
    "elu selu celu leaky_relu mish hardswish softmax log_softmax glu instance_norm normalize"
)
_KEEP_TANGENTS = {
    getattr(owner, name)
    for owner in (torch, Tensor, F)
    for name in _NAMES.split()
    if hasattr(owner, name)
}


_FUSED_ATTENTION = (
    "flash_attn",
    "flash_attn_interface",
    "natten",
    "sageattention",
    "torch.nn.attention.flex_attention",
    "transformer_engine",
    "xformers",
)


def _fused_attention(trace: Any) -> str | None:
    """Return the package of a fused attention in which an error arose; None for any other."""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        for name in _FUSED_ATTENTION:
            if module == name or module.startswith(f"{name}."):
                return name
        trace = trace.tb_next
    return None


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
            return (
                "No function was called with a tangent. Call torch.func.jvp inside the block: "
                "torch.autograd.functional.jvp is two backward passes, not forward mode."
            )
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        name = _fused_attention(trace) if isinstance(error, RuntimeError) else None
        if name is not None:
            raise NotImplementedError(
                f"{name} has no forward mode. Call F.scaled_dot_product_attention in its place "
                '(transformers: attn_implementation="sdpa"), which accelerate_jvp takes over.'
            ) from error

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
        except NotCounted:
            result = func(*args, **kwargs)
            return result if torch.compiler.is_compiling() else _detached(result)
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
    these functions, and the modules that call them, propagate it by our rules: linear,
    convolutions, transposed ones too, matmul and its kin with one factor that moves,
    scaled_dot_product_attention and multi_head_attention_forward with any masks, layer_norm,
    rms_norm, group_norm, batch_norm in eval mode, silu, gelu. A layer then costs two products
    instead of three, attention has a forward mode, and backward keeps no tangent. Calls without a
    tangent are PyTorch's own, bit for bit.
    What we do not take stays PyTorch's: attention with dropout goes through its math backend; a
    tangent of a weight, nested forward mode, and forward mode inside `torch.func.grad` or `vmap`
    are left as they are.

    Works eagerly, and with `torch.compile(fullgraph=True)`, opened inside or around what is
    compiled. Gradients are those of the values; detach the tangent before it enters the loss.

    Returns:
        A context manager that gives itself, a report: `print(report)` is a table of what was taken
        and what was left, and why.

    Raises:
        RuntimeError: In the backward pass, where a gradient arrives at a tangent.
        NotImplementedError: The attention of another package failed inside; what to call instead.
    """
    return AcceleratedJvp()
