"""Training steps as CUDA graphs, each against its own eager step and against flow matching.

A step issued by Python takes the host longer than the GPU, so that its time would say nothing of
the kernels. What is timed is a replay of the captured step; what Python takes stands beside.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor

from bench.clock import cuda_events, of_graph, on_cpu, recorded, take_turns
from bench.gpu.job import Job
from bench.gpu.look import ceilings
from bench.machine import peak_mib
from bench.model.steps import (
    FLOW,
    OURS,
    PROVIDERS,
    VERIFIED_ROWS,
    Plan,
    Verdict,
    Work,
    counted,
    judged,
)
from bench.rows import STEP, Rows, short
from mfmjt.model.config import CONFIGS

__all__ = ["plans", "steps"]

Row = dict[str, Any]


def plans(which: str, smoke: bool) -> list[Plan]:
    """Return what is timed of a turn: "headline", "compiled" or "rest"; what has a bar first."""
    if smoke:
        headline = [Plan("nano", 10, 16, (0.1,), (FLOW, OURS, "mfmjt_rows", "flow_pytorch"))]
        return {"headline": [*headline, Plan("nano", 10, 16, (1.0,), (OURS,))]}.get(which, [])

    def plan(name: str, batch: int, ratio: float, *names: str) -> Plan:
        return Plan(name, batch, CONFIGS[name].latent_length, (ratio,), names)

    small = "small_16k"
    if which == "compiled":
        return [plan(small, 64, 0.1, FLOW, "mfmjt_compiled", "jvp_compiled")]
    if which == "headline":
        found = []
        for batch in (256, 64):
            found += [
                plan(small, batch, 0.1, FLOW, OURS, "mfmjt_rows", "flow_pytorch"),
                plan(small, batch, 1.0, OURS),
                plan(small, batch, 0.1, "jvp_no_grad"),
            ]
        return found
    found = [plan("medium_44k", 64, 0.1, FLOW, OURS), plan("nano", 64, 0.1, FLOW, OURS)]
    found += [plan(small, 64, ratio, OURS, "jvp") for ratio in (1.0, 0.25, 0.75)]
    return [*found, plan(small, 64, 0.1, "jvp", "finite_difference", "improved", "alpha_flow")]


def steps(job: Job, which: str = "headline") -> None:
    """Return a row for each provider of each plan of a turn; see `plans`."""
    rows, work = job.rows(STEP), None
    verdicts: dict[str, Verdict] = {}
    dtype = torch.float32 if job.smoke else torch.bfloat16
    gemm = ceilings(job).gemm_tflops[str(dtype).removeprefix("torch.")]
    for plan in plans(which, job.smoke):
        (ratio,) = plan.ratios
        if work is not None and work.plan[:3] != plan[:3]:
            work = None
            _free(job)
        for name in plan.providers:
            about = _about(job, plan, ratio, name)
            if rows.has(**about) or not job.has_time(rows, about, 15.0):
                continue
            if job.stand_in and PROVIDERS[name].pytorch:
                continue
            with job.trying(rows, about):
                if work is None:
                    work, verdicts = Work(plan, job.torch_device, dtype, job.smoke), {}
                if job.stand_in:
                    work.step(PROVIDERS[name], 0.5, VERIFIED_ROWS, exact=True)()
                    work.step(PROVIDERS[name], ratio)()
                    continue
                if name not in verdicts:  # once a network, whatever the ratio
                    verdicts |= judged(work, {name: PROVIDERS[name]})
                if verdicts[name].status != "ok":
                    wrong = {"status": verdicts[name].status, "reason": verdicts[name].reason}
                    rows.add({**about, **wrong})
                    continue
                row = _timed(job, work, name, ratio)
                row["gradient_error"] = verdicts[name].error
                base = _flow(rows, about) if name != FLOW else row
                row["over_flow"] = short(row["ms_p50"] / base["ms_p50"]) if base else None
                if name in (FLOW, OURS):
                    row |= _counts(work, ratio, name, gemm, row["ms_p50"])
                rows.add({**about, **row})
                print({**about, **row}, flush=True)
            if work is not None:
                work.case.net.zero_grad(set_to_none=True)
            _free(job)


def _free(job: Job) -> None:
    gc.collect()
    if job.cuda:
        torch.cuda.empty_cache()


def _about(job: Job, plan: Plan, ratio: float, name: str) -> Row:
    return {
        "what": "timed",
        "device": job.device.partition(":")[0],
        "network": "tiny" if job.smoke else plan.network,
        "batch": plan.batch,
        "length": plan.length,
        "dtype": "float32" if job.smoke else "bfloat16",
        "ratio": ratio,
        "provider": name,
    }


def _flow(rows: Rows, about: Row) -> Row | None:
    """Flow matching's row of the same network and batch, to which all ratios are held."""
    wanted = {k: about[k] for k in ("what", "network", "batch", "length")}
    wanted |= {"provider": FLOW, "status": "ok"}
    return next((row for row in rows.rows if wanted.items() <= row.items()), None)


def _timed(job: Job, work: Work, name: str, ratio: float) -> Row:
    """Times of a replay, of the step that Python issues, and how the two agree."""
    step, provider = work.step(PROVIDERS[name], ratio), PROVIDERS[name]
    began = time.monotonic()
    loss = float(step())
    row: Row = {"status": "ok", "loss": loss, "first_call_s": short(time.monotonic() - began)}
    if provider.compiled:
        step()
    if not job.cuda:
        timing = take_turns({name: on_cpu(step)}, 0.0)[name]
        return row | {"peak_mib": None, **_times(timing)}
    first = _gradients(work)
    step()
    again = _distance(_gradients(work), first)  # sums by atomics come in any order
    row["peak_mib"] = peak_mib(step, work.device)
    eager = take_turns({name: cuda_events(step, work.device)})[name]
    row |= {"eager_ms": short(eager.ms_p50), "eager_host_ms": short(eager.cpu_ms_p50)}
    graph, of_replay = recorded(step)
    timing = take_turns({name: of_graph(graph)})[name]
    row |= _times(timing) | {"timer": "graph", "loss_of_graph": float(of_replay)}
    row |= agreement(loss, float(of_replay), again, _distance(_gradients(work), first))
    return row


def _times(timing: Any) -> Row:
    return {name: short(value) for name, value in vars(timing).items()}


def _gradients(work: Work) -> Tensor:
    parameters = work.case.net.parameters()
    return torch.cat([(p if p.grad is None else p.grad).detach().flatten() for p in parameters])


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def agreement(loss: float, replayed: float, again: float, gradient: float) -> Row:
    """Return whether a replay gives what a call gives, up to what two calls differ by.

    Args:
        loss: Of a call.
        replayed: Of a replay.
        again: Relative distance of the gradients of two calls.
        gradient: That of a replay's and a call's.
    """
    allowed = 4 * again + torch.finfo(torch.float32).eps ** 0.5
    row: Row = {"graph_gradient_error": short(gradient), "eager_gradient_error": short(again)}
    if gradient <= allowed and abs(replayed / loss - 1) <= allowed:
        return row
    reason = f"the graph's loss is {replayed:.6g} for {loss:.6g}, its gradients {gradient:.2g} off"
    return row | {"status": "wrong", "reason": f"{reason}; {allowed:.2g} is allowed"}


def _counts(work: Work, ratio: float, name: str, gemm: float, ms: float) -> Row:
    try:
        flops, _ = counted(work, ratio, name)
    except Exception as error:  # the time is worth a row without it
        print(f"Not counted: {error}")
        return {}
    tflops = flops / ms / 1e9
    return {"flops": flops, "tflops": short(tflops), "of_gemm": round(tflops / gemm, 4)}
