"""The ops and the shapes on which they are checked and timed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SHAPES", "SMOKE", "Case", "Shape", "op_cases"]

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a network's activations.

    Attributes:
        name: Of the network.
        batch, length, dim, heads, hidden: B, N, C, H and the width of its feed-forward.
        other: Tokens of the streams that join the latent in attention.
    """

    name: str
    batch: int
    length: int
    dim: int
    heads: int
    hidden: int
    other: int


SHAPES = (
    Shape("nano", 16, 250, 128, 2, 256, 96),
    Shape("small_16k", 4, 250, 448, 7, 1280, 141),
)
SMOKE = (Shape("smoke", 1, 6, 8, 1, 12, 3),)


@dataclass(frozen=True)
class Case:
    """An op on given inputs.

    Attributes:
        op: Name of the op.
        shape: Name of the network whose shapes these are.
        function: The op's front door, taking the inputs by name.
        reference: Its reference, likewise.
        inputs: float64 tensors on the CPU; gradients are taken of all.
        moving: Those that carry tangents.
        terms: Length of the longest sum behind one element of any result.
    """

    op: str
    shape: str
    function: Function
    reference: Function
    inputs: dict[str, Tensor]
    moving: tuple[str, ...]
    terms: int


def op_cases(shape: Shape) -> list[Case]:
    """Every op at `shape`, with the same numbers at each call."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, dtype=torch.float64, generator=generator)

    s = shape
    b, n, c, d = s.batch, s.length, s.dim, s.dim // s.heads
    angles = torch.arange(n, dtype=torch.float64)[:, None] / 100 ** torch.linspace(0, 1, d // 2)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
    tokens = n + s.other

    def attend(joint: Function) -> Function:
        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            sizes = [n, s.other]  # two streams, as in the joint blocks
            streams = (x.split(sizes, dim=1) for x in (q, k, v))
            return tuple(joint(*streams))

        return function

    def rotate(norm: Function) -> Function:
        return lambda **inputs: norm(**inputs, rope=rope.to(inputs["qkv"].device))

    rows = {"shift": randn(b, 1, c), "scale": randn(b, n, c)}
    wrap: dict[str, Callable[[Function], Function]] = {
        "joint_attention": attend,
        "qk_norm_rope": rotate,
    }
    inputs: dict[str, tuple[dict[str, Tensor], tuple[str, ...], int]] = {
        "adaln": ({"x": randn(b, n, c), **rows}, ("x", "shift", "scale"), n),
        "gated_residual_adaln": (
            {"x": randn(b, n, c), "h": randn(b, n, c), "gate": randn(b, 1, c), **rows},
            ("x", "h", "gate", "shift", "scale"),
            n,
        ),
        "qk_norm_rope": (
            {"qkv": randn(b, n, 3, s.heads, d), "q_weight": randn(d), "k_weight": randn(d)},
            ("qkv",),
            b * n * s.heads,
        ),
        "joint_attention": (
            {name: randn(b, tokens, s.heads, d) for name in ("q", "k", "v")},
            ("q", "k", "v"),
            tokens,
        ),
        "swiglu": (
            {"gate": randn(b, n, s.hidden), "up": randn(b, n, s.hidden)},
            ("gate", "up"),
            1,
        ),
        "linear": (
            {"x": randn(b, n, c), "weight": randn(s.hidden, c, scale=c**-0.5)}
            | {"bias": randn(s.hidden)},
            ("x",),
            b * n,
        ),
        "conv1d": (
            {"x": randn(b, n, c), "weight": randn(s.hidden, c, 3, scale=(3 * c) ** -0.5)}
            | {"bias": randn(s.hidden)},
            ("x",),
            b * n,
        ),
        "snake": (
            {"x": randn(b, c, 8 * n), "alpha": randn(c, scale=0.3), "beta": randn(c, scale=0.3)},
            ("x",),
            8 * b * n,
        ),
    }
    cases = []
    for op, (tensors, moving, terms) in inputs.items():
        module = importlib.import_module(f"mfmjt.kernels.{op}")
        around = wrap.get(op, lambda function: function)
        function, reference = (around(getattr(module, name)) for name in (op, f"{op}_ref"))
        terms = max(terms, math.prod(tensors[moving[0]].shape[2:]))
        cases.append(Case(op, s.name, function, reference, tensors, moving, terms))
    return cases
