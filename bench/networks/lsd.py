"""Measure what a gradient through a tangent costs, and whether LSD learns as its own formula does.

    step    a step of LSD of a network with all rows r < t: loss and gradients, in turns on this
            CPU, and the bytes that it keeps for backward besides weights and data
    moons   energy distance of one-step samples to two moons, after training; null where that ran
            away, as LSD may

`ours` is `meanflow.loss(target=lsd)` with our ops. `reference` of a step is the same in plain
PyTorch, `torch.func.jvp` with its graph; of moons it is the objective of LSD (arXiv 2505.18825) as
its trainers write it: three quarters flow matching, one quarter self-distillation, each term with a
batch of its own. `floor` is the distance of data from data.

DIR/lsd.jsonl is written anew. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads are
not taken for work.

Examples:
  python -m bench lsd --out /tmp/lsd
  python -m bench lsd --out /tmp/lsd --steps 100 --seconds 2
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import parser
from bench.clock import on_cpu, take_turns
from bench.networks.given import Workload, start
from bench.rows import Row
from mfmjt import kernels, meanflow

__all__ = ["Moons", "distance", "main", "moons", "steps", "trained"]

OURS, REFERENCE = "ours", "reference"
SHARE = 0.25  # of self-distillation


def steps(work: Workload, seconds: float) -> Iterator[Row]:
    """Yield rows of a step's milliseconds and saved bytes, and how far gradients are apart."""

    def loss(provider: str) -> Tensor:
        with kernels.reference() if provider == REFERENCE else contextlib.nullcontext():
            return meanflow.loss(
                *(work.net, work.x, work.cond),
                noise=work.noise,
                r=work.r,
                t=work.t,
                intervals=len(work.x),
                target=meanflow.lsd,
            )

    def step(provider: str) -> Tensor:
        work.net.zero_grad(set_to_none=True)
        loss(provider).backward()
        grads = [p.grad.flatten() for p in work.net.parameters() if p.grad is not None]
        return torch.cat(grads)

    def saved(provider: str) -> int:
        data = [*work.net.parameters(), *work.cond.values(), work.x, work.noise]
        known = {x.untyped_storage()._cdata for x in data}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(provider)
        del value
        return sum(storage.nbytes() for storage in kept.values())

    providers = (OURS, REFERENCE)
    gradients = {name: step(name) for name in providers}
    apart = (gradients[OURS] - gradients[REFERENCE]).norm() / gradients[REFERENCE].norm()
    turns = take_turns({n: on_cpu(functools.partial(step, n)) for n in providers}, seconds)
    for name in providers:
        yield {
            "what": "step",
            "provider": name,
            "batch": len(work.x),
            "saved_bytes": saved(name),
            "gradients_apart": float(apart),
            **vars(turns[name]),
        }


class Moons(nn.Module):
    """A small network u(z, r, t) of points in the plane, of our linear layers and SwiGLUs."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, width), nn.Linear(width, 2)
        self.up = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Return u (B, 2) for z (B, 2) and times (B,)."""
        times = torch.stack((r, t), -1) * math.pi
        x = torch.cat((z, times, times.cos(), times.sin()), -1)
        x = _linear(x, self.enter)
        for up, down in zip(self.up, self.down, strict=True):
            gate, linear = _linear(x, up).chunk(2, -1)
            x = x + _linear(kernels.swiglu(gate, linear), down)
        return _linear(x, self.leave)


def _linear(x: Tensor, layer: Any) -> Tensor:
    return kernels.linear(x, layer.weight, layer.bias)


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of two moons, (count, 2), of about unit spread."""
    angle = math.pi * torch.rand(count, generator=generator)
    second = torch.rand(count, generator=generator) < 0.5
    x = torch.where(second, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(second, 0.5 - angle.sin(), angle.sin()) - 0.25
    points = torch.stack((x, y), -1)
    return 1.5 * (points + 0.05 * torch.randn(points.shape, generator=generator))


def distance(made: Tensor, real: Tensor) -> float:
    """Return the energy distance of two sets of points."""
    within = (torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (made, real))
    return float(2 * torch.cdist(made, real).mean() - sum(within))


def _reference_loss(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return LSD's two terms as its trainers compute them, by `torch.func.jvp` with its graph."""

    def point(t: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.randn(x.shape, generator=generator)
        return torch.lerp(x, e, t[:, None]), e - x

    t = torch.rand(len(x), generator=generator)
    z, v = point(t)
    flow = (net(z, t, t) - v).square().mean()
    first, second = torch.rand(2, len(x), generator=generator)
    r, t = torch.minimum(first, second), torch.maximum(first, second)
    z, _ = point(t)
    u, du_dr, *_ = torch.func.jvp(lambda r: net(z, r, t), (r,), (torch.ones_like(r),))
    span = (t - r)[:, None]
    with torch.no_grad():
        goal = net(z - span * u, r, r)
    jump = (u - span * du_dr - goal).square().mean()
    return (1 - SHARE) * flow + SHARE * jump


def trained(provider: str, count: int, seed: int = 0, batch: int = 256) -> nn.Module:
    """Return a network after `count` steps of Adam on two moons."""
    torch.manual_seed(seed)
    net, generator = Moons(), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, count)
    for _ in range(count):
        x = moons(batch, generator)
        if provider == OURS:
            loss = meanflow.loss(
                *(net, x),
                ratio=SHARE,
                time_sampler=meanflow.uniform(),
                target=meanflow.lsd,
                generator=generator,
            )
        else:
            with kernels.reference():
                loss = _reference_loss(net, x, generator)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # LSD may run away without
        adam.step()
        schedule.step()
    return net


def _of_moons(count: int, seeds: int) -> Iterator[Row]:
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        real, other = moons(2000, generator), moons(2000, generator)
        noise = torch.randn(2000, 2, generator=generator)
        row: Row = {"what": "moons", "steps": count, "seed": seed}
        yield {**row, "provider": "floor", "distance": distance(other, real)}
        for provider in (OURS, REFERENCE):
            net = trained(provider, count, seed)
            found = distance(meanflow.sample(net, noise), real)
            yield {**row, "provider": provider, "distance": found if found < math.inf else None}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; return the exit status."""
    usage = parser("lsd", __doc__, out="")
    usage.add_argument("--network", default="nano", help="a named configuration [nano]")
    usage.add_argument("--batch", type=int, default=4, help="of what is timed [4]")
    usage.add_argument("--seconds", type=float, default=30.0, help="for the times [30]")
    usage.add_argument("--steps", type=int, default=2000, help="of training on two moons [2000]")
    usage.add_argument("--seeds", type=int, default=3, help="trainings of each [3]")
    options = usage.parse_args(argv)
    torch.manual_seed(0)
    rows = start(options.out / "lsd.jsonl", network=options.network)
    work = Workload.make(options.network, options.batch)
    for measured in (steps(work, options.seconds), _of_moons(options.steps, options.seeds)):
        for row in measured:
            print(json.dumps(rows.add(row)), flush=True)
    return 0
