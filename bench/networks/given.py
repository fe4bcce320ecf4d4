"""What every measurement of a network begins and ends with: inputs, counts, rows and targets."""

from __future__ import annotations

import contextlib
import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import FlopCounterMode

from bench import ROOT
from bench.case import TINY
from bench.clock import Sampler, Timing, take_turns
from bench.machine import environment
from bench.rows import KEY, Row, Rows, failure
from mfmjt.errors import RunError
from mfmjt.model import MFMJT
from mfmjt.model.config import CONFIGS, ModelConfig

__all__ = ["CPU", "Guard", "Target", "Workload", "compare", "count", "features", "hold", "network"]
__all__ += ["planned", "printed_by_python", "refused", "start", "unsupported"]

CPU = torch.device("cpu")


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


def count(work: Workload, call: Callable[[], object]) -> dict[str, int]:
    """Count what a call computes and keeps; in the FakeTensorMode of `work` it needs no memory.

    Returns:
        `flops`, of matmuls and convolutions, those of our library ops included; `saved_bytes`, kept
        for the backward pass besides weights and data, each buffer once.
    """
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
    saved = sum(storage.nbytes() for storage in kept.values())
    return {"flops": counter.get_total_flops(), "saved_bytes": saved}


def planned(table: str, device: str, *turns: str) -> Iterator[list[str]]:
    """Yield the words behind device and turn of a table's lines, of some turns or of all."""
    for line in table.strip().splitlines():
        on, turn, *words = line.split()
        if on == device and turn in (turns or [turn]):
            yield words


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
        wanted = {k: v if isinstance(v, (range, tuple)) else (v,) for k, v in self.where.items()}
        return all(row.get(k) in values for k, values in wanted.items())


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


def start(path: Path, key: tuple[str, ...] = KEY, **about: Any) -> Rows:
    """Begin a file of rows anew with what the measurement depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = Rows(path, key)
    rows.add({"what": "environment", **about, **environment(CPU)})
    return rows


def printed_by_python(*arguments: str) -> str:
    """Return what a new process of this Python prints, run in the source tree.

    Raises:
        RunError: Nothing.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    if not done.stdout.strip():
        raise RunError(f"Nothing was measured: {(done.stderr.strip() or '?').splitlines()[-1]}.")
    return done.stdout


def unsupported(error: Exception) -> Row:
    """Return the fields of the row of a provider that failed."""
    return {"status": "unsupported", "reason": failure(error)}


Guard = Callable[[Rows, Row], AbstractContextManager[None]]
"""Makes a row of what fails inside, from the fields that identify it."""


@contextlib.contextmanager
def refused(rows: Rows, about: Row) -> Iterator[None]:
    """Make a row of what fails inside: a compiler, for want of memory, or anybody's code."""
    try:
        yield
    except Exception as error:
        _show(rows.add({**about, **unsupported(error)}))


SHOWN = ["what", "network", "batch", "ratio", "provider", "status", "ms_p50", "cpu_ms_p50"]
SHOWN += ["over_flow", "over_mfmjt", "of_gemm", "flops_over_flow", "saved_over_flow", "reason"]


def _show(row: Row) -> None:
    print(*(f"{k} {row[k]}" for k in SHOWN if row.get(k) is not None), flush=True)


def compare(
    rows: Rows,
    abouts: Sequence[Row],
    prepare: Callable[[str], tuple[Row, Sampler | None]],
    bases: Mapping[str, Sequence[str]],
    finish: Callable[[Row], Row] = lambda row: {},
    guard: Guard = refused,
    has_time: Callable[[Row], bool] = lambda about: True,
    seconds: float = 5.0,
) -> None:
    """Verify and time providers that do the same work, and make a row of each that has none.

    On a CPU they take turns. On a GPU, where nobody else computes, each is timed as soon as it is
    verified, so that its row is written whatever happens next.

    Args:
        rows: Where they go.
        abouts: Fields that identify the rows, `provider` and `device` among them.
        prepare: Verifies a provider: fields of its row, and how to time it; None if it may not be.
        bases: Providers that others are held against, and the fields in which their rows agree:
            a time over that of "flow" is `over_flow`.
        finish: Makes more fields of a row that has times.
        guard: Makes a row of what fails.
        has_time: Whether there is time for a provider.
        seconds: To take the times of all in, where they take turns.
    """

    def add(row: Row, timing: Timing | None) -> None:
        if timing:
            row |= asdict(timing)
            for base, same in bases.items():
                wanted = {"provider": base, "status": "ok", **{k: row[k] for k in same}}.items()
                others = (r for r in (row, *reversed(rows.rows)) if wanted <= r.items())
                if other := next(others, None):
                    row[f"over_{base}"] = row["ms_p50"] / other["ms_p50"]
                    row[f"cpu_over_{base}"] = row["cpu_ms_p50"] / other["cpu_ms_p50"]
            row |= finish(row)
        _show(rows.add(row))

    if any("compile" in about["provider"] for about in abouts):
        torch.compiler.reset()  # what was compiled for other comparisons counts against a limit
    ready: dict[str, tuple[Row, Sampler]] = {}
    for about in abouts:
        if rows.has(**about) or not has_time(about):
            continue
        with guard(rows, about):
            fields, sampler = prepare(about["provider"])
            row = {**about, **fields}
            if sampler is None or about["device"] == "cuda":
                add(row, take_turns({"": sampler}, 0.3)[""] if sampler else None)
                del sampler
                gc.collect()
                torch.cuda.empty_cache()  # of its graph, too
            else:
                ready[about["provider"]] = row, sampler
    for name, timing in take_turns({k: s for k, (_, s) in ready.items()}, seconds).items():
        add(ready[name][0], timing)
