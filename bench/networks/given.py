"""What every measurement of a network begins and ends with: inputs, counts, rows and targets."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import FlopCounterMode

from bench import parser
from bench.case import TINY
from bench.machine import environment
from bench.rows import Rows, line_of
from mfmjt.kernels import _native
from mfmjt.model import MFMJT
from mfmjt.model.config import CONFIGS, ModelConfig

__all__ = [
    "CPU",
    "Counts",
    "Row",
    "Target",
    "Workload",
    "command_line",
    "count",
    "features",
    "hold",
    "network",
    "start",
    "unsupported",
]

CPU = torch.device("cpu")
Row = dict[str, Any]


def network(name: str, length: int | None = None, tiny: bool = False, **overrides: Any) -> MFMJT:
    """Build a network with random weights in place of those that start at zero.

    Args:
        name: A named configuration.
        length: Latents; the configuration's own by default.
        tiny: Two blocks of 16 channels.
        **overrides: Fields of the configuration.
    """
    if length is not None:
        video, sync = CONFIGS[name].lengths(length)
        overrides |= {"latent_length": length, "video_length": video, "sync_length": sync}
    net = MFMJT.from_config(name, **(TINY if tiny else {}), **overrides)
    with torch.no_grad():
        for parameter in net.parameters():
            if detect_fake_mode(parameter) is None and not parameter.any():
                parameter.normal_(std=0.02)
    return net


def features(config: ModelConfig, batch: int) -> dict[str, Tensor]:
    """Draw the features that a network takes, `(batch, tokens, channels)` each, or pooled."""
    names = ("video", "sync", "text") if config.takes_video else ("text",)
    sizes = ((getattr(config, f"{n}_length"), getattr(config, f"{n}_dim")) for n in names)
    drawn = {name: torch.randn(batch, *size) for name, size in zip(names, sizes, strict=True)}
    if config.pooled_dim is not None:
        drawn["pooled"] = torch.randn(batch, config.pooled_dim)
    return drawn


@dataclass(frozen=True)
class Workload:
    """A network and a batch to train it on.

    Attributes:
        net: The network.
        x: Clean latents `(B, N, C)`.
        noise: Noise, likewise.
        r: Ends of the intervals `(B,)`.
        t: Their beginnings `(B,)`.
        cond: Features by name.
    """

    net: MFMJT
    x: Tensor
    noise: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Tensor]

    @classmethod
    def make(cls, name: str, batch: int, **options: Any) -> Workload:
        """Draw one; `options` are those of `network`."""
        net = network(name, **options)
        c = net.config
        x, noise = (torch.randn(batch, c.latent_length, c.latent_dim) for _ in range(2))
        t = torch.rand(batch)
        return cls(net, x, noise, t * torch.rand(batch), t, features(c, batch))

    def to(self, dtype: torch.dtype) -> Workload:
        """Return it in another dtype, the network copied; times are float32 at least."""
        cond = {name: value.to(dtype) for name, value in self.cond.items()}
        net, x, noise = copy.deepcopy(self.net).to(dtype), self.x.to(dtype), self.noise.to(dtype)
        r, t = (time.to(torch.promote_types(dtype, torch.float32)) for time in (self.r, self.t))
        return Workload(net, x, noise, r, t, cond)


class Counts(NamedTuple):
    """What a call computes and keeps.

    Attributes:
        flops: Of matmuls and convolutions, those of our library ops included.
        saved_bytes: Memory kept for the backward pass besides weights and data, each buffer once.
    """

    flops: int
    saved_bytes: int


def count(work: Workload, call: Callable[[], object]) -> Counts:
    """Count what a call computes and keeps; in the FakeTensorMode of `work` it needs no memory."""
    data = [*work.net.parameters(), *work.cond.values(), work.x, work.noise]
    known = {tensor.untyped_storage()._cdata for tensor in data}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, or another would get its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        call()
    return Counts(counter.get_total_flops(), sum(s.nbytes() for s in kept.values()))


class Target(NamedTuple):
    """A limit of a figure.

    Attributes:
        name: What the figure is.
        sense: "<=" or ">=".
        limit: The limit.
        column: Field of the rows that has it.
        where: Fields and values of the rows that it is about; a range or a tuple for several.
        best: The best of these rows counts, not the worst.
    """

    name: str
    sense: str
    limit: float
    column: str
    where: Mapping[str, Any]
    best: bool = False

    def held(self, rows: Iterable[Row]) -> tuple[float | None, bool | None]:
        """Return the figure, and whether the target is met; None where nothing was measured."""
        values = [row[self.column] for row in rows if self._is_about(row)]
        most = self.sense == "<="
        value = (max if most != self.best else min)(values, default=None)
        if value is None:
            return None, None
        return value, value <= self.limit if most else value >= self.limit

    def _is_about(self, row: Row) -> bool:
        if row.get("status", "ok") != "ok" or row.get(self.column) is None:
            return False
        several = (range, tuple)
        wanted = (
            (row.get(k), v if isinstance(v, several) else (v,)) for k, v in self.where.items()
        )
        return all(value in values for value, values in wanted)


def hold(rows: Sequence[Row], targets: Iterable[Target]) -> int:
    """Print what each target comes to; return 1 if one is missed or a result is wrong."""
    status = int(any(row.get("status") == "wrong" for row in rows))
    for target in targets:
        value, met = target.held(rows)
        word = {None: "not measured", True: "pass", False: "MISS"}[met]
        figure = "" if value is None else f"{value:.4g} "
        print(f"{word:12}  {target.name}: {figure}({target.sense} {target.limit:g})")
        status |= met is False
    return status


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m bench NAME` with the one option that all have."""
    command = parser(name, about)
    command.add_argument("--out", required=True, type=Path, help="folder of the results")
    return command


def start(path: Path, **about: Any) -> Rows:
    """Begin a file of rows anew with what the measurement depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = Rows(path)
    stamp = environment(CPU) | {"extension": _native.status()}
    rows.add({"what": "environment", **about, **stamp})
    return rows


def unsupported(error: Exception) -> Row:
    """Return the fields of the row of a provider that failed."""
    return {"status": "unsupported", "reason": f"{type(error).__name__}: {line_of(error)}"}
