"""`streams` on a joint block's sub-layers, for inference: all three streams in one call.

The reference does the same stream by stream. FLOPs are those of the products; weights count among
the elements that move, because at batch 1 they are most of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bench.cases import VALUE, Case, Cost, Input, Shape, shapes
from mfmjt.kernels import reference, streams

__all__ = ["cases"]

TAPS = (3, 3, 1)
"""Of the feed-forward's filters: of the latent, of the video, of the text."""
Call = Callable[..., tuple[Tensor, ...]]
_PACKED: Any = WeakIdKeyDictionary()


@functools.lru_cache
def _rope(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 100 ** torch.linspace(0, 1, width // 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _of(given: dict[str, Tensor], name: str) -> list[Tensor]:
    """The tensors of all streams: name0, name1, ..."""
    return [given[f"{name}{i}"] for i in range(len(TAPS))]


def _packed(weight: Tensor, glu: bool = False) -> streams.Packed:
    """As a network arranges it when it is loaded: once."""
    if torch.compiler.is_compiling():
        return streams.Packed(weight, glu)
    if weight not in _PACKED:
        parts = weight.chunk(2 if glu else 1)
        _PACKED[weight] = streams.pack(*(part.transpose(1, 2) for part in parts))
    return _PACKED[weight]


def _gated(**given: Tensor) -> tuple[Tensor, ...]:
    weights = [_packed(w, glu=True) for w in _of(given, "weight")]
    return tuple(streams.project(_of(given, "x"), weights))


def _back(**given: Tensor) -> tuple[Tensor, ...]:
    weights = [_packed(w) for w in _of(given, "weight")]
    return tuple(streams.project(_of(given, "x"), weights))


def _qkv(heads: int, **given: Tensor) -> tuple[Tensor, ...]:
    qs, ks, vs = streams.project_qkv(
        _of(given, "x"),
        [_packed(w) for w in _of(given, "weight")],
        _of(given, "bias"),
        _of(given, "q_norm"),
        _of(given, "k_norm"),
        [given["rope0"], given["rope1"], None],
        heads,
    )
    return (*qs, *ks, *vs)


def _norm(**given: Tensor) -> tuple[Tensor, ...]:
    modulations = [m.chunk(3, dim=-1) for m in _of(given, "modulation")]
    gates, shifts, scales = ([m[i] for m in modulations] for i in range(3))
    xs, hs = _of(given, "x"), _of(given, "h")
    totals, ys = streams.gated_residual_norm(xs, hs, gates, shifts, scales, None, eps=1e-5)
    return (*totals, *ys)


def _by_reference(function: Call) -> Call:
    def plain(**given: Tensor) -> tuple[Tensor, ...]:
        with reference():
            return function(**given)

    return plain


def _products(s: Shape, channels: int, outs: int, taps: tuple[int, ...]) -> tuple[Any, ...]:
    """Inputs, FLOPs and elements of a product; half of what a gated unit computes leaves it."""
    rows = [s.batch * n for n in s.streams]
    inputs = {f"x{i}": Input((s.batch, n, channels)) for i, n in enumerate(s.streams)}
    for i, k in enumerate(taps):
        shape, scale = (outs, k, channels), (channels * k) ** -0.5
        inputs[f"weight{i}"] = Input(shape, moves=False, scale=scale)
    flops = sum(2 * n * k * channels * outs for n, k in zip(rows, taps, strict=True))
    return inputs, flops, sum(rows), sum(taps) * channels * outs


def cases(scale: str) -> list[Case]:
    """Cases of a scale."""
    found: list[Case] = []
    for s in shapes(scale):
        width, length = s.dim // s.heads, sum(s.streams)

        def add(
            name: str,
            inputs: dict[str, Input],
            function: Call,
            flops: int,
            elements: int,
            terms: int,
            s: Shape = s,
            length: int = length,
        ) -> None:
            found.append(
                Case(
                    op="streams",
                    name=f"{s.name} {name}",
                    model=s.model,
                    batch=s.batch,
                    length=length,
                    inputs=inputs,
                    function=function,
                    reference=_by_reference(function),
                    flops=Cost(flops),
                    elements=Cost(elements),
                    terms=terms,
                    modes=(VALUE,),
                    headline=s.headline,
                    inference=True,
                )
            )

        inputs, flops, rows, weights = _products(s, s.dim, 2 * s.hidden, TAPS)
        elements = rows * (s.dim + s.hidden) + weights
        add("gated unit", inputs, _gated, flops, elements, 3 * s.dim)
        inputs, flops, rows, weights = _products(s, s.hidden, s.dim, TAPS)
        elements = rows * (s.dim + s.hidden) + weights
        add("back", inputs, _back, flops, elements, 3 * s.hidden)

        inputs, flops, rows, weights = _products(s, s.dim, 3 * s.dim, (1, 1, 1))
        for i in range(3):
            inputs[f"weight{i}"] = Input((3 * s.dim, 1, s.dim), moves=False, scale=s.dim**-0.5)
            inputs[f"bias{i}"] = Input((3 * s.dim,), moves=False)
            inputs |= {f"{name}_norm{i}": Input((width,), moves=False) for name in "qk"}
        for i, n in enumerate(s.streams[:2]):
            make = functools.partial(_rope, n, width)
            inputs[f"rope{i}"] = Input((n, width // 2, 2), constant=make)
        qkv = functools.partial(_qkv, s.heads)
        add("qkv", inputs, qkv, flops, 4 * rows * s.dim + weights, s.dim)

        inputs = {
            f"{name}{i}": Input((s.batch, n, s.dim))
            for name in ("x", "h")
            for i, n in enumerate(s.streams)
        }
        tokens = (s.streams[0], 1, 1)
        for i, n in enumerate(tokens):
            inputs[f"modulation{i}"] = Input((s.batch, n, 3 * s.dim))
        elements = (4 * rows + 3 * s.batch * sum(tokens)) * s.dim
        add("norm", inputs, _norm, 0, elements, s.dim)
    return found
