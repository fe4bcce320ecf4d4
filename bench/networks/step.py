"""Measure what a MeanFlow training step costs over one of flow matching and over PyTorch's ways.

A step is loss and gradients, without the optimizer. The providers:

    flow               flow matching with our ops: what everything is held against
    flow_pytorch       the same in plain PyTorch
    mfmjt              `meanflow.loss`: tangents in the rows with r < t, none of them on the tape
    mfmjt_rows         that in one call with all rows, which a CPU takes anyway
    jvp                `func.jvp` over all rows in plain PyTorch, tangents on the tape
    jvp_compiled       that through torch.compile, with --compile only: it compiles for minutes
    mfmjt_compiled     ours through it, likewise
    jvp_no_grad        `func.jvp` over all rows without a graph beside a forward with one, PyTorch
    finite_difference  two more evaluations in place of a tangent, ours; not exact
    improved           improved MeanFlow, ours: another objective, for information
    alpha_flow         alpha-Flow, ours: likewise

mfmjt and the jvp are the same loss and the same gradients: in float32 they must be, before they are
timed. The first call is counted: FLOPs, and bytes that are saved for backward, each buffer once
(small_16k at its full length on tensors without memory). Timed in turns, wall and CPU time of this
CPU; `python -m bench gpu --part step` times a GPU. `over_flow` is a ratio of medians, `of_gemm` a
provider's counted FLOPs a second over what a large matmul reaches in the same run.

There is no peak of memory here: saved bytes stand for it. A small_16k step at full length and batch
10 is 1.8 TFLOP, many seconds of a CPU, and func.jvp's tape keeps 8.7 GB, so it is timed at few
ratios; at 1.0 also with latents of 2 s instead of 8. The rest is nano. What --minutes does not
reach is said to be skipped.

DIR/train_step.jsonl is written anew; `python -m bench report DIR` makes a table of it. The exit
status is 1 if a target is missed, or a provider wrong. Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100
so that idle threads are not taken for work.

Examples:
  python -m bench step --out /tmp/step
  python -m bench step --out /tmp/step --compile --minutes 15
  python -m bench step --out /tmp/step --smoke
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import parser
from bench.clock import Sampler, cuda_events, of_graph, on_cpu, recorded, take_turns
from bench.machine import Ceilings, peak_mib
from bench.networks.given import (
    CPU,
    Target,
    Workload,
    compare,
    count,
    hold,
    planned,
    start,
    unsupported,
)
from bench.rows import STEP, Row, Rows, dtype_name
from mfmjt import kernels, meanflow
from mfmjt.meanflow import tangent, targets
from mfmjt.memory import keep_memory
from mfmjt.model.config import CONFIGS

__all__ = ["FLOW", "METHODS", "OURS", "TARGETS", "Method", "Training", "TrainingPlan"]
__all__ += ["agreement", "main", "plans", "time_plan"]

VERIFIED_ROWS = 4


def _without_graph(
    f: targets.Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return MeanFlow's target, the derivative taken apart from the prediction."""
    with torch.no_grad():
        target = meanflow.mean_velocity(f, z, r, t, v, cond)[1]
    return f(z, r, t, **cond), target


@dataclass(frozen=True)
class Method:
    """One way to a training step.

    Attributes:
        target: What rows with r < t are regressed to; None for flow matching.
        whole: All rows are treated as if they had r < t.
        pytorch: PyTorch's own ops, not ours.
        exact: The loss is MeanFlow's, and the gradient its.
        compiled: Through torch.compile.
        at_once: One call with all rows, tangents beside, as is quicker on a CPU.
    """

    target: targets.Target | None = meanflow.mean_velocity
    whole: bool = False
    pytorch: bool = False
    exact: bool = True
    compiled: bool = False
    at_once: bool = False


METHODS = {
    "flow": Method(None, exact=False),
    "flow_pytorch": Method(None, pytorch=True, exact=False),
    "mfmjt": Method(),
    "mfmjt_rows": Method(at_once=True),
    "jvp": Method(whole=True, pytorch=True),
    "jvp_compiled": Method(whole=True, pytorch=True, compiled=True),
    "mfmjt_compiled": Method(compiled=True),
    "jvp_no_grad": Method(_without_graph, whole=True, pytorch=True),
    "finite_difference": Method(meanflow.finite_difference(), exact=False),
    "improved": Method(meanflow.improved_mean_velocity, exact=False),
    "alpha_flow": Method(meanflow.alpha_flow(0.1), exact=False),
}
"""By the name of the provider."""
FLOW, OURS, TRUTH = "flow", "mfmjt", "jvp"
OF_PYTORCH = (FLOW, OURS, "jvp", "jvp_no_grad")
ON_CPU = tuple(name for name, method in METHODS.items() if not method.at_once)
"""A CPU takes all rows at once by itself."""

HELD, LEAST_BATCH, SHORT = "small_16k", 10, 63
"""Network and batch that targets are for; latents of 2 s."""
FULL = CONFIGS[HELD].latent_length


def _target(name: str, sense: str, limit: float, column: str, **where: Any) -> Target:
    """Return a target of ours at 0.1 on a CPU, unless `where` says otherwise."""
    about: Row = {"what": "timed", "provider": OURS, "ratio": 0.1, "device": "cpu"}
    about |= {"network": HELD, "batch": range(LEAST_BATCH, 10**6), "length": FULL}
    return Target(name, sense, limit, column, about | where)


_EXACT = tuple(name for name, method in METHODS.items() if method.pytorch and method.exact)
_BEST: Row = {"provider": _EXACT, "ratio": 1.0, "length": (SHORT, FULL)}
_MEDIUM: Row = {"network": "medium_44k", "length": CONFIGS["medium_44k"].latent_length}
_SAVED = "saved_over_flow"
_TARGETS = (
    _target("FLOPs at 0.1, over flow", "<=", 1.04, "flops_over_flow", what="counted"),
    _target("saved bytes at 0.1, over flow", "<=", 1.05, _SAVED, what="counted"),
    _target("saved bytes at 1.0, over flow", "<=", 1.3, _SAVED, what="counted", ratio=1.0),
    _target("CPU wall at 0.1, over flow", "<=", 1.08, "over_flow"),
    _target("CPU wall at 1.0, best exact PyTorch over mfmjt", ">=", 1.4, "over_mfmjt", **_BEST),
    _target("GPU time at 0.1, over flow", "<=", 1.06, "over_flow", device="cuda"),
    _target("GPU ms, small_16k at 0.1, batch 256", "<=", 105.0, "ms_p50", device="cuda", batch=256),
    _target("GPU of GEMM at 0.1, medium_44k", ">=", 0.45, "of_gemm", device="cuda", **_MEDIUM),
)
TARGETS = {target.name: target for target in _TARGETS}


class TrainingPlan(NamedTuple):
    """What to time: a network at a batch and a length, at some ratios.

    Attributes:
        network: A named configuration.
        batch: Rows.
        length: Latents.
        ratios: Fractions of the rows with r < t.
        providers: Names of `METHODS`.
    """

    network: str
    batch: int
    length: int
    ratios: tuple[float, ...]
    providers: tuple[str, ...]


PLANS = """
cpu   headline small_16k  10  250 0.1     flow mfmjt
cpu   headline small_16k  10  63  1.0     flow mfmjt jvp jvp_no_grad jvp_compiled mfmjt_compiled
cpu   headline small_16k  10  250 1.0     flow mfmjt jvp jvp_no_grad
cpu   headline nano       10  250 0.1,1.0,0.25,0.75,0.0 all
cpu   headline nano       40  250 0.1,1.0 flow mfmjt
cuda  headline small_16k  256 250 0.1     flow mfmjt mfmjt_rows flow_pytorch
cuda  headline small_16k  256 250 1.0     mfmjt
cuda  headline small_16k  256 250 0.1     jvp_no_grad
cuda  headline small_16k  64  250 0.1     flow mfmjt mfmjt_rows flow_pytorch
cuda  headline small_16k  64  250 1.0     mfmjt
cuda  headline small_16k  64  250 0.1     jvp_no_grad
cuda  compiled small_16k  64  250 0.1     flow mfmjt_compiled jvp_compiled
cuda  rest     medium_44k 64  345 0.1     flow mfmjt
cuda  rest     nano       64  250 0.1     flow mfmjt
cuda  rest     small_16k  64  250 1.0,0.25,0.75 mfmjt jvp
cuda  rest     small_16k  64  250 0.1     jvp finite_difference improved alpha_flow
smoke headline nano       10  16  0.1,1.0 all
tiny  headline nano       10  16  0.1     flow mfmjt mfmjt_rows flow_pytorch
tiny  headline nano       10  16  1.0     mfmjt
"""
"""Device, turn, network, batch, latents, ratios and providers; what has a target comes first.

"smoke" is a CPU's and "tiny" a GPU's, to see that they run; "all" is all that a CPU can tell apart.
"""


def plans(device: str, turn: str = "headline") -> list[TrainingPlan]:
    """Return what is timed on a device in a turn."""
    found = []
    for name, batch, length, ratios, *providers in planned(PLANS, device, turn):
        names = ON_CPU if providers == ["all"] else tuple(providers)
        fractions = tuple(map(float, ratios.split(",")))
        found.append(TrainingPlan(name, int(batch), int(length), fractions, names))
    return found


class Training:
    """A network, its data, and the steps on them.

    Args:
        sizes: A network, a batch and a length.
        device: Where.
        dtype: float32, or what autocast casts to.
        tiny: Two blocks of 16 channels.
    """

    def __init__(
        self,
        sizes: tuple[str, int, int],
        device: torch.device,
        dtype: torch.dtype,
        tiny: bool = False,
    ) -> None:
        network, self.batch, length = sizes
        with torch.device(device):
            self.work = Workload.make(network, self.batch, length=length, tiny=tiny)
        self.device, self.dtype = device, dtype
        self.verdicts: dict[Method, Row] = {}

    def step(
        self, method: Method, ratio: float, rows: int | None = None, exact: bool = False
    ) -> Callable[[], Tensor]:
        """Return a function that gives the loss and leaves the gradients.

        Args:
            method: How.
            ratio: Fraction of the rows with r < t, the first ones.
            rows: Only these first rows of the batch.
            exact: Without autocast.
        """
        work, rows = self.work, rows or self.batch
        moving = 0 if method.target is None else round(ratio * rows)
        t = work.t[:rows]
        r = torch.where(torch.arange(rows, device=self.device) < moving, work.r[:rows], t)
        x, noise = work.x[:rows], work.noise[:rows]
        cond = {name: value[:rows] for name, value in work.cond.items()}
        low = self.dtype != torch.float32 and not exact

        def loss() -> Tensor:
            return meanflow.loss(
                *(work.net, x, cond),
                noise=noise,
                r=r,
                t=t,
                intervals=rows if method.whole else moving,
                target=method.target or meanflow.mean_velocity,
            )

        forward = torch.compile(loss, dynamic=False) if method.compiled else loss

        def step() -> Tensor:
            work.net.zero_grad(set_to_none=True)
            with contextlib.ExitStack() as stack:
                if method.pytorch:
                    stack.enter_context(kernels.reference())
                if method.at_once:  # wherever it can, on any device
                    at_once = patch.object(tangent, "one_call_is_cheaper", lambda z, n: n > 0)
                    stack.enter_context(at_once)
                with torch.autocast(self.device.type, self.dtype, enabled=low):
                    value = forward()
                value.backward()
            return value.detach()

        return step

    def gradients(self) -> Tensor:
        """Return all gradients in one vector; the parameter itself where it has none."""
        parameters = self.work.net.parameters()
        return torch.cat([(p if p.grad is None else p.grad).detach().flatten() for p in parameters])

    @functools.cached_property
    def truth(self) -> tuple[float, Tensor]:
        """Loss and gradients of plain PyTorch, for `judge`."""
        return self._exactly(METHODS[TRUTH])

    def _exactly(self, method: Method) -> tuple[float, Tensor]:
        loss = self.step(method, 0.5, min(VERIFIED_ROWS, self.batch), exact=True)()
        return float(loss), self.gradients()

    def judge(self, method: Method) -> Row:
        """Compare a method with `jvp`, in float32, on a few rows half of which have r < t.

        If it is exact, half of the digits must agree, in the loss and in all gradients together.
        Each method is judged once.

        Returns:
            `status`, which is "ok", "wrong" or "unsupported"; `gradient_error`, the relative
            distance of the gradients, unless the method failed; else the `reason`.
        """
        if method not in self.verdicts:
            self.verdicts[method] = self._judged(method)
            self.work.net.zero_grad(set_to_none=True)
        return self.verdicts[method]

    def _judged(self, method: Method) -> Row:
        loss, gradient = self.truth
        try:
            its_loss, its_gradient = self._exactly(method)
        except Exception as error:  # of a compiler, or for want of memory
            return unsupported(error)
        of_loss, of_gradient = abs(its_loss / loss - 1), distance(its_gradient, gradient)
        allowed = torch.finfo(torch.float32).eps ** 0.5
        row: Row = {"status": "ok", "gradient_error": of_gradient}
        if method.exact and not (of_gradient <= allowed and of_loss <= allowed):
            why = f"loss {of_loss:.1e}, gradients {of_gradient:.1e} off; {allowed:.1e} is allowed"
            row |= {"status": "wrong", "reason": why}
        return row

    def count(self, ratio: float, name: str) -> Row:
        """Run a step and return its `flops` and `saved_bytes`; nothing compiled can be counted."""
        return count(self.work, self.step(METHODS[name], ratio))

    def prepare(self, ratio: float, name: str) -> tuple[Row, Sampler | None]:
        """Return fields of a provider's row, and how to time it; None if it may not be.

        On a GPU a replay is timed: issued by Python a step takes the host longer than the GPU. What
        that takes, `eager_ms` and `eager_host_ms`, stands beside.
        """
        method = METHODS[name]
        row = self.judge(method)
        if row["status"] != "ok":
            return row, None
        step, cuda = self.step(method, ratio), self.device.type == "cuda"
        began = time.monotonic()
        if method.compiled or (cuda and name not in (FLOW, OURS)):
            step()
        else:
            row = row | count(self.work, step)
        row = row | {"first_call_s": time.monotonic() - began}
        row["peak_mib"] = peak_mib(step, self.device)
        if not cuda:
            return row, on_cpu(step)
        loss, first = float(step()), self.gradients()
        step()
        again = distance(self.gradients(), first)  # sums by atomics come in any order
        eager = take_turns({name: cuda_events(step, self.device)})[name]
        row |= {"loss": loss, "eager_ms": eager.ms_p50, "eager_host_ms": eager.cpu_ms_p50}
        graph, of_replay = recorded(step)
        graph.replay()
        off = distance(self.gradients(), first)
        row |= {"timer": "graph", "loss_of_graph": float(of_replay)}
        row |= agreement(loss, float(of_replay), again, off)
        return row, of_graph(graph) if row["status"] == "ok" else None


def distance(value: Tensor, truth: Tensor) -> float:
    """Return the relative distance of two vectors."""
    return float((value - truth).norm() / truth.norm())


def agreement(loss: float, replayed: float, again: float, gradient: float) -> Row:
    """Return whether a replay gives a call's loss and gradient, up to what two calls differ by.

    `again` is the relative distance of the gradients of two calls, `gradient` of a replay and one.
    """
    allowed = 4 * again + torch.finfo(torch.float32).eps ** 0.5
    row: Row = {"graph_gradient_error": gradient, "eager_gradient_error": again}
    if gradient <= allowed and abs(replayed / loss - 1) <= allowed:
        return row
    reason = f"the graph's loss is {replayed:.6g} for {loss:.6g}, its gradients {gradient:.2g} off"
    return row | {"status": "wrong", "reason": f"{reason}; {allowed:.2g} is allowed"}


_training = functools.lru_cache(maxsize=1)(Training)
"""What the plans of one network have in common."""


def time_plan(
    rows: Rows,
    plan: TrainingPlan,
    device: torch.device,
    dtype: torch.dtype,
    gemm_tflops: float,
    tiny: bool = False,
    stand_in: bool = False,
    **options: Any,
) -> None:
    """Make a row of each provider of a plan that has none yet, and of why one cannot be timed.

    Autocast casts to `dtype`, unless that is float32. A large matmul reaches `gemm_tflops`. A
    `stand_in` only calls what is ours, and computes nothing; `options` are those of `compare`.
    """

    def prepare(ratio: float, name: str) -> tuple[Row, Sampler | None]:
        training = _training(plan[:3], device, dtype, tiny)
        if not stand_in:
            return training.prepare(ratio, name)
        if not METHODS[name].pytorch:
            training.step(METHODS[name], 0.5, VERIFIED_ROWS, exact=True)()
            training.step(METHODS[name], ratio)()
        return {"status": "called"}, None

    def finish(row: Row) -> Row:
        if "flops" not in row:
            return {}
        tflops = row["flops"] / row["ms_p50"] / 1e9
        return {"tflops": tflops, "of_gemm": round(tflops / gemm_tflops, 4)}

    about: Row = {
        "what": "timed",
        "device": device.type,
        "network": "tiny" if tiny else plan.network,
    }
    about |= {"batch": plan.batch, "length": plan.length, "dtype": dtype_name(dtype)}
    work = ("what", "network", "batch", "length")
    for ratio in plan.ratios:
        abouts = [{**about, "ratio": ratio, "provider": name} for name in plan.providers]
        bases = {FLOW: work, OURS: (*work, "ratio")}
        compare(rows, abouts, functools.partial(prepare, ratio), bases, finish, **options)


def count_held(rows: Rows) -> None:
    """Make rows of what steps of small_16k compute and keep, on tensors without memory."""
    with FakeTensorMode():
        training = Training((HELD, LEAST_BATCH, FULL), CPU, torch.float32)
        for ratio in (0.1, 1.0):
            counts = {name: training.count(ratio, name) for name in OF_PYTORCH}
            for name, row in counts.items():
                over = {"flops_over_flow": "flops", "saved_over_flow": "saved_bytes"}
                flow = {column: round(row[k] / counts[FLOW][k], 4) for column, k in over.items()}
                about = {"what": "counted", "device": "cpu", "ratio": ratio, "provider": name}
                about |= {"network": HELD, "batch": LEAST_BATCH, "length": FULL}
                rows.add({**about, "dtype": "float32", **row, **flow})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, count, verify and time; return the exit status."""
    usage = parser("step", __doc__, out="", smoke=True)
    usage.add_argument("--minutes", type=float, default=3.0, help="start nothing later [3]")
    usage.add_argument("--network", action="append", help="only this one of those timed [all]")
    usage.add_argument("--compile", action="store_true", help="also the compiled providers")
    options = usage.parse_args(argv)
    every = plans("smoke" if options.smoke else "cpu")
    known = sorted({plan.network for plan in every})
    if not set(options.network or ()) <= set(known):
        usage.error(f"--network {' '.join(options.network)}: of {', '.join(known)}")
    torch.manual_seed(0)
    keep_memory()  # as training does
    end = time.monotonic() + 60 * options.minutes
    gemm = Ceilings.measure(CPU, (torch.float32,), options.smoke).gemm_tflops["float32"]
    path = options.out / "train_step.jsonl"
    rows = start(path, STEP[1], smoke=options.smoke, gemm_tflops=gemm)

    def has_time(about: Row) -> bool:
        if time.monotonic() < end:
            return True
        row = rows.add({**about, "status": "skipped", "reason": "out of time"})
        print(f"out of time for {row['provider']} at {row['ratio']}", flush=True)
        return False

    chosen = [plan for plan in every if plan.network in (options.network or known)]
    if any(plan.network == HELD for plan in chosen):
        print(f"Counting {HELD}", flush=True)
        count_held(rows)
    for plan in chosen:
        print(f"Timing {plan.network}, batch {plan.batch}, {plan.length} latents", flush=True)
        names = tuple(n for n in plan.providers if options.compile or not METHODS[n].compiled)
        time_plan(
            *(rows, plan._replace(providers=names), CPU, torch.float32, gemm, options.smoke),
            has_time=has_time,
            seconds=0.0 if options.smoke else 5.0,
        )
    return hold(rows.rows, TARGETS.values())
