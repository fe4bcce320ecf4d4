"""The C++ kernels by name: arguments that take every branch, and what PyTorch makes of the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfmjt import kernels
from mfmjt.kernels import _native
from tests.kernels.inputs import Arguments, inputs
from tests.kernels.inputs import arguments as of_library_op
from tests.oracle import strided

__all__ = ["NAMES", "arguments", "cases", "formula", "kernel"]

NAMES = sorted(
    name.removeprefix("mfmjt_cpu::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("mfmjt_cpu::")
)


def kernel(name: str) -> Any:
    """Return the C++ kernel of this name."""
    return getattr(torch.ops.mfmjt_cpu, name).default


def arguments(
    name: str,
    size: tuple[int, int, int] = (2, 3, 8),
    rows: int | None = 1,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Return what the kernel `mfmjt_cpu::<name>` takes, by name: see `inputs`."""
    batch, tokens, width = size
    if name == "conv1d_toom":  # channels-first
        weights = {"weight": torch.randn(5, tokens, 7), "bias": torch.randn(5)}
        return {"x": torch.randn(size), **weights, "dilation": 2}
    even = (batch, tokens, (width + 1) // 2 * 2)
    if name.startswith("joint_attention_softmax"):
        s, other = torch.randn(2, *size).to(dtype).unbind()
        rest = {"bias": torch.randn(batch, 1, width).to(dtype), "scale": 0.5}
        if name.endswith("bar"):
            lse = _scores(s, rest["bias"], 0.5).logsumexp(-1)
            return {"s": s, "p_bar": other, "bias": rest["bias"], "lse": lse, "scale": 0.5}
        return {"s": s, "s_dot": other, **rest}
    if name.startswith("joint_attention_rows"):
        given = inputs("joint_attention", even, dtype=torch.bfloat16)
        lengths, scale, *_ = map(given.pop, ("lengths", "scale", "mask", "causal"))
        keys = torch.arange(tokens + 2)
        bias = torch.zeros(batch, tokens + 2)
        bias[keys >= lengths[:, None]] = torch.finfo(torch.float32).min
        rest = {"bias": bias, "scale": scale}
        if name.endswith("bar"):
            lse = _log_sums(given["q"], given["k"], bias[:, None], scale)
            return {"o_bar": torch.randn_like(given["q"]), **given, "lse": lse, **rest}
        return {**given, **{f"{key}_dot": torch.randn_like(t) for key, t in given.items()}, **rest}
    if name.startswith("qk_norm_rope"):
        size = even
    return of_library_op(name, size, rows, dtype)


def _scores(s: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scale and bias scores (G, R, M), in float32 at least."""
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    return s if bias is None else s + bias


def _log_sums(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the log of the sum of each row of powers, (B, H, queries)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide))
    return _scores(s.flatten(1, 2), bias, scale).logsumexp(-1).unflatten(1, s.shape[1:3])


def formula(name: str, given: Arguments) -> tuple[Tensor, ...]:
    """Return what PyTorch's formulas make of the same arguments."""
    with _native.formulas():
        if "softmax" in name:
            scores = _scores(given["s"], given["bias"], given["scale"])
            if name.endswith("bar"):
                return ((scores - given["lse"][..., None]).exp().to(given["s"].dtype),)
            return (scores.logsumexp(-1),)
        if "rows" in name:
            return _rows(**given)
        results = getattr(torch.ops.mfmjt, name)(*given.values())
    return results if isinstance(results, tuple) else (results,)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, **others: Any
) -> tuple[Tensor, ...]:
    """Compute attention by the public function, by lengths instead of a bias."""
    lengths = None if bias is None else (bias == 0).sum(1)

    def attention(*streams: Tensor) -> Tensor:
        return kernels.joint_attention(*streams, lengths=lengths, scale=scale)

    if "o_bar" in others:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attention(*leaves), leaves, others["o_bar"])
    dots = [others[f"{name}_dot"] for name in "qkv"]
    lse = _log_sums(q, k, None if bias is None else bias[:, None], scale)
    if all(dot is None for dot in dots):
        return attention(q, k, v), q.new_empty(0), lse
    pairs = zip((q, k, v), dots, strict=True)
    tangents = tuple(torch.zeros_like(x) if dot is None else dot for x, dot in pairs)
    return *torch.func.jvp(attention, (q, k, v), tangents), lse


# Whole vectors and less, odd widths, one channel, one token, more tokens than one chunk of a sum,
# more samples than one block of a signal.
SIZES = ((2, 3, 32), (1, 1, 7), (2, 70, 21), (1, 130, 2), (3, 2, 1030), (2, 5, 1))


def cases() -> Iterator[tuple[str, Arguments]]:
    """Yield arguments for every branch of every kernel: sizes, strides, what may be absent."""
    for name in NAMES:
        dtypes = [torch.float32] if "conv1d" in name else [torch.float32, torch.bfloat16]
        dtypes = dtypes[-1:] if "rows" in name else dtypes
        optional = [
            argument.name
            for argument in kernel(name)._schema.arguments
            if isinstance(argument.type, torch.OptionalType) and argument.name != "rows"
        ]
        for dtype in dtypes:
            for size in SIZES:
                for rows in (1, None):
                    yield name, arguments(name, size, rows, dtype)
            if "joint_attention" not in name:  # these want scores, or heads, dense
                yield name, _spread(arguments(name, (2, 5, 9), 1, dtype))
            for absent in optional:
                yield name, {**arguments(name, dtype=dtype), absent: None}
            for present in optional if len(optional) > 1 else []:
                whole = arguments(name, rows=None, dtype=dtype)
                yield name, {**whole, **dict.fromkeys(key for key in optional if key != present)}

    for dtype in (torch.float32, torch.bfloat16):  # tokens pick rows of modulations
        for name in (name for name in NAMES if "adaln" in name):
            yield from ((name, arguments(name, size, 4, dtype)) for size in SIZES)

    for dtype in (torch.float32, torch.bfloat16):  # a row of several stretches
        yield "snake_fwd", arguments("snake_fwd", (1, 2, 4110), 1, dtype)
    for size in ((1, 260, 40), (2, 17, 1700)):  # threads share channels, and blocks of samples
        yield "conv1d_toom", arguments("conv1d_toom", size)


def _spread(given: Arguments) -> Arguments:
    """Return the same numbers, apart in memory; what a forward op returned is always dense."""
    return {
        key: strided(t) if isinstance(t, Tensor) and "rstd" not in key and key != "mean" else t
        for key, t in given.items()
    }
