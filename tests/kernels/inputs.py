"""Arguments of every op by name: the one home of how to call each, for all tests that do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfmjt import kernels
from mfmjt.kernels import _native

__all__ = ["OPS", "Arguments", "arguments", "inputs", "moving"]

OPS = (
    "adaln",
    "conv1d",
    "gated_residual_adaln",
    "joint_attention",
    "linear",
    "qk_norm_rope",
    "snake",
    "swiglu",
    "swiglu_product",
)
Arguments = dict[str, Any]


def inputs(
    op: str,
    size: tuple[int, int, int] = (2, 3, 8),
    rows: int | None = 1,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
) -> Arguments:
    """Return what `mfmjt.kernels.<op>` takes, by name.

    Args:
        op: Name of the op.
        size: Samples, tokens and channels; of a head, or of a signal's samples, where it has those.
        rows: Modulations for each sample, 1, or more, of which each token picks one; or None for
            one for each token, cut from a wider tensor.
        dtype: Of all but the rotation and lengths.
        heads: Of an op that has heads.
    """
    batch, tokens, width = size

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    def modulation() -> Tensor:
        if rows is None:
            return randn(batch, tokens, 3 * width)[..., width : 2 * width]
        return randn(batch, rows, width)

    x = randn(batch, tokens, width)
    # Out of order, and with 3 of 5 tokens one of 4 rows is not picked
    picks = None if rows in (1, None) else (torch.arange(tokens) * 5 + 1) % 7 % rows
    constants = {"eps": 1e-6, "rows": picks}
    if op == "adaln":
        return {"x": x + 3, "shift": modulation(), "scale": modulation(), **constants}
    if op == "gated_residual_adaln":
        gated = {"x": x, "h": torch.randn_like(x), "gate": modulation()}
        return {**gated, "shift": modulation(), "scale": modulation(), **constants}
    if op == "qk_norm_rope":
        angle = torch.randn(tokens, width // 2)
        rope = torch.stack((angle.cos(), angle.sin()), -1)
        weights = {"q_weight": randn(width), "k_weight": randn(width)}
        return {"qkv": randn(batch, tokens, 3, heads, width), **weights, "rope": rope, "eps": 1e-6}
    if op == "joint_attention":
        shapes = {"q": tokens, "k": tokens + 2, "v": tokens + 2}
        streams = {name: randn(batch, n, heads, width) for name, n in shapes.items()}
        hides = {"mask": None, "lengths": torch.arange(batch) % (tokens + 2) + 1, "causal": False}
        return {**streams, "scale": 0.5, **hides}
    if op == "swiglu":
        return {"gate": 5 * x, "up": torch.randn_like(x)}
    if op == "snake":
        return {"x": x, "alpha": randn(tokens) / 3, "beta": randn(tokens) / 3}
    if op == "linear":
        return {"x": x, "weight": randn(5, width), "bias": randn(5)}
    if op == "conv1d":
        return {"x": x, "weight": randn(5, width, 3), "bias": randn(5), "dilation": 1}
    if op == "swiglu_product":
        weights = {f"{name}_weight": randn(5, width, 3) for name in ("gate", "up")}
        return {"x": x, **weights}
    raise NotImplementedError(f"no inputs of the op {op}: write them here")


def _names(name: str) -> list[str]:
    """Return the names of a library op's arguments."""
    op = getattr(torch.ops.mfmjt, name).default
    return [argument.name for argument in op._schema.arguments]


def moving(op: str) -> list[str]:
    """Return the names of the inputs that may have a tangent."""
    assert kernels  # which defines the library ops
    return [name[:-4] for name in _names(f"{op}_jvp") if name.endswith("_dot")]


def arguments(name: str, *args: Any, **options: Any) -> Arguments:
    """Return what the library op `mfmjt::<name>` takes, by the names of its schema.

    Tangents `x_dot` and cotangents `y_bar` are random. What backward needs of forward is what the
    formula returns for the same inputs.

    Args:
        name: Name of the library op: an op's, then `_fwd`, `_jvp` or `_bwd`.
        args: As for `inputs`, after the op.
        options: Likewise.
    """
    op, _, part = name.rpartition("_")
    given, names = inputs(op, *args, **options), _names(name)
    if part == "bwd":
        bars = [n[:-4] for n in names if n.endswith("_bar")]
        statistics = [n for n in names if n not in given and n not in bars and n[-4:] != "_bar"]
        with _native.formulas():
            forward = getattr(torch.ops.mfmjt, f"{op}_fwd")
            outputs = forward(*(given[n] for n in _names(f"{op}_fwd")))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given |= zip((*bars, *statistics), outputs, strict=True)
    return {n: given[n] if n in given else torch.randn_like(given[n[:-4]]) for n in names}
