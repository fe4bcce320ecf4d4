"""Shapes, cases and what they cost: what every `bench/kernels/bench_<op>.py` is made of.

A case is an op on given sizes: its front door, its reference, the inputs to draw, and the least
work that any implementation must do, from which the roofline follows. Sizes come from the networks'
configurations. large_44k_v2 is deeper than medium_44k and has its widths and lengths, so that for
ops the two are one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.model.config import CONFIGS

__all__ = [
    "BACKWARD",
    "JVP",
    "JVP_BACKWARD",
    "MODES",
    "SCALES",
    "TINY",
    "VALUE",
    "Case",
    "Cost",
    "Function",
    "Input",
    "Operands",
    "Shape",
    "cases",
    "four_calls",
    "module",
    "operands",
    "shapes",
    "vocoder_stages",
]

VALUE, JVP, BACKWARD, JVP_BACKWARD = MODES = ("value", "jvp", "value+bwd", "jvp+bwd")
"""Value; value and tangent; value and gradients; all three."""

SCALES = ("gpu", "cpu", "check", "tiny")
"""What is timed on a GPU and on a CPU, what is checked on any device, and what tests run."""

TINY = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1}
"""A network in place of a real one, to see that something runs."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Shape(NamedTuple):
    """Sizes of a network's activations.

    Attributes:
        model: Name of the network's configuration.
        batch, length, dim, heads, hidden: B, N, C, H and the width of its feed-forward.
        streams: Tokens of the three streams of a joint block, the latent's first.
        headline: Of the first rows to look at; only there is torch.compile timed, as compiling
            takes longer than all the rest, and ours without its C++ kernels.
    """

    model: str
    batch: int
    length: int
    dim: int
    heads: int
    hidden: int
    streams: tuple[int, int, int]
    headline: bool = False

    @property
    def name(self) -> str:
        """The name of a case of this shape."""
        return f"{self.model} B={self.batch}"


def _shape(model: str, batch: int, headline: bool = False) -> Shape:
    c = CONFIGS[model]
    streams = (c.latent_length, c.video_length, c.text_length)
    sizes = (c.latent_length, c.hidden_dim, c.num_heads, c.mlp_hidden)
    return Shape(model, batch, *sizes, streams, headline)


def shapes(scale: str) -> list[Shape]:
    """The networks' shapes, those that matter most first.

    Args:
        scale: One of `SCALES`.
    """
    if scale == "gpu":
        big = [_shape("small_16k", batch, headline=True) for batch in (256, 2)]
        big += [_shape("small_16k", batch) for batch in (26, 1, 64)]
        others = ("small_44k", "medium_44k")
        return big + [_shape(model, b) for model in others for b in (256, 2, 26, 1, 64)]
    if scale == "cpu":
        rest = (("small_16k", 8), ("medium_44k", 2), ("nano", 16))
        return [_shape("small_16k", 2, headline=True), *(_shape(*pair) for pair in rest)]
    if scale == "check":
        return [_shape("nano", 16), _shape("small_16k", 4)]
    return [Shape("tiny", 1, 6, 8, 1, 12, (6, 2, 1))]


VOCODERS = {"gpu": {"16k": 500, "44k": 690}, "cpu": {"16k": 500}}
"""BigVGANs of a scale, and their frames of mel for 8 s of sound."""


def vocoder_stages(scale: str) -> list[tuple[str, int, int]]:
    """(model, channels, samples) of every stage of a scale's vocoders, the last stage first."""
    found: list[tuple[str, int, int]] = []
    for name, frames in VOCODERS.get(scale, {}).items():
        config = BIGVGAN_CONFIGS[name]
        channels, samples = config.width, frames
        for rate in config.rates:
            channels, samples = channels // 2, samples * rate
            found.insert(0, (f"bigvgan_{name}", channels, samples))
    return found or [("bigvgan_tiny", 4, 24)]


class Cost(NamedTuple):
    """Amounts for the value, for the tangent beside it, and for the gradients after it."""

    value: int
    tangent: int = 0
    backward: int = 0

    def of(self, mode: str) -> int:
        """The amount of a mode."""
        tangent = self.tangent if mode.startswith(JVP) else 0
        return self.value + tangent + (self.backward if mode.endswith("bwd") else 0)


@dataclass(frozen=True)
class Input:
    """One argument of an op.

    Attributes:
        shape: Its sizes.
        moves: It is an activation, which carries a tangent, and no weight.
        scale: Standard deviation of what is drawn.
        heads_first: In memory (B, H, N, D) lies as (B, H, N, D), seen as (B, N, H, D).
        constant: Makes a table that is an argument and neither moves nor gets a gradient.
    """

    shape: tuple[int, ...]
    moves: bool = True
    scale: float = 1.0
    heads_first: bool = False
    constant: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """An op on given sizes.

    Attributes:
        op: Name of the op.
        name: Name of the case among those of the op.
        model: Name of the network, or of whose shape it is.
        batch: B.
        length: Tokens or samples in all.
        inputs: Arguments by name.
        function: The op's front door, taking them by name.
        reference: Its plain PyTorch twin, likewise.
        flops: Two for each multiplication and addition of matrix products; other arithmetic is not
            counted.
        elements: Elements that a fused kernel reads and writes; tables and what has one element per
            token or channel are left out.
        terms: Length of the longest sum behind one element of any result.
        modes: Modes to time.
        headline: See `Shape`.
        inference: It has no derivatives, and `modes` is the value alone.
    """

    op: str
    name: str
    model: str
    batch: int
    length: int
    inputs: Mapping[str, Input]
    function: Function
    reference: Function
    flops: Cost
    elements: Cost
    terms: int
    modes: tuple[str, ...] = MODES
    headline: bool = False
    inference: bool = False

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the inputs that carry tangents."""
        return tuple(n for n, i in self.inputs.items() if i.moves and i.constant is None)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the inputs that get gradients."""
        return tuple(n for n, i in self.inputs.items() if i.constant is None)


def four_calls(case: Case) -> Case:
    """Forward mode four times over, on operands of their own, under one `torch.func.jvp`.

    That takes some 0.3 ms of a CPU by itself, as long as a short op. A network pays it once, and so
    this says more of the op than one call under it does.
    """

    def repeated(function: Function) -> Function:
        def run(**inputs: Tensor) -> tuple[Tensor, ...]:
            results: list[Tensor] = []
            for i in range(4):
                y = function(**{name: inputs[f"{name}_{i}"] for name in case.inputs})
                results += (y,) if isinstance(y, Tensor) else y
            return tuple(results)

        return run

    return replace(
        case,
        name=f"{case.name}, 4 calls",
        inputs={f"{n}_{i}": given for i in range(4) for n, given in case.inputs.items()},
        function=repeated(case.function),
        reference=repeated(case.reference),
        flops=Cost(*(4 * amount for amount in case.flops)),
        elements=Cost(*(4 * amount for amount in case.elements)),
        modes=(JVP,),
    )


class Operands(NamedTuple):
    """Numbers for a case: inputs by name, tangents of the moving ones, cotangents of the results.

    Attributes:
        leaves, dots, bars: As said.
    """

    leaves: dict[str, Tensor]
    dots: tuple[Tensor, ...]
    bars: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype, device: torch.device) -> Operands:
        """The same numbers elsewhere; tables keep their dtype."""

        def move(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype)

        leaves = {
            n: move(x).requires_grad_() if x.requires_grad else x.to(device)
            for n, x in self.leaves.items()
        }
        return Operands(leaves, tuple(map(move, self.dots)), tuple(map(move, self.bars)))

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        everything = (*self.leaves.values(), *self.dots, *self.bars)
        return sum(x.nbytes for x in everything)


def operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
    """Draw the numbers of a case; the same for the same seed, dtype and device."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def randn(like: Input) -> Tensor:
        shape = list(like.shape)
        if like.heads_first:
            shape[1], shape[2] = shape[2], shape[1]
        x = torch.randn(shape, dtype=wide, device=device, generator=generator)
        x = x.mul_(like.scale).to(dtype)
        return x.transpose(1, 2) if like.heads_first else x

    leaves = {
        name: randn(given).requires_grad_() if given.constant is None else given.constant()
        for name, given in case.inputs.items()
    }
    leaves = {name: x.to(device) if not x.requires_grad else x for name, x in leaves.items()}
    dots = tuple(
        randn(given) / given.scale for name, given in case.inputs.items() if name in case.moving
    )
    fake = torch._subclasses.FakeTensorMode()
    hollow = {name: fake.from_tensor(x.detach()) for name, x in leaves.items()}
    with fake, torch.no_grad():
        results = case.reference(**hollow)
    results = (results,) if isinstance(results, Tensor) else results
    bars = tuple(randn(Input(tuple(y.shape))) for y in results)
    return Operands(leaves, dots, bars)


def module(op: str) -> ModuleType:
    """The file of an op: it has `cases(scale)` and may have `providers(case)`."""
    return importlib.import_module(f"bench.kernels.bench_{op}")


def cases(op: str, scale: str) -> list[Case]:
    """The cases of an op, those that matter most first.

    Args:
        op: One of `bench_files()`.
        scale: One of `SCALES`.
    """
    found: list[Case] = module(op).cases(scale)
    return found
