"""Shapes, cases and what they cost: what every `bench/ops/<op>.py` is made of.

A case is an op on given sizes: its front door, its reference, the inputs to draw, and the least
work that any implementation must do, from which the roofline follows. Sizes come from the networks'
configurations. large_44k_v2 is deeper than medium_44k and has its widths and lengths, so that for
ops the two are one.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.model.config import CONFIGS
from mfmjt.testing import JVP, MODES, Function, Operands, as_tuple

__all__ = ["SCALES", "TINY", "Case", "Cost", "Input", "Shape", "cases", "module", "operands"]
__all__ += ["norm_cases", "rotation", "shapes", "vocoder_stages"]

SCALES = ("gpu", "cpu", "check", "aot", "tiny")
"""What is timed on a GPU and on a CPU, checked on any device, compiled for GPUs that are not there,
and run by tests."""

TINY = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1}
"""A network in place of a real one, to see that something runs."""


class Cost(NamedTuple):
    """Amounts for the value, for the tangent beside it, and for the gradients after it."""

    value: int
    tangent: int = 0
    backward: int = 0

    def of(self, mode: str) -> int:
        """Return the amount of a mode."""
        tangent = self.tangent if mode.startswith(JVP) else 0
        return self.value + tangent + (self.backward if mode.endswith("bwd") else 0)

    def times(self, n: int) -> Cost:
        """Return n times the amounts."""
        return Cost(*(n * amount for amount in self))


NO_PRODUCT = Cost(0)


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
        elements: Elements that a fused kernel reads and writes; tables and what has one element per
            token or channel are left out.
        terms: Length of the longest sum behind one element of any result.
        flops: Two for each multiplication and addition of matrix products; other arithmetic is not
            counted.
        modes: Modes to time.
        compile_too: See `Shape`.
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
    elements: Cost
    terms: int
    flops: Cost = NO_PRODUCT
    modes: tuple[str, ...] = MODES
    compile_too: bool = False
    inference: bool = False

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the inputs that carry tangents."""
        return tuple(n for n, i in self.inputs.items() if i.moves and i.constant is None)


class Shape(NamedTuple):
    """Sizes of a network's activations.

    Attributes:
        model: Name of the network's configuration.
        batch, length, dim, heads, hidden: B, N, C, H and the width of its feed-forward.
        streams: Tokens of the three streams of a joint block, the latent's first.
        compile_too: It is of the first rows to look at. Only there is torch.compile timed, as
            compiling takes longer than all the rest, and ours without its C++ kernels.
    """

    model: str
    batch: int
    length: int
    dim: int
    heads: int
    hidden: int
    streams: tuple[int, int, int]
    compile_too: bool = False

    @classmethod
    def of(cls, model: str, batch: int, compile_too: bool = False) -> Shape:
        """Return the shape of a network's configuration at a batch."""
        c = CONFIGS[model]
        streams = (c.latent_length, c.video_length, c.text_length)
        sizes = (c.latent_length, c.hidden_dim, c.num_heads, c.mlp_hidden)
        return cls(model, batch, *sizes, streams, compile_too)

    @property
    def name(self) -> str:
        """The name of a case of this shape."""
        return f"{self.model} B={self.batch}"

    @property
    def rows(self) -> tuple[int, int, int]:
        """The latent stream's (B, N, C)."""
        return self.batch, self.length, self.dim

    def case(self, op: str, inputs: Mapping[str, Input | tuple[int, ...]], **more: Any) -> Case:
        """Return the case of an op on this shape.

        Args:
            op: Its name.
            inputs: Arguments by name; sizes alone are those of an activation.
            more: Other attributes of the case.
        """
        drawn = {n: i if isinstance(i, Input) else Input(i) for n, i in inputs.items()}
        about = {"name": self.name, "length": self.length, "compile_too": self.compile_too, **more}
        return Case(op=op, model=self.model, batch=self.batch, inputs=drawn, **about)


def shapes(scale: str) -> list[Shape]:
    """Return the networks' shapes of one of `SCALES`, those that matter most first."""
    if scale == "gpu":
        big = [Shape.of("small_16k", batch, compile_too=True) for batch in (256, 2)]
        big += [Shape.of("small_16k", batch) for batch in (26, 1, 64)]
        others = ("small_44k", "medium_44k")
        return big + [Shape.of(model, b) for model in others for b in (256, 2, 26, 1, 64)]
    if scale == "cpu":
        small = Shape.of("small_16k", 2, compile_too=True)
        return [small, *(Shape.of(*n) for n in (("small_16k", 8), ("medium_44k", 2), ("nano", 16)))]
    if scale == "aot":
        networks = (("small_16k", 64), ("small_16k", 2), ("large_44k_v2", 8), ("nano", 16))
        first, one, *rest = (Shape.of(*network) for network in networks)
        return [first, one._replace(model="small_16k_one"), *rest]
    if scale == "widest":  # rows that norms take
        from mfmjt.kernels.triton.norm import MAX_WIDTH

        return [Shape("widest", 2, 64, MAX_WIDTH, 1, MAX_WIDTH, (64, 0, 0))]
    if scale == "check":
        return [Shape.of("nano", 16), Shape.of("small_16k", 4)]
    return [Shape("tiny", 1, 6, 8, 1, 12, (6, 2, 1))]


def norm_cases(
    op: str, scale: str, function: Function, reference: Function, moved: Cost, *rows: str
) -> list[Case]:
    """Return the cases of a modulated norm.

    Modulation is per token; where ops are checked, a sample's tokens share all but `scale`, and
    where they are compiled, `scale` too. In a second case tokens pick rows of fewer modulations, as
    the latent's tokens do of the frames of a video.

    Args:
        op: Its name.
        scale: One of `SCALES`, or "widest".
        function: The op.
        reference: Its twin.
        moved: What is read and written for each element of x.
        rows: Names of the inputs that have a row for each token, whatever the scale.
    """
    found = []
    for s in shapes(scale):
        one = (s.batch, 1, s.dim)
        sizes = {s.name: (one if scale == "check" else s.rows, s.rows)}
        if scale in ("aot", "widest"):
            sizes = {f"{s.name} per sample": (one, one), **sizes}
        for name, (first, second) in sizes.items():
            inputs = dict.fromkeys(rows, s.rows)
            inputs |= dict.fromkeys(("gate", "shift") if "h" in rows else ("shift",), first)
            costs = {"elements": moved.times(math.prod(s.rows)), "terms": max(s.length, s.dim)}
            about = {"name": name, "function": function, "reference": reference, **costs}
            found.append(s.case(op, inputs | {"scale": second}, **about))
        count = 192 * s.length // 250 or 1
        names = [n for n in (*inputs, "scale") if n not in rows]  # modulations
        few = dict.fromkeys(names, Input((s.batch, count, s.dim)))
        index = Input((s.length,), constant=functools.partial(_picked_rows, s.length, count))
        # Backward reads all modulations but shift, and writes the cotangents of all
        saved = Cost(len(names), len(names), 2 * len(names) - 1)
        saved = saved.times((s.length - count) * s.batch * s.dim)
        least = Cost(*(a - b for a, b in zip(moved.times(math.prod(s.rows)), saved, strict=True)))
        about |= {"name": f"{s.name} picked rows", "elements": least, "compile_too": False}
        found.append(s.case(op, {**inputs, **few, "rows": index}, **about))
    return found


def _picked_rows(tokens: int, rows: int) -> Tensor:
    return torch.arange(tokens) * rows // tokens


VOCODERS = {"gpu": {"16k": 500, "44k": 690}, "cpu": {"16k": 500}}
"""BigVGANs of a scale, and their frames of mel for 8 s of sound."""


def vocoder_stages(scale: str) -> list[tuple[str, int, int]]:
    """Return (model, channels, samples) of every stage of a scale's vocoders, the last first."""
    if scale == "aot":  # channels of a network, to have few kernels
        return [(s.model, s.dim, 8 * s.length) for s in shapes(scale)]
    found: list[tuple[str, int, int]] = []
    for name, frames in VOCODERS.get(scale, {}).items():
        config = BIGVGAN_CONFIGS[name]
        channels, samples = config.width, frames
        for rate in config.rates:
            channels, samples = channels // 2, samples * rate
            found.insert(0, (f"bigvgan_{name}", channels, samples))
    return found or [("bigvgan_tiny", 4, 24)]


@functools.lru_cache
def _angles(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 100 ** torch.linspace(0, 1, width // 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotation(length: int, width: int) -> Input:
    """Return the table of rotations (N, D / 2, 2) of a head of width D, which is a constant."""
    return Input((length, width // 2, 2), constant=functools.partial(_angles, length, width))


def four_calls(case: Case) -> Case:
    """Return forward mode four times over, on operands of their own, under one `torch.func.jvp`.

    That takes some 0.3 ms of a CPU by itself, as long as a short op. A network pays it once, and so
    this says more of the op than one call under it does.
    """

    def repeated(function: Function) -> Function:
        def run(**inputs: Tensor) -> tuple[Tensor, ...]:
            results: list[Tensor] = []
            for i in range(4):
                results += as_tuple(function(**{n: inputs[f"{n}_{i}"] for n in case.inputs}))
            return tuple(results)

        return run

    return replace(
        case,
        name=f"{case.name}, 4 calls",
        inputs={f"{n}_{i}": given for i in range(4) for n, given in case.inputs.items()},
        function=repeated(case.function),
        reference=repeated(case.reference),
        flops=case.flops.times(4),
        elements=case.elements.times(4),
        modes=(JVP,),
    )


def operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
    """Draw the numbers of a case; the same for the same seed, dtype and device."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.promote_types(dtype, torch.float32)

    def randn(like: Input) -> Tensor:
        shape = list(like.shape)
        if like.heads_first:
            shape[1], shape[2] = shape[2], shape[1]
        x = torch.randn(shape, dtype=drawn, device=device, generator=generator)
        x = x.mul_(like.scale).to(dtype)
        return x.transpose(1, 2) if like.heads_first else x

    inputs = {
        name: randn(i).requires_grad_() if i.constant is None else i.constant().to(device)
        for name, i in case.inputs.items()
    }
    tangents = {name: randn(case.inputs[name]) / case.inputs[name].scale for name in case.moving}
    fake = torch._subclasses.FakeTensorMode()
    shaped = {name: fake.from_tensor(x.detach()) for name, x in inputs.items()}
    with fake, torch.no_grad():
        results = as_tuple(case.reference(**shaped))
    return Operands(inputs, tangents, tuple(randn(Input(tuple(y.shape))) for y in results))


def module(op: str) -> ModuleType:
    """Return the file of an op: it has `cases(scale)` and may have `providers(case)`."""
    return importlib.import_module(f"bench.ops.{op}")


def cases(op: str, scale: str) -> list[Case]:
    """Return the cases of an op at one of `SCALES`, those that matter most first.

    On a CPU an op without a matrix product also has four calls under one `torch.func.jvp`.
    """
    found: list[Case] = module(op).cases(scale)
    short = found[0].flops == NO_PRODUCT and JVP in found[0].modes
    return [*found, four_calls(found[0])] if scale == "cpu" and short else found
