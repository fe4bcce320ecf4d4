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

from bench.case import Case, Cost, Input, Shape, rotation, shapes
from mfmjt.kernels import reference, streams
from mfmjt.testing import VALUE

__all__ = ["cases"]

TAPS = (3, 3, 1)
"""Of the feed-forward's filters: of the latent, of the video, of the text."""
Call = Callable[..., tuple[Tensor, ...]]
_PACKED: Any = WeakIdKeyDictionary()


def _of(given: dict[str, Tensor], name: str) -> list[Tensor]:
    """Return the tensors of all streams: name0, name1, ..."""
    return [given[f"{name}{i}"] for i in range(len(TAPS))]


def _packed(weight: Tensor, glu: bool = False) -> streams.Packed:
    """Arrange a weight as a network does when it is loaded: once."""
    if torch.compiler.is_compiling():
        return streams.Packed(weight, glu)
    if weight not in _PACKED:
        parts = weight.chunk(2 if glu else 1)
        _PACKED[weight] = streams.pack(*(part.transpose(1, 2) for part in parts))
    return _PACKED[weight]


def _windows(glu: bool, **given: Tensor) -> tuple[Tensor, ...]:
    weights = [_packed(weight, glu) for weight in _of(given, "weight")]
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


def _case(s: Shape, name: str, function: Call, inputs: dict[str, Input], **costs: Any) -> Case:
    return s.case(
        "streams",
        inputs,
        name=f"{s.name} {name}",
        length=sum(s.streams),
        function=function,
        reference=reference()(function),
        modes=(VALUE,),
        inference=True,
        **costs,
    )


def _weights(channels: int, outs: int, taps: tuple[int, ...]) -> dict[str, Input]:
    return {
        f"weight{i}": Input((outs, k, channels), moves=False, scale=(channels * k) ** -0.5)
        for i, k in enumerate(taps)
    }


def _tokens(s: Shape, name: str, channels: int, lengths: tuple[int, ...]) -> dict[str, Input]:
    return {f"{name}{i}": Input((s.batch, n, channels)) for i, n in enumerate(lengths)}


def _product(s: Shape, name: str, glu: bool, channels: int, outs: int) -> Case:
    """Return a product over windows, of which a gated unit writes half of what it computes."""
    inputs = _tokens(s, "x", channels, s.streams) | _weights(channels, outs, TAPS)
    windows = s.batch * sum(n * k for n, k in zip(s.streams, TAPS, strict=True))
    moved = s.batch * sum(s.streams) * (channels + outs // (1 + glu))
    return _case(
        *(s, name, functools.partial(_windows, glu), inputs),
        elements=Cost(moved + sum(TAPS) * channels * outs),
        terms=3 * channels,
        flops=Cost(2 * windows * channels * outs),
    )


def _projection(s: Shape) -> Case:
    """Return the projections to q, k and v, normalized and rotated."""
    width, rows, channels = s.dim // s.heads, s.batch * sum(s.streams), s.dim
    inputs = _tokens(s, "x", channels, s.streams) | _weights(channels, 3 * channels, (1, 1, 1))
    for i in range(3):
        inputs[f"bias{i}"] = Input((3 * channels,), moves=False)
        inputs |= {f"{name}_norm{i}": Input((width,), moves=False) for name in "qk"}
    inputs |= {f"rope{i}": rotation(n, width) for i, n in enumerate(s.streams[:2])}
    return _case(
        *(s, "qkv", functools.partial(_qkv, s.heads), inputs),
        elements=Cost(4 * rows * channels + 9 * channels**2),
        terms=channels,
        flops=Cost(6 * rows * channels**2),
    )


def _sum_and_norm(s: Shape) -> Case:
    """Return the gated sum and its modulated norm; the latent stream's is per token."""
    modulated = (s.streams[0], 1, 1)
    inputs = _tokens(s, "x", s.dim, s.streams) | _tokens(s, "h", s.dim, s.streams)
    inputs |= _tokens(s, "modulation", 3 * s.dim, modulated)
    elements = s.batch * (4 * sum(s.streams) + 3 * sum(modulated)) * s.dim
    return _case(s, "norm", _norm, inputs, elements=Cost(elements), terms=s.dim)


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale."""
    found: list[Case] = []
    for s in shapes(scale):
        found.append(_product(s, "gated unit", True, s.dim, 2 * s.hidden))
        found.append(_product(s, "back", False, s.hidden, s.dim))
        found += [_projection(s), _sum_and_norm(s)]
    return found
