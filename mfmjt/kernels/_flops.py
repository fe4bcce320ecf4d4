"""What PyTorch's `FlopCounterMode` counts for library ops that hold matmuls.

It counts ATen's matmuls by their shapes and takes any other op for free, so without these formulas
a network on our kernels would seem to do next to nothing. Counted as PyTorch counts its own: two
operations a multiplication, element-wise work none, a gradient of attention five matmuls although
kernels without atomics do seven. Matmuls that a tangent does not need are not counted, as they are
not done.

The formulas join the counter's table when this package is imported. The counter then is imported
too, and it imports Triton where that is installed: 0.18 s of CPU time beside 1.6 s for torch and
this package, and 0.002 s elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils import flop_counter

__all__ = ["install"]

Shape = Sequence[int]
Shapes = Sequence[Shape | None]


def _product(x: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    """Count x (..., C) times a weight (O, C), (O, C, K) or (O, K, C)."""
    return 2 * prod(x[:-1]) * prod(weight)


def _product_jvp(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * _product(x, weight)


def _product_bwd(y_bar: Shape, x: Shape, weight: Shape, *others: Any, out_shape: Any) -> int:
    needs = others[-1]
    return (needs[0] + needs[1]) * _product(x, weight)


def _gated(x: Shape, gate_weight: Shape, *_: Any, out_shape: Any) -> int:
    """Count both products of a gated unit."""
    return 2 * _product(x, gate_weight)


def _gated_jvp(x: Shape, gate_weight: Shape, *_: Any, out_shape: Any) -> int:
    return 4 * _product(x, gate_weight)


def _gated_bwd(y_bar: Shape, x: Shape, gate_weight: Shape, *others: Any, out_shape: Any) -> int:
    needs = others[-1]
    return 2 * (needs[0] + (needs[1] or needs[2])) * _product(x, gate_weight)


def _each(formula: Callable[..., int], operands: int) -> Callable[..., int]:
    """Count an op over lists of streams, of which the formula takes so many first arguments."""

    def total(*args: Any, out_shape: Any) -> int:
        streams = zip(*args[:operands], strict=True)
        return sum(formula(*stream, args[-1], out_shape=out_shape) for stream in streams)

    return total


def _conv1d_toom(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """Count what the convolution is, not what the method saves."""
    return 2 * x[0] * x[2] * prod(weight)


def _attention(
    q: Sequence[Shape], k: Sequence[Shape], v: Sequence[Shape], of_keys: int, of_values: int
) -> int:
    """Count products of all queries (B, N, H, D) with keys (B, M, K, D) and values (B, M, K, E)."""
    tokens = sum(i[1] for i in q) * sum(j[1] for j in k)
    return 2 * q[0][0] * q[0][2] * tokens * (of_keys * q[0][3] + of_values * v[0][3])


def _attention_fwd(
    q: Sequence[Shape], k: Sequence[Shape], v: Sequence[Shape], *_: Any, out_shape: Any
) -> int:
    return _attention(q, k, v, 1, 1)


def _attention_jvp(
    q: Sequence[Shape],
    k: Sequence[Shape],
    v: Sequence[Shape],
    q_dot: Shapes,
    k_dot: Shapes,
    v_dot: Shapes,
    *_: Any,
    out_shape: Any,
) -> int:
    total = 0
    for queries, i_dot in zip(q, q_dot, strict=True):
        for keys, values, j_dot, value_dot in zip(k, v, k_dot, v_dot, strict=True):
            of_scores = (i_dot is not None) + (j_dot is not None)
            # S and P v; S_dot and, where that is not zero, W v; P v_dot.
            of_values = 1 + (of_scores > 0) + (value_dot is not None)
            total += _attention([queries], [keys], [values], 1 + of_scores, of_values)
    return total


def _attention_bwd(
    o_bar: Any,
    q: Sequence[Shape],
    k: Sequence[Shape],
    v: Sequence[Shape],
    *_: Any,
    out_shape: Any,
) -> int:
    return _attention(q, k, v, 3, 2)


def _flash(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    """Count attention of (B, H, N, D)."""
    return 4 * prod(q) * k[2]


def _flash_backward(_: Any, q: Shape, k: Shape, *__: Any, **___: Any) -> int:
    return 10 * prod(q) * k[2]


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_fwd": _product,
    "linear_jvp": _product_jvp,
    "linear_bwd": _product_bwd,
    "conv1d_fwd": _product,
    "conv1d_jvp": _product_jvp,
    "conv1d_bwd": _product_bwd,
    "conv1d_streams_fwd": _each(_product, 2),
    "conv1d_streams_jvp": _each(_product_jvp, 2),
    "conv1d_streams_bwd": _each(_product_bwd, 3),
    "conv1d_toom": _conv1d_toom,
    "joint_attention_fwd": _attention_fwd,
    "joint_attention_jvp": _attention_jvp,
    "joint_attention_bwd": _attention_bwd,
    "swiglu_product_fwd": _gated,
    "swiglu_product_jvp": _gated_jvp,
    "swiglu_product_bwd": _gated_bwd,
    "swiglu_product_streams_fwd": _each(_gated, 2),
    "swiglu_product_streams_jvp": _each(_gated_jvp, 2),
    "swiglu_product_streams_bwd": _each(_gated_bwd, 3),
    "streams_project": _each(_product, 2),
    "streams_project_norm": _each(_product, 2),
    "streams_project_qkv": _each(_product, 2),
    "vocoder_convolve": _each(_product, 2),
    "vocoder_upsample": _product,
}


def install() -> None:
    """Let `FlopCounterMode` count inside our library ops."""
    for name, formula in _FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.mfmjt, name))(formula)
    # PyTorch counts its flash attention on GPUs only; our front door calls the CPU's.
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    for name, formula in ((flash, _flash), (f"{flash}_backward", _flash_backward)):
        op = getattr(torch.ops.aten, name)
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)
