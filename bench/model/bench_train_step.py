"""What a MeanFlow training step costs over one of flow matching, and over PyTorch's ways to it.

A step is loss and gradients, without the optimiser. The providers:

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
timed. The first call is counted: FLOPs, and bytes that are saved for backward, each memory once
(small_16k at its full length on tensors without memory). Timed in turns, wall and CPU time of this
CPU; `python -m bench gpu --part step` times a GPU. x flow is the median over turns. `of GEMM` is a
provider's counted FLOPs a second over what a large matrix product reaches in the same run.

There is no peak of memory here: saved bytes stand for it. A small_16k step at full length and batch
10 is 1.8 TFLOP, many seconds of a CPU, and func.jvp's tape keeps 8.7 GB, so it is timed at few
ratios; at 1.0 also with latents of 2 s instead of 8. The rest is nano. What --minutes does not
reach is said to be skipped.

DIR/train_step.jsonl is written anew. The exit status is 1 if a bar is missed, or a provider wrong.
Set OMP_NUM_THREADS, and GOMP_SPINCOUNT=100 so that idle threads are not taken for work.

    python -m bench.model.bench_train_step --out /tmp/step
    python -m bench.model.bench_train_step --out /tmp/step --compile --minutes 15
    python -m bench.model.bench_train_step --out /tmp/step --smoke
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.clock import MIN_CALLS, Sampler, on_cpu, take_turns
from bench.machine import Ceilings, environment
from bench.model.steps import (
    FEW,
    FLOW,
    OF_PYTORCH,
    OURS,
    PROVIDERS,
    Plan,
    Verdict,
    Work,
    counted,
    judged,
    reason_of,
)
from bench.rows import Rows
from mfmjt.kernels import _native
from mfmjt.memory import keep_memory
from mfmjt.model.config import CONFIGS

__all__ = ["BARS", "Bench", "bars", "main", "plans"]

CPU = torch.device("cpu")
BARS: dict[str, tuple[str, float]] = {
    "FLOPs at 0.1, over flow": ("<=", 1.04),
    "saved bytes at 0.1, over flow": ("<=", 1.05),
    "saved bytes at 1.0, over flow": ("<=", 1.3),
    "CPU wall at 0.1, over flow": ("<=", 1.08),
    "CPU wall at 1.0, best exact PyTorch over mfmjt": (">=", 1.4),
    "GPU time at 0.1, over flow": ("<=", 1.06),
    "GPU ms, small_16k at 0.1, batch 256": ("<=", 105.0),
    "GPU of GEMM at 0.1, medium_44k": (">=", 0.45),
}
BARRED = "small_16k"
LEAST_BATCH = 10
SHORT = 63
"""Latents of 2 s."""

Row = dict[str, Any]


def plans(smoke: bool) -> list[Plan]:
    """What is timed by default, what has a bar first."""
    if smoke:
        return [Plan("nano", 10, 16, (0.1, 1.0))]
    compiled = ("jvp_compiled", "mfmjt_compiled")
    return [
        Plan(BARRED, LEAST_BATCH, 250, (0.1,), FEW),
        Plan(BARRED, LEAST_BATCH, SHORT, (1.0,), OF_PYTORCH + compiled),
        Plan(BARRED, LEAST_BATCH, 250, (1.0,), OF_PYTORCH),
        Plan("nano", 10, 250, (0.1, 1.0, 0.25, 0.75, 0.0)),
        Plan("nano", 40, 250, (0.1, 1.0), FEW),
    ]


def _recorded(sampler: Sampler, into: list[tuple[float, float]]) -> Sampler:
    def sample() -> tuple[float, float]:
        into.append(sampler())
        return into[-1]

    return sample


def _over(taken: dict[str, list[tuple[float, float]]], name: str, base: str, which: int) -> Any:
    """Median over turns of one's time over another's; None if that was not timed."""
    if base not in taken:
        return None
    pairs = zip(taken[name], taken[base], strict=True)
    return round(statistics.median(a[which] / b[which] for a, b in pairs), 4)


class Bench:
    """A run: rows as they are made.

    Args:
        rows: Where they go.
        compiled: Compile, too.
        smoke: Everything tiny.
        end: `time.monotonic()` at which to stop.
    """

    def __init__(self, rows: Rows, compiled: bool, smoke: bool, end: float) -> None:
        self.rows, self.compiled, self.smoke, self.end = rows, compiled, smoke, end
        ceilings = Ceilings.measure(CPU, (torch.float32,), smoke)
        self.gemm = ceilings.gemm_tflops["float32"]

    def count(self, plan: Plan) -> None:
        """Rows of counts alone, on tensors without memory."""
        with FakeTensorMode():
            work = Work(plan, CPU, torch.float32, self.smoke)
            for ratio in plan.ratios:
                for name in plan.providers:
                    self._count(work, ratio, name)

    def _count(self, work: Work, ratio: float, name: str) -> None:
        flops, saved = counted(work, ratio, name)
        flow = self._counts(work.plan, ratio, FLOW) or {"flops": flops, "saved_bytes": saved}
        self.rows.add(
            {
                **self._about("counted", work.plan, ratio, name),
                "flops": flops,
                "saved_bytes": saved,
                "flops_over_flow": round(flops / flow["flops"], 4),
                "saved_over_flow": round(saved / flow["saved_bytes"], 4),
            }
        )

    def time(self, plan: Plan) -> None:
        """Rows of what is verified and timed."""
        if time.monotonic() > self.end:
            for ratio in plan.ratios:
                self._refuse(plan, ratio, plan.providers, "skipped", "out of time")
            return
        wanted = [n for n in plan.providers if self.compiled or not PROVIDERS[n].compiled]
        work = Work(plan, CPU, torch.float32, self.smoke)
        found = judged(work, {name: PROVIDERS[name] for name in wanted})
        for ratio in plan.ratios:
            torch.compiler.reset()  # what was compiled before counts against a limit
            self._turns(work, ratio, found)

    def _turns(
        self,
        work: Work,
        ratio: float,
        found: dict[str, Verdict],
    ) -> None:
        plan = work.plan
        samplers: dict[str, Sampler] = {}
        taken: dict[str, list[tuple[float, float]]] = {}
        spent = 0.0
        for name, verdict in found.items():
            if verdict.status != "ok":
                self._refuse(plan, ratio, [name], verdict.status, verdict.reason)
                continue
            call = work.step(PROVIDERS[name], ratio)
            try:
                if PROVIDERS[name].compiled:
                    call()
                began = time.monotonic()
                if PROVIDERS[name].compiled or self._counts(plan, ratio, name):
                    call()
                else:
                    self._count(work, ratio, name)
                spent += time.monotonic() - began
            except Exception as failure:  # memory, mostly, or a compiler
                self._refuse(plan, ratio, [name], "unsupported", reason_of(failure))
                continue
            taken[name] = []
            samplers[name] = _recorded(on_cpu(call), taken[name])
        needed = MIN_CALLS * spent
        if time.monotonic() + needed > self.end and not self.smoke:
            reason = f"out of time: needs {needed:.0f} s"
            self._refuse(plan, ratio, samplers, "skipped", reason)
            return
        for name, timing in take_turns(samplers, 0.0 if self.smoke else min(needed, 5.0)).items():
            fields = {
                **self._about("timed", plan, ratio, name),
                "status": "ok",
                "gradient_error": float(f"{found[name].error:.3g}"),
                "peak_mib": None,
                "over_flow": _over(taken, name, FLOW, 0),
                "cpu_over_flow": _over(taken, name, FLOW, 1),
                "over_mfmjt": _over(taken, name, OURS, 0),
            }
            counts = self._counts(plan, ratio, name)
            if counts is not None:
                tflops = counts["flops"] / timing.ms_p50 / 1e9
                fields |= {
                    "tflops": float(f"{tflops:.4g}"),
                    "of_gemm": round(tflops / self.gemm, 4),
                }
            self.rows.add(fields, timing)

    def _counts(self, plan: Plan, ratio: float, name: str) -> Row | None:
        about = self._about("counted", plan, ratio, name)
        return next((row for row in self.rows.rows if about.items() <= row.items()), None)

    def _about(self, what: str, plan: Plan, ratio: float, name: str) -> Row:
        return {
            "what": what,
            "device": "cpu",
            "network": "tiny" if self.smoke else plan.network,
            "batch": plan.batch,
            "length": plan.length,
            "dtype": "float32",
            "ratio": ratio,
            "provider": name,
        }

    def _refuse(
        self, plan: Plan, ratio: float, names: Iterable[str], status: str, reason: str
    ) -> None:
        for name in names:
            about = self._about("timed", plan, ratio, name)
            self.rows.add({**about, "status": status, "reason": reason})


def bars(rows: list[Row]) -> list[Row]:
    """Every bar with the worst value that it is held to; None where nothing was measured."""
    values: dict[str, list[float]] = {name: [] for name in BARS}
    full = CONFIGS[BARRED].latent_length
    for row in rows:
        if row["what"] not in ("counted", "timed") or row.get("status", "ok") != "ok":
            continue
        provider, network, ratio = PROVIDERS[row["provider"]], row["network"], row["ratio"]
        ours, cuda = row["provider"] == OURS, row["device"] == "cuda"
        barred = network == BARRED and row["batch"] >= LEAST_BATCH
        if row["what"] == "counted":
            if ours and barred and row["length"] == full:
                if ratio == 0.1:
                    values["FLOPs at 0.1, over flow"].append(row["flops_over_flow"])
                if ratio in (0.1, 1.0):
                    name = f"saved bytes at {ratio}, over flow"
                    values[name].append(row["saved_over_flow"])
        elif ours and ratio == 0.1:
            if barred and row["length"] == full and row["over_flow"] is not None:
                name = "GPU time" if cuda else "CPU wall"
                values[f"{name} at 0.1, over flow"].append(row["over_flow"])
            if cuda and barred and row["batch"] == 256:
                values["GPU ms, small_16k at 0.1, batch 256"].append(row["ms_p50"])
            if cuda and network == "medium_44k":
                values["GPU of GEMM at 0.1, medium_44k"].append(row["of_gemm"])
        elif barred and not cuda and ratio == 1.0 and provider.pytorch and provider.exact:
            name = "CPU wall at 1.0, best exact PyTorch over mfmjt"
            values[name] += [] if row["over_mfmjt"] is None else [row["over_mfmjt"]]
    found = []
    for name, (sense, limit) in BARS.items():
        at_most = sense == "<="
        value = (max if at_most else min)(values[name], default=None)
        met = None if value is None else value <= limit if at_most else value >= limit
        about = {"what": "bar", "bar": name, "limit": f"{sense} {limit}"}
        found.append(about | {"value": value, "met": met})
    return found


def _table(rows: list[Row]) -> str:
    """The rows by plan and ratio, counts and times of a provider in one line."""
    lines, last = [], None
    merged: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["what"] in ("counted", "timed"):
            of = ("network", "batch", "length", "ratio", "provider")
            merged.setdefault(tuple(row[k] for k in of), {}).update(row)
    head = f"{'':20}{'GFLOP':>9}{'x flow':>8}{'saved MiB':>11}{'x flow':>8}"
    head += f"{'ms':>9}{'x flow':>8}{'CPU x':>8}{'of GEMM':>9}{'peak MiB':>10}{'gradient':>10}"
    for (network, batch, length, ratio, provider), row in merged.items():
        if last != (network, batch, length, ratio):
            last = (network, batch, length, ratio)
            title = f"{network}, batch {batch}, {length} latents, {row['dtype']}, ratio {ratio}"
            lines += ["", title, head]
        if "flops" not in row and "status" not in row:
            continue
        columns = (
            (row.get("flops", 0) / 1e9 or None, 9, 1),
            (row.get("flops_over_flow"), 8, 3),
            (row.get("saved_bytes", 0) / 2**20 or None, 11, 1),
            (row.get("saved_over_flow"), 8, 3),
            (row.get("ms_p50"), 9, 1),
            (row.get("over_flow"), 8, 3),
            (row.get("cpu_over_flow"), 8, 3),
            (row.get("of_gemm"), 9, 3),
            (row.get("peak_mib"), 10, 0),
        )
        line = f"{provider:20}"
        line += "".join(
            f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
            for value, width, digits in columns
        )
        error = row.get("gradient_error")
        line += f"{'-':>10}" if error is None else f"{error:10.1e}"
        if row.get("status", "ok") != "ok":
            line += f"  {row['status']}: {row['reason']}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, count, verify and time; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model.bench_train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=3.0, help="start nothing later [3]")
    parser.add_argument("--network", action="append", help="only this one of those timed [all]")
    parser.add_argument("--compile", action="store_true", help="also the compiled providers")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, to see it run")
    options = parser.parse_args(argv)
    chosen = plans(options.smoke)
    known = sorted({plan.network for plan in chosen})
    if options.network is not None and not set(options.network) <= set(known):
        parser.error(f"--network {' '.join(options.network)}: of {', '.join(known)}")
    chosen = [p for p in chosen if options.network is None or p.network in options.network]
    torch.manual_seed(0)
    keep_memory()  # as training does
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "train_step.jsonl"
    path.unlink(missing_ok=True)
    rows = Rows(path)
    bench = Bench(rows, options.compile, options.smoke, end)
    stamp = environment(CPU) | {"extension": _native.status(), "gemm_tflops": bench.gemm}
    rows.add({"what": "environment", "smoke": options.smoke, **stamp})
    if any(plan.network == BARRED for plan in chosen):
        print(f"Counting {BARRED}", flush=True)
        bench.count(
            Plan(BARRED, LEAST_BATCH, CONFIGS[BARRED].latent_length, (0.1, 1.0), OF_PYTORCH)
        )
    for plan in chosen:
        print(f"Timing {plan.network}, batch {plan.batch}, {plan.length} latents", flush=True)
        bench.time(plan)
    print(_table(rows.rows))
    found = bars(rows.rows)
    print()
    for row in found:
        rows.add(row)
        word = {None: "not measured", True: "pass", False: "MISS"}[row["met"]]
        value = "" if row["value"] is None else f"{row['value']:.3f} "
        print(f"{word:12}  {row['bar']}: {value}({row['limit']})")
    wrong = any(row.get("status") == "wrong" for row in rows.rows)
    return int(wrong or any(row["met"] is False for row in found))


if __name__ == "__main__":
    sys.exit(main())
