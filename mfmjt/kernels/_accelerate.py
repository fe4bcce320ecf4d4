"""Our tangents in anyone's network: PyTorch's functions, taken over while a tangent is alive.

`accelerate_jvp` is a torch function mode: it sees every PyTorch function that is called inside the
block. Where nothing carries a tangent it calls the function and does no more. Where an input does:

    F.scaled_dot_product_attention               our `joint_attention`
    F.linear, conv1d, conv2d, conv3d             the function, on the value and on the tangent
    F.multi_head_attention_forward               both
    F.silu, gelu, layer_norm, rms_norm           the function on the value, and on the tangent
        silu, gelu     y_dot = f'(x) x_dot           by the function's own backward kernel, since
        layer_norm     y_dot = w J x_dot             a diagonal Jacobian is symmetric, and so is J
        rms_norm       y_dot = w r (x_dot - n mean(n x_dot)),  n = r x,  r = (mean x^2 + eps)^-1/2
    products and the like, whose derivative      PyTorch's value and tangent, the tangent then
    would keep a tangent for backward            taken off the tape
    anything else                                PyTorch's

So a layer costs two products where PyTorch's forward mode does three (it multiplies by a zero
tangent of the weight that it makes up), attention has a forward mode, and the tape keeps what it
keeps in plain training. Gradients are those of the values; one that arrives at a tangent raises.

Values come from PyTorch's function on the tape, not from a library op of ours that would give value
and tangent together, so that what follows may be in place (the results of an op that has several
may not), autocast keeps its copies of weights, and a compiler can fuse across.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mfmjt.kernels import _op
from mfmjt.kernels._dual import seal
from mfmjt.kernels.joint_attention import joint_attention

__all__ = ["AcceleratedJvp", "accelerate_jvp"]

# A route returns the dual result, or why the call is PyTorch's, or None: no input has a tangent.
Outcome = Any
Route = Callable[..., Outcome]

_WIDEST_HEAD = 256  # that our attention takes on every device

_layer_norm_bar = torch.ops.aten.native_layer_norm_backward.default


def _forward_mode() -> str | None:
    """None outside forward mode, "" inside, else why no call can be ours there.

    A compiler that traces a call of this must run it instead: it remembers what it once read from a
    global variable, and one level is entered and left within what it compiles.
    """
    if forward_ad._current_level < 0:
        return None
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Jvp for level in stack):
        return "inside torch.func.grad, vjp or vmap"
    return "nested forward mode" if len(stack) > 1 else ""


# What torch.compiler.assume_constant_result sets; it would import the compiler.
_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent, the latter off the tape; None where there is no tangent."""
    x, x_dot = forward_ad.unpack_dual(x, level=0)  # the one level there is
    return x, None if x_dot is None else x_dot.detach()


def _join(y: Tensor, y_dot: Tensor) -> Tensor:
    return forward_ad.make_dual(y, seal(y, y_dot), level=0)


def _moves(*arguments: Any) -> bool:
    """Whether one of the arguments carries a tangent."""
    return any(isinstance(a, Tensor) and _split(a)[1] is not None for a in arguments)


def _off_tape(result: Any) -> Any:
    """PyTorch's result, the tangent off the tape."""
    if type(result) is tuple:
        return tuple(map(_off_tape, result))
    if not (isinstance(result, Tensor) and torch.is_grad_enabled()):
        return result
    y, y_dot = _split(result)
    return result if y_dot is None else _join(y, y_dot)


def _apart(function: Callable[..., Tensor], tangent: Callable[..., Tensor]) -> Route:
    """Route of a function of one moving input: `tangent(x, x_dot, *others)` has no tape."""

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Outcome:
        if _moves(*args, *kwargs.values()):
            return "tangent of a parameter"
        x, x_dot = _split(input)
        if x_dot is None:
            return None
        y = function(x, *args, **kwargs)
        with torch.no_grad():
            y_dot = tangent(x.detach(), x_dot, *args, **kwargs).to(y.dtype)
        return _join(y, y_dot)

    return route


def _with_weight(function: Callable[..., Tensor]) -> Route:
    """Route of a function that is linear in its input but for a bias."""

    def tangent(
        x: Tensor, x_dot: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return function(x_dot, weight, None, *args, **kwargs)

    return _apart(function, tangent)


_linear = _with_weight(F.linear)


def _any_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(input, weight, bias) if _moves(input) else F.linear(input, weight, bias)


def _gelu_dot(x: Tensor, x_dot: Tensor, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(x_dot, x, approximate=approximate)


def _silu_dot(x: Tensor, x_dot: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(x_dot, x)


_silu_apart = _apart(F.silu, _silu_dot)


def _silu(input: Tensor, inplace: bool = False) -> Outcome:
    if not _moves(input):
        return None
    if inplace:
        return "in place"
    return "complex numbers" if input.is_complex() else _silu_apart(input)


def _layer_norm_dot(
    x: Tensor,
    x_dot: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    work = _op.work_dtype(x)
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
    work = _op.work_dtype(x)
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
) -> Outcome:
    if not _moves(query, key, value, attn_mask):
        return None
    if attn_mask is not None:
        return "attn_mask"
    if dropout_p > 0:
        return "dropout"
    if is_causal:
        return "is_causal"
    if not (query.ndim == key.ndim == value.ndim == 4):
        return "not (B, H, N, D)"
    if not (query.shape[:2] == key.shape[:2] == value.shape[:2]):
        return "queries and keys of different numbers"
    if not (query.shape[3] == key.shape[3] == value.shape[3]):
        return "values of a width of their own"
    if key.shape[2] == 0:
        return "no key"
    if query.shape[3] > _WIDEST_HEAD:
        return f"heads wider than {_WIDEST_HEAD}"
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return joint_attention(q, k, v, scale=scale).transpose(1, 2)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Outcome:
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    parameters = (in_proj_weight, in_proj_bias, *separate, out_proj_weight, out_proj_bias)
    if _moves(*parameters, bias_k, bias_v, static_k, static_v, attn_mask):
        return "tangent of a parameter"
    if not _moves(query, key, value):
        return None
    if need_weights:
        return "need_weights=True"
    if attn_mask is not None or key_padding_mask is not None:
        return "attn_mask"
    if dropout_p > 0 and training:
        return "dropout"
    if add_zero_attn or any(t is not None for t in (bias_k, bias_v, static_k, static_v)):
        return "keys beyond those given"
    if query.ndim != 3:
        return "not (N, B, C)"
    if query.shape[2] // num_heads > _WIDEST_HEAD:
        return f"heads wider than {_WIDEST_HEAD}"
    if query is key is value and in_proj_weight is not None:
        qkv = _linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        weights: Any = separate if in_proj_weight is None else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        qkv = tuple(map(_any_linear, (query, key, value), weights, biases))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(0, 1) for t in qkv)
    o = joint_attention(q, k, v).transpose(0, 1).flatten(2)
    return _linear(o, out_proj_weight, out_proj_bias), None


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
        return result if args and result is args[0] else _off_tape(result)

    def _route(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Any:
        name, route = _ROUTES[func]
        obstacle = "inside kernels.reference()" if _op.use_reference() else why
        result = obstacle or route(*args, **kwargs)
        if result is None:
            return func(*args, **kwargs)
        if not isinstance(result, str):
            self.taken[name] = self.taken.get(name, 0) + 1
            return result
        key = (name, result)
        self.left[key] = self.left.get(key, 0) + 1
        if func in _ATTENTION:  # PyTorch's fused kernels have no forward mode
            with sdpa_kernel(SDPBackend.MATH):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return result if obstacle or torch.compiler.is_compiling() else _off_tape(result)


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
