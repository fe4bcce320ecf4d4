"""What a tangent costs a whole network, and how exact it is: ours against plain PyTorch.

    flops   of a forward and of a dual forward: as MeanFlow takes it, along z and t
    saved   bytes that a training step keeps for backward, without tangents and with one in each row
    time    of a forward and of a dual forward on this CPU, in turns
    du_dt   of a network in bfloat16, by autocast and by its weights, against float64

Plain PyTorch is the same network inside `kernels.reference()`. The first two are counted, on
tensors without memory. The network's sizes are a named configuration's; weights that start at zero
are drawn, so that everything counts. One file, DIR/dual.jsonl, is written anew; the exit status is
1 if small_16k misses a bar. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads are
not taken for work.

    python -m bench.model.bench_dual --out /tmp/dual
    python -m bench.model.bench_dual --out /tmp/dual --network nano --seconds 5
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.clock import on_cpu, take_turns
from bench.machine import environment
from mfmjt import kernels, meanflow
from mfmjt.files import atomic_path
from mfmjt.kernels import _native
from mfmjt.model import MFMJT

__all__ = ["BARS", "COSINE", "counted", "given", "judged", "main", "timed"]

BARRED = "small_16k"
BARS = {"flops": 2.0, "saved": 1.1, "time": 2.2, "du_dt": 1.5}
"""Most that of `BARRED` a dual forward may cost of a forward, a step with tangents of one without,
and that du/dt in bfloat16 may err of what plain PyTorch's does."""
COSINE = 0.999
"""Least cosine between du/dt in bfloat16 and in float64."""
PROVIDERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ours": contextlib.nullcontext,
    "reference": kernels.reference,
}
Cond = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """A network and what it is called with.

    Attributes:
        net: The network.
        x: Clean latents `(B, N, C)`.
        v: Tangent of latents, likewise.
        r: Ends of intervals `(B,)`.
        t: Their begins.
        cond: Features of video, synchronisation and text.
    """

    net: MFMJT
    x: Tensor
    v: Tensor
    r: Tensor
    t: Tensor
    cond: Cond

    def to(self, dtype: torch.dtype) -> Given:
        """All of it in another dtype, the network copied."""
        x, v, r, t = (value.to(dtype) for value in (self.x, self.v, self.r, self.t))
        cond = {name: value.to(dtype) for name, value in self.cond.items()}
        return Given(copy.deepcopy(self.net).to(dtype), x, v, r, t, cond)

    def forward(self) -> Tensor:
        """The average velocity u."""
        u: Tensor = self.net(self.x, self.r, self.t, **self.cond)
        return u

    def dual(self) -> tuple[Tensor, Tensor]:
        """The velocity and du/dt, as `meanflow.loss` takes them."""

        def f(z: Tensor, t: Tensor) -> Tensor:
            u: Tensor = self.net(z, self.r, t, **self.cond)
            return u

        u, du, *_ = torch.func.jvp(f, (self.x, self.t), (self.v, torch.ones_like(self.t)))
        return u, du


def given(name: str, batch: int, **overrides: Any) -> Given:
    """A network of a named configuration, random weights in place of zeros, and its inputs."""
    net = MFMJT.from_config(name, **overrides)
    with torch.no_grad():
        for parameter in net.parameters():
            if detect_fake_mode(parameter) is None and not parameter.any():
                parameter.normal_(std=0.02)
    c = net.config
    x, v = (torch.randn(batch, c.latent_length, c.latent_dim) for _ in range(2))
    t = torch.rand(batch)
    cond = {
        "video": torch.randn(batch, c.video_length, c.video_dim),
        "sync": torch.randn(batch, c.sync_length, c.sync_dim),
        "text": torch.randn(batch, c.text_length, c.text_dim),
    }
    return Given(net, x, v, t * torch.rand(batch), t, cond)


def _count_flops(call: Callable[[], object]) -> int:
    """What PyTorch counts, our library ops included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _saved_bytes(case: Given, ratio: float) -> int:
    """What a training step keeps for backward beside weights and conditions, each memory once.

    Args:
        case: Network and data.
        ratio: Share of rows with a tangent.
    """
    free = [*case.net.parameters(), *case.cond.values()]
    known = {tensor.untyped_storage()._cdata for tensor in free}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        meanflow.loss(case.net, case.x, case.cond, ratio=ratio)
    return sum(storage.nbytes() for storage in kept.values())


def _du_dt(case: Given, truth: Tensor, autocast: bool) -> tuple[float, float]:
    """Error of du/dt over its norm, and its cosine with the truth, in bfloat16.

    Args:
        case: Network and inputs in float32 or float64.
        truth: du/dt in float64.
        autocast: As training does it; else weights and inputs but for the times are in bfloat16.
    """
    if autocast:
        case = case.to(torch.float32)
    else:
        rounded = case.to(torch.bfloat16)
        case = Given(
            rounded.net, rounded.x, rounded.v, case.r.float(), case.t.float(), rounded.cond
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = case.dual()[1].double()
    error = float((found - truth).norm() / truth.norm())
    return error, float(torch.cosine_similarity(found.flatten(), truth.flatten(), dim=0))


def counted(name: str) -> Iterator[dict[str, Any]]:
    """Rows of FLOPs and of saved bytes."""
    with FakeTensorMode():
        case = given(name, batch=2)
        for provider, mode in PROVIDERS.items():
            with mode():
                with torch.no_grad():
                    forward, dual = _count_flops(case.forward), _count_flops(case.dual)
                yield _row("flops", provider, forward=forward, dual=dual, ratio=dual / forward)
                plain, tangents = _saved_bytes(case, 0.0), _saved_bytes(case, 1.0)
                yield _row(
                    "saved", provider, plain=plain, tangents=tangents, ratio=tangents / plain
                )


def timed(case: Given, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of milliseconds."""

    def within(mode: Callable[[], AbstractContextManager[Any]], call: Callable[[], object]) -> Any:
        def run() -> None:
            with mode(), torch.no_grad():
                call()

        run()  # the first call of all allocates and loads
        return on_cpu(run)

    samplers = {
        (provider, kind): within(mode, call)
        for provider, mode in PROVIDERS.items()
        for kind, call in (("forward", case.forward), ("dual", case.dual))
    }
    turns = take_turns({" ".join(key): sampler for key, sampler in samplers.items()}, seconds)
    for provider in PROVIDERS:
        forward, dual = (asdict(turns[f"{provider} {kind}"]) for kind in ("forward", "dual"))
        yield _row(
            *("time", provider),
            batch=len(case.x),
            forward=forward,
            dual=dual,
            ratio=dual["ms_p50"] / forward["ms_p50"],
            cpu_ratio=dual["cpu_ms_p50"] / forward["cpu_ms_p50"],
        )


def judged(case: Given) -> Iterator[dict[str, Any]]:
    """Rows of errors in bfloat16."""
    with torch.no_grad(), kernels.reference():
        truth = case.to(torch.float64).dual()[1]
    for dtype, autocast in (("bfloat16 autocast", True), ("bfloat16 weights", False)):
        found = {}
        for provider, mode in PROVIDERS.items():
            with mode():
                found[provider] = _du_dt(case, truth, autocast)
        for provider, (error, cosine) in found.items():
            ratio = error / found["reference"][0]
            yield _row("du_dt", provider, dtype=dtype, error=error, cosine=cosine, ratio=ratio)


def _row(what: str, provider: str, **fields: Any) -> dict[str, Any]:
    return {"what": what, "provider": provider, **{k: _short(v) for k, v in fields.items()}}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _missed(row: dict[str, Any]) -> bool:
    """Whether one of our rows is not within its bar."""
    if row["provider"] != "ours":
        return False
    return not (row["ratio"] <= BARS[row["what"]] and row.get("cosine", 1.0) >= COSINE)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, count and time; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model.bench_dual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--network", default="small_16k", help="a named configuration [small_16k]")
    parser.add_argument("--batch", type=int, default=2, help="of what is timed [2]")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times [60]")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    stamp = environment(torch.device("cpu")) | {"extension": _native.status()}
    rows = [{"what": "environment", "network": options.network, **stamp}]
    missed = False
    for found in (
        counted(options.network),
        timed(given(options.network, options.batch), options.seconds),
        judged(given(options.network, batch=1)),
    ):
        for row in found:
            print(json.dumps(row), flush=True)
            rows.append(row)
            missed = missed or (options.network == BARRED and _missed(row))
    with atomic_path(options.out / "dual.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
