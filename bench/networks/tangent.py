"""Measure what a tangent costs a network, and how exact it is: ours against plain PyTorch.

    flops   of a forward and of a dual forward: as MeanFlow takes it, along z and t
    saved   bytes that a training step keeps for backward, without tangents and with one in each row
    time    of a forward and of a dual forward on this CPU, in turns
    du_dt   of a network in bfloat16, by autocast and by its weights, against float64

Plain PyTorch is the same network inside `kernels.reference()`. The first two are counted, on
tensors without memory. One file, DIR/dual.jsonl, is written anew; the exit status is 1 if small_16k
misses a target. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads are not taken for
work.

Examples:
  python -m bench tangent --out /tmp/tangent
  python -m bench tangent --out /tmp/tangent --network nano --seconds 5
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import parser
from bench.clock import on_cpu, take_turns
from bench.networks.given import Target, Workload, count, hold, start
from bench.rows import Row
from mfmjt import kernels, meanflow

__all__ = ["TARGETS", "counted", "judged", "main", "timed"]

HELD = "small_16k"
OURS, REFERENCE = "ours", "reference"
PROVIDERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    OURS: contextlib.nullcontext,
    REFERENCE: kernels.reference,
}
LIMITS = {
    "flops": ("FLOPs of a dual forward over a forward's", "<=", 2.0, "ratio"),
    "saved": ("bytes saved with tangents over those without", "<=", 1.1, "ratio"),
    "time": ("time of a dual forward over a forward's", "<=", 2.2, "ratio"),
    "du_dt": ("error of du/dt in bfloat16 over plain PyTorch's", "<=", 1.5, "ratio"),
    "cosine": ("cosine of du/dt in bfloat16 and float64", ">=", 0.999, "cosine"),
}
TARGETS = {
    key: Target(*limit, {"what": "du_dt" if key == "cosine" else key, "provider": OURS})
    for key, limit in LIMITS.items()
}


def _forward(work: Workload) -> Tensor:
    u: Tensor = work.net(work.x, work.r, work.t, **work.cond)
    return u


def _dual(work: Workload) -> tuple[Tensor, Tensor]:
    """Return the velocity and du/dt, as `meanflow.loss` takes them."""

    def f(z: Tensor, t: Tensor) -> Tensor:
        u: Tensor = work.net(z, work.r, t, **work.cond)
        return u

    dots = (work.noise - work.x, torch.ones_like(work.t))
    u, du_dt, *_ = torch.func.jvp(f, (work.x, work.t), dots)
    return u, du_dt


def counted(name: str) -> Iterator[Row]:
    """Yield rows of FLOPs and of saved bytes."""
    with FakeTensorMode():
        work = Workload.make(name, batch=2)
        for provider, mode in PROVIDERS.items():
            about = {"provider": provider}
            with mode():
                with torch.no_grad():
                    calls = (functools.partial(f, work) for f in (_forward, _dual))
                    forward, dual = (count(work, call)["flops"] for call in calls)
                row: Row = {"forward": forward, "dual": dual, "ratio": dual / forward}
                yield {"what": "flops", **about, **row}
                loss = functools.partial(meanflow.loss, work.net, work.x, work.cond)
                calls = (functools.partial(loss, ratio=ratio) for ratio in (0.0, 1.0))
                plain, tangents = (count(work, call)["saved_bytes"] for call in calls)
                row = {"plain": plain, "tangents": tangents, "ratio": tangents / plain}
                yield {"what": "saved", **about, **row}


def timed(work: Workload, seconds: float) -> Iterator[Row]:
    """Yield rows of milliseconds, taken in turns for about `seconds`."""

    def run(provider: str, function: Callable[[Workload], object]) -> None:
        with PROVIDERS[provider](), torch.no_grad():
            function(work)

    calls = {
        (provider, function): functools.partial(run, provider, function)
        for provider in PROVIDERS
        for function in (_forward, _dual)
    }
    for call in calls.values():
        call()  # the first call of all allocates and loads
    turns = take_turns({name: on_cpu(call) for name, call in calls.items()}, seconds)
    for provider in PROVIDERS:
        forward, dual = (turns[provider, function] for function in (_forward, _dual))
        yield {
            "what": "time",
            "provider": provider,
            "batch": len(work.x),
            "forward": vars(forward),
            "dual": vars(dual),
            "ratio": dual.ms_p50 / forward.ms_p50,
            "cpu_ratio": dual.cpu_ms_p50 / forward.cpu_ms_p50,
        }


def judged(work: Workload) -> Iterator[Row]:
    """Yield rows of the errors of du/dt: over its norm, and over plain PyTorch's."""
    with torch.no_grad(), kernels.reference():
        truth = _dual(work.to(torch.float64))[1]
    for dtype, autocast in (("bfloat16 autocast", True), ("bfloat16 weights", False)):
        low = work if autocast else work.to(torch.bfloat16)
        rates = {}
        for provider, mode in PROVIDERS.items():
            with mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                rates[provider] = _dual(low)[1].double()
        errors = {name: float((du - truth).norm() / truth.norm()) for name, du in rates.items()}
        for provider, du in rates.items():
            yield {
                "what": "du_dt",
                "provider": provider,
                "dtype": dtype,
                "error": errors[provider],
                "cosine": float(torch.cosine_similarity(du.flatten(), truth.flatten(), dim=0)),
                "ratio": errors[provider] / errors[REFERENCE],
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, count and time; return the exit status."""
    usage = parser("tangent", __doc__, out="")
    usage.add_argument("--network", default=HELD, help=f"a named configuration [{HELD}]")
    usage.add_argument("--batch", type=int, default=2, help="of what is timed [2]")
    usage.add_argument("--seconds", type=float, default=60.0, help="for the times [60]")
    options = usage.parse_args(argv)
    torch.manual_seed(0)
    rows = start(options.out / "dual.jsonl", network=options.network)
    for measured in (
        counted(options.network),
        timed(Workload.make(options.network, options.batch), options.seconds),
        judged(Workload.make(options.network, batch=1)),
    ):
        for row in measured:
            print(json.dumps(rows.add(row)), flush=True)
    return hold(rows.rows, TARGETS.values() if options.network == HELD else ())
