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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.clock import MIN_CALLS, Sampler, Timing, on_cpu, take_turns
from bench.machine import Ceilings
from bench.networks.given import (
    CPU,
    Row,
    Target,
    Workload,
    command_line,
    count,
    hold,
    start,
    unsupported,
)
from bench.rows import Rows
from mfmjt import kernels, meanflow
from mfmjt.meanflow import tangent, targets
from mfmjt.memory import keep_memory
from mfmjt.model.config import CONFIGS

__all__ = [
    "FLOW",
    "METHODS",
    "OURS",
    "TARGETS",
    "VERIFIED_ROWS",
    "Method",
    "Training",
    "TrainingPlan",
    "counted",
    "distance",
    "gradients",
    "judged",
    "main",
    "plans",
    "row_of",
]

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
FEW = (FLOW, OURS)
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
        providers: Names of `METHODS`; those that are compiled only where that is asked for.
    """

    network: str
    batch: int
    length: int
    ratios: tuple[float, ...]
    providers: tuple[str, ...] = ON_CPU


def plans(smoke: bool) -> list[TrainingPlan]:
    """Return what is timed on a CPU, what has a target first."""
    if smoke:
        return [TrainingPlan("nano", 10, 16, (0.1, 1.0))]
    compiled = ("jvp_compiled", "mfmjt_compiled")
    return [
        TrainingPlan(HELD, LEAST_BATCH, FULL, (0.1,), FEW),
        TrainingPlan(HELD, LEAST_BATCH, SHORT, (1.0,), OF_PYTORCH + compiled),
        TrainingPlan(HELD, LEAST_BATCH, FULL, (1.0,), OF_PYTORCH),
        TrainingPlan("nano", 10, 250, (0.1, 1.0, 0.25, 0.75, 0.0)),
        TrainingPlan("nano", 40, 250, (0.1, 1.0), FEW),
    ]


def row_of(
    plan: TrainingPlan, ratio: float, name: str, device: str, dtype: str, smoke: bool
) -> Row:
    """Return the fields that identify a row of what is timed."""
    network = "tiny" if smoke else plan.network
    about = {"what": "timed", "device": device, "network": network, "batch": plan.batch}
    return {**about, "length": plan.length, "dtype": dtype, "ratio": ratio, "provider": name}


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Let a loss inside call the network once wherever it can, on any device."""
    before = tangent.one_call_is_cheaper
    tangent.one_call_is_cheaper = lambda z, intervals: intervals > 0
    try:
        yield
    finally:
        tangent.one_call_is_cheaper = before


class Training:
    """A network, its data, and the steps on them.

    Args:
        plan: Sizes.
        device: Where.
        dtype: float32, or what autocast casts to.
        tiny: Two blocks of 16 channels.
    """

    def __init__(
        self, plan: TrainingPlan, device: torch.device, dtype: torch.dtype, tiny: bool = False
    ) -> None:
        with torch.device(device):
            self.work = Workload.make(plan.network, plan.batch, length=plan.length, tiny=tiny)
        self.plan, self.device, self.dtype = plan, device, dtype

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
        work, rows = self.work, rows or self.plan.batch
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
            ops = kernels.reference() if method.pytorch else contextlib.nullcontext()
            with ops, _at_once() if method.at_once else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=low):
                    value = forward()
                value.backward()
            return value.detach()

        return step

    @functools.cached_property
    def truth(self) -> tuple[float, Tensor]:
        """Loss and gradients of plain PyTorch, for `judged`."""
        return self._exactly(METHODS[TRUTH])

    def _exactly(self, method: Method) -> tuple[float, Tensor]:
        loss = self.step(method, 0.5, min(VERIFIED_ROWS, self.plan.batch), exact=True)()
        return float(loss), gradients(self)


def gradients(training: Training) -> Tensor:
    """Return all gradients in one vector; the parameter itself where it has none."""
    parameters = training.work.net.parameters()
    return torch.cat([(p if p.grad is None else p.grad).detach().flatten() for p in parameters])


def distance(value: Tensor, truth: Tensor) -> float:
    """Return the relative distance of two vectors."""
    return float((value - truth).norm() / truth.norm())


def judged(training: Training, method: Method) -> Row:
    """Compare a method with `jvp`, in float32, on a few rows half of which have r < t.

    If it is exact, half of the digits must agree, in the loss and in all gradients together.

    Returns:
        `status`, which is "ok", "wrong" or "unsupported"; `gradient_error`, the relative distance
        of the gradients, unless the method failed; else the `reason`.
    """
    loss, gradient = training.truth
    try:
        its_loss, its_gradient = training._exactly(method)
    except Exception as error:  # of a compiler, or for want of memory
        return unsupported(error)
    finally:
        training.work.net.zero_grad(set_to_none=True)
    of_loss, of_gradient = abs(its_loss / loss - 1), distance(its_gradient, gradient)
    allowed = torch.finfo(torch.float32).eps ** 0.5
    row: Row = {"status": "ok", "gradient_error": of_gradient}
    if method.exact and not (of_gradient <= allowed and of_loss <= allowed):
        why = f"loss {of_loss:.1e} and gradients {of_gradient:.1e} off; {allowed:.1e} is allowed"
        row |= {"status": "wrong", "reason": why}
    return row


def counted(training: Training, ratio: float, name: str) -> Row:
    """Run a step and return its `flops` and `saved_bytes`; see `given.count`.

    Args:
        training: Where it has no memory, call this inside the FakeTensorMode that made it.
        ratio: Fraction of the rows with r < t.
        name: A provider that is not compiled: nothing inside of what is can be counted.
    """
    return count(training.work, training.step(METHODS[name], ratio))._asdict()


@dataclass(frozen=True)
class _Run:
    """A run on a CPU: rows as they are made.

    Attributes:
        rows: Where they go.
        compiled: Compile, too.
        smoke: Everything tiny.
        end: `time.monotonic()` at which to stop.
        gemm: TFLOP/s of a large matmul.
    """

    rows: Rows
    compiled: bool
    smoke: bool
    end: float
    gemm: float

    def about(self, plan: TrainingPlan, ratio: float, name: str) -> Row:
        return row_of(plan, ratio, name, "cpu", "float32", self.smoke)

    def add(self, row: Row, timing: Timing | None = None) -> None:
        row = self.rows.add(row, timing)
        figures = ("flops_over_flow", "saved_over_flow", "ms_p50", "over_flow", "of_gemm")
        shown = ("ratio", "provider", "status", *figures, "reason")
        print(f"  {row['what']}", *(f"{k} {row[k]}" for k in shown if k in row), flush=True)

    def count(self, training: Training, ratio: float, name: str) -> None:
        """Make a row of counts, over those of flow matching, which comes first."""
        about = self.about(training.plan, ratio, name) | {"what": "counted"}
        row = counted(training, ratio, name)
        flow = self.counts(about | {"provider": FLOW}) or row
        over = {"flops_over_flow": "flops", "saved_over_flow": "saved_bytes"}
        row |= {column: round(row[of] / flow[of], 4) for column, of in over.items()}
        self.add({**about, **row})

    def counts(self, about: Row) -> Row | None:
        wanted = (about | {"what": "counted"}).items()
        return next((row for row in self.rows.rows if wanted <= row.items()), None)

    def time(self, plan: TrainingPlan) -> None:
        """Make rows of what is verified and timed."""
        late = {"status": "skipped", "reason": "out of time"}
        if time.monotonic() > self.end:
            for ratio in plan.ratios:
                for name in plan.providers:
                    self.add({**self.about(plan, ratio, name), **late})
            return
        training = Training(plan, CPU, torch.float32, self.smoke)
        names = [n for n in plan.providers if self.compiled or not METHODS[n].compiled]
        verdicts = {name: judged(training, METHODS[name]) for name in names}
        for ratio in plan.ratios:
            torch.compiler.reset()  # what was compiled before counts against a limit
            self._turns(training, ratio, verdicts)

    def _turns(self, training: Training, ratio: float, verdicts: dict[str, Row]) -> None:
        abouts = {name: self.about(training.plan, ratio, name) for name in verdicts}
        samplers: dict[str, Sampler] = {}
        spent = 0.0
        for name, verdict in verdicts.items():
            if verdict["status"] != "ok":
                self.add({**abouts[name], **verdict})
                continue
            call = training.step(METHODS[name], ratio)
            try:
                if METHODS[name].compiled:
                    call()
                began = time.monotonic()
                if METHODS[name].compiled or self.counts(abouts[name]):
                    call()
                else:
                    self.count(training, ratio, name)
                spent += time.monotonic() - began
            except Exception as error:  # memory, mostly, or a compiler
                self.add({**abouts[name], **unsupported(error)})
                continue
            samplers[name] = on_cpu(call)
        needed = MIN_CALLS * spent
        if time.monotonic() + needed > self.end and not self.smoke:
            late = {"status": "skipped", "reason": f"out of time: needs {needed:.0f} s"}
            for name in samplers:
                self.add({**abouts[name], **late})
            return
        timings = take_turns(samplers, 0.0 if self.smoke else min(needed, 5.0))
        for name, timing in timings.items():
            row = {**abouts[name], **verdicts[name], "peak_mib": None}
            for base, column in ((FLOW, "over_flow"), (OURS, "over_mfmjt")):
                if base in timings:
                    row[column] = timing.ms_p50 / timings[base].ms_p50
                    row[f"cpu_{column}"] = timing.cpu_ms_p50 / timings[base].cpu_ms_p50
            if counts := self.counts(abouts[name]):
                tflops = counts["flops"] / timing.ms_p50 / 1e9
                row |= {"tflops": tflops, "of_gemm": round(tflops / self.gemm, 4)}
            self.add(row, timing)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, count, verify and time; return the exit status."""
    parser = command_line("step", __doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="start nothing later [3]")
    parser.add_argument("--network", action="append", help="only this one of those timed [all]")
    parser.add_argument("--compile", action="store_true", help="also the compiled providers")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, to see it run")
    options = parser.parse_args(argv)
    every = plans(options.smoke)
    known = sorted({plan.network for plan in every})
    if not set(options.network or ()) <= set(known):
        parser.error(f"--network {' '.join(options.network)}: of {', '.join(known)}")
    chosen = [plan for plan in every if plan.network in (options.network or known)]
    torch.manual_seed(0)
    keep_memory()  # as training does
    end = time.monotonic() + 60 * options.minutes
    gemm = Ceilings.measure(CPU, (torch.float32,), options.smoke).gemm_tflops["float32"]
    rows = start(options.out / "train_step.jsonl", smoke=options.smoke, gemm_tflops=gemm)
    run = _Run(rows, options.compile, options.smoke, end, gemm)
    if any(plan.network == HELD for plan in chosen):
        print(f"Counting {HELD}", flush=True)
        with FakeTensorMode():
            plan = TrainingPlan(HELD, LEAST_BATCH, FULL, (0.1, 1.0), OF_PYTORCH)
            training = Training(plan, CPU, torch.float32, options.smoke)
            for ratio in plan.ratios:
                for name in plan.providers:
                    run.count(training, ratio, name)
    for plan in chosen:
        print(f"Timing {plan.network}, batch {plan.batch}, {plan.length} latents", flush=True)
        run.time(plan)
    return hold(rows.rows, TARGETS.values())


if __name__ == "__main__":
    sys.exit(main())
