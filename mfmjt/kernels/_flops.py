"""What PyTorch's `FlopCounterMode` counts for library ops that hold matrix products.

It counts ATen's products by their shapes and takes any other op for free, so without these formulas
a network on our kernels would seem to do next to nothing. Counted as PyTorch counts its own: two
operations a multiplication, element-wise work none, a gradient of attention five products although
kernels without atomics do seven. Products that a tangent does not need are not counted, as they are
not done.

`torch.utils.flop_counter` loads Triton wherever that is installed, so it is not imported for this:
the formulas join its table at once if it is there, else when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from typing import Any

import torch

__all__ = ["install"]

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]
Dots = Sequence[Shape | None]


def _product_fwd(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """One of linear's or conv1d's: x (..., C) and weight (O, C) or (O, C, K)."""
    return 2 * prod(x[:-1]) * prod(weight)


def _product_jvp(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * _product_fwd(x, weight, out_shape=out_shape)


def _product_bwd(y_bar: Shape, x: Shape, weight: Shape, *others: Any, out_shape: Any) -> int:
    needs = others[-1]
    return (needs[0] + needs[1]) * _product_fwd(x, weight, out_shape=out_shape)


def _each(formula: Callable[..., int], operands: int) -> Callable[..., int]:
    """Count an op over lists of streams, of which the formula takes so many first arguments."""

    def total(*args: Any, out_shape: Any) -> int:
        streams = zip(*args[:operands], strict=True)
        return sum(formula(*stream, args[-1], out_shape=out_shape) for stream in streams)

    return total


def _conv1d_toom(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * x[0] * x[2] * prod(weight)


def _product(q: Shape, k: Shape) -> int:
    """One of attention's products, of the queries of one stream and the keys of another."""
    batch, queries, heads, width = q
    return 2 * batch * heads * queries * k[1] * width


def _attention_fwd(q: Sequence[Shape], k: Sequence[Shape], *_: Any, out_shape: Any) -> int:
    return 2 * sum(_product(i, j) for i in q for j in k)


def _attention_jvp(
    q: Sequence[Shape],
    k: Sequence[Shape],
    v: Sequence[Shape],
    q_dot: Dots,
    k_dot: Dots,
    v_dot: Dots,
    *_: Any,
    out_shape: Any,
) -> int:
    total = 0
    for queries, i_dot in zip(q, q_dot, strict=True):
        for keys, j_dot, value_dot in zip(k, k_dot, v_dot, strict=True):
            of_scores = (i_dot is not None) + (j_dot is not None)
            # S and P v; S_dot and, where that is not zero, W v; P v_dot.
            products = 2 + of_scores + (of_scores > 0) + (value_dot is not None)
            total += products * _product(queries, keys)
    return total


def _attention_bwd(
    o_bar: Any, q: Sequence[Shape], k: Sequence[Shape], *_: Any, out_shape: Any
) -> int:
    return 5 * sum(_product(i, j) for i in q for j in k)


def _flash(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 2 * 2 * batch * heads * queries * k[2] * width


def _flash_backward(_: Any, q: Shape, k: Shape, *__: Any, **___: Any) -> int:
    return 5 * _flash(q, k) // 2


def _streams(xs: Sequence[Shape], weights: Sequence[Shape], *_: Any, out_shape: Any) -> int:
    return sum(2 * x[0] * x[1] * prod(weight) for x, weight in zip(xs, weights, strict=True))


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_fwd": _product_fwd,
    "linear_jvp": _product_jvp,
    "linear_bwd": _product_bwd,
    "conv1d_fwd": _product_fwd,
    "conv1d_jvp": _product_jvp,
    "conv1d_bwd": _product_bwd,
    "conv1d_streams_fwd": _each(_product_fwd, 2),
    "conv1d_streams_jvp": _each(_product_jvp, 2),
    "conv1d_streams_bwd": _each(_product_bwd, 3),
    "conv1d_toom": _conv1d_toom,  # what the convolution is, not what the method saves
    "joint_attention_fwd": _attention_fwd,
    "joint_attention_jvp": _attention_jvp,
    "joint_attention_bwd": _attention_bwd,
    "streams_project": _streams,
    "streams_project_qkv": _streams,
}


def _register() -> None:
    register = sys.modules[_COUNTER].register_flop_formula
    for name, formula in _FORMULAS.items():
        register(getattr(torch.ops.mfmjt, name))(formula)
    # PyTorch counts its flash attention on GPUs only; our front door calls the CPU's.
    known = sys.modules[_COUNTER].flop_registry
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    for name, formula in ((flash, _flash), (f"{flash}_backward", _flash_backward)):
        op = getattr(torch.ops.aten, name)
        if op not in known:
            register(op)(formula)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: lets the others find the counter, and adds to it once it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def load(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Let `FlopCounterMode` count inside our library ops, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
