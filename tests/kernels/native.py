"""Arguments of the library ops that C++ kernels serve, for tests that call each of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfmjt import kernels  # defines the library ops, too
from mfmjt.kernels import _native
from tests.oracle import strided

__all__ = ["NAMES", "Arguments", "arguments", "cases", "formula", "library_op"]

NAMES = sorted(_native._TAKES)
Arguments = dict[str, Any]


def arguments(
    name: str,
    size: tuple[int, int, int] = (2, 3, 8),
    rows: int | None = 1,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """What the raw op `mfmjt_cpu::<name>` takes, by name.

    Args:
        name: Name of the op.
        size: Samples, tokens and channels; of a head, or of a signal's samples, where it has those.
        rows: Modulations for each sample, 1, or for each token, None.
        dtype: Of all but statistics.
    """
    batch, tokens, width = size

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(dtype)

    def x() -> Tensor:
        return randn(batch, tokens, width)

    def row() -> Tensor:
        return randn(batch, tokens if rows is None else rows, width)

    def statistic(*shape: int) -> Tensor:
        return torch.rand(*shape) + 0.5

    op, _, part = name.rpartition("_")
    if op in ("adaln", "gated_residual_adaln"):
        gated = op != "adaln"
        given = {"total" if gated and part == "bwd" else "x": x()}
        if gated:
            given |= {"h": x(), "gate": row()}
        given |= {"shift": row(), "scale": row()}
        if part == "bwd":
            bars = {"total_bar": x(), "y_bar": x()} if gated else {"y_bar": x()}
            shape = (batch, tokens, 1)
            return {**bars, **given, "mean": torch.randn(*shape), "rstd": statistic(*shape)}
        if part == "jvp":
            given |= {f"{key}_dot": torch.randn_like(t) for key, t in given.items()}
        return {**given, "eps": 1e-6}
    if op == "qk_norm_rope":
        heads, pairs = 2, (width + 1) // 2
        width = 2 * pairs
        qkv = randn(batch, tokens, 3, heads, width)
        given = {"qkv": qkv, **({"qkv_dot": torch.randn_like(qkv)} if part == "jvp" else {})}
        given |= {"q_weight": randn(width), "k_weight": randn(width)}
        given |= {"rope": torch.randn(tokens, pairs, 2)}
        if part != "bwd":
            return {**given, "eps": 1e-6}
        shape = (batch, tokens, heads)
        bars = {f"{key}_bar": randn(*shape, width) for key in "qkv"}
        return {**bars, **given, "q_rstd": statistic(*shape, 1), "k_rstd": statistic(*shape, 1)}
    if name == "snake_fwd":
        return {"x": x(), "alpha": torch.randn(tokens) / 3, "beta": torch.randn(tokens) / 3}
    if op == "swiglu":
        given = {"gate": 5 * x(), "up": x()}
        if part == "jvp":
            given |= {"gate_dot": x(), "up_dot": x()}
        return {"y_bar": x(), **given} if part == "bwd" else given
    if "rows" in name:
        heads, width, keys = 2, (width + 1) // 2 * 2, tokens + 2
        dtype = torch.bfloat16  # the only one it takes
        given = {"q": randn(batch, tokens, heads, width), "k": randn(batch, keys, heads, width)}
        given |= {"v": torch.randn_like(given["k"])}
        lengths = torch.arange(batch) % keys + 1
        bias = torch.zeros(batch, keys)
        bias[torch.arange(keys) >= lengths[:, None]] = torch.finfo(torch.float32).min
        rest = {"bias": bias, "scale": 0.5}
        if part == "bar":
            o_bar = {"o_bar": torch.randn_like(given["q"])}
            with _native.formulas():
                lse = _attention()._fwd(*([t] for t in given.values()), [lengths], 0.5)[1]
            return {**o_bar, **given, "lse": lse, **rest}
        return {**given, **{f"{key}_dot": torch.randn_like(t) for key, t in given.items()}, **rest}
    if "softmax" in name:
        shape, scores = (batch, tokens), x()
        if part == "bar":
            rest = {"p_bar": x(), "bias": randn(batch, width), "lse": statistic(*shape)}
        else:
            rest = {"s_dot": x(), "bias": randn(batch, width)}
        return {"s": scores, **rest, "scale": 0.5}
    if op == "conv1d":
        given = {"x": torch.randn(size), "weight": torch.randn(5, tokens, 7)}
        return {**given, "bias": torch.randn(5), "dilation": 2}
    raise NotImplementedError(f"no arguments for the kernel {name}: write them here")


def _attention() -> Any:
    return importlib.import_module("mfmjt.kernels.joint_attention")


def library_op(name: str) -> Any:
    """The library op that runs this kernel; or the kernel, where one is made of several."""
    if name.startswith("joint_attention"):
        return getattr(torch.ops.mfmjt_cpu, name).default
    return getattr(torch.ops.mfmjt, name).default


def formula(name: str, given: Arguments) -> tuple[Tensor, ...]:
    """What PyTorch's formulas make of the same arguments."""
    with _native.formulas():
        if "softmax" in name:  # it works in place
            copies = [t.clone() if isinstance(t, Tensor) else t for t in given.values()]
            results = getattr(kernels._attention, name.removeprefix("joint_attention_"))(*copies)
        elif "rows" in name:
            results = _by_streams(name, **given)
        else:
            results = library_op(name)(*given.values())
    return results if isinstance(results, tuple) else (results,)


def _by_streams(name: str, bias: Tensor | None, scale: float, **given: Any) -> tuple[Any, ...]:
    """The formulas of attention, of one stream each, by lengths instead of a bias."""
    lengths = [None if bias is None else (bias == 0).sum(1)]
    if name.endswith("bar"):
        lse = given.pop("lse")
        o_bar, q, k, v = ([t] for t in given.values())
        bars = _attention()._bwd(o_bar, q, k, v, q, lse, lengths, scale)
        return tuple(bar for (bar,) in bars)
    (o,), (o_dot,), lse = _attention()._jvp(*([t] for t in given.values()), lengths, scale)
    moves = any(given[f"{key}_dot"] is not None for key in "qkv")
    return o, o_dot if moves else o.new_empty(0), lse


# Whole vectors and less, odd widths, one token, more tokens than one chunk of a sum, more samples
# than one block of a signal.
SIZES = ((2, 3, 32), (1, 1, 7), (2, 70, 21), (1, 130, 2), (3, 2, 1030))


def cases() -> Iterator[tuple[str, Arguments]]:
    """Arguments that take every branch of every kernel: sizes, strides, what may be absent."""
    for name in NAMES:
        dtypes = [torch.float32] if "conv1d" in name else [torch.float32, torch.bfloat16]
        dtypes = dtypes[-1:] if "rows" in name else dtypes
        for dtype in dtypes:
            for size in SIZES:
                for rows in (1, None):
                    yield name, arguments(name, size, rows, dtype)
            if "joint_attention" not in name:  # these want scores, or heads, dense
                yield name, _spread(arguments(name, (2, 5, 9), 1, dtype))
            optional = [
                argument.name
                for argument in library_op(name)._schema.arguments
                if isinstance(argument.type, torch.OptionalType)
            ]
            for absent in ([key] for key in optional):
                yield name, {**arguments(name, dtype=dtype), **dict.fromkeys(absent)}
            for present in optional if len(optional) > 1 else []:
                whole = arguments(name, rows=None, dtype=dtype)
                yield name, {**whole, **dict.fromkeys(key for key in optional if key != present)}

    for dtype in (torch.float32, torch.bfloat16):  # a row of several stretches
        yield "snake_fwd", arguments("snake_fwd", (1, 2, 4110), 1, dtype)
    for size in ((1, 260, 40), (2, 17, 1700)):  # threads share channels, and blocks of samples
        yield "conv1d_toom", arguments("conv1d_toom", size)


def _spread(given: Arguments) -> Arguments:
    """The same numbers, apart in memory; what a forward op returned is always dense."""
    return {
        key: strided(t) if isinstance(t, Tensor) and "rstd" not in key and key != "mean" else t
        for key, t in given.items()
    }
