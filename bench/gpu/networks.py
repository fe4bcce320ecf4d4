"""Pieces for whole networks: one guided step of generation, and training steps as CUDA graphs.

A training step issued by Python takes the host longer than the GPU, so that its time would say
nothing of the kernels. What is timed is a replay of the captured step; what Python takes stands
beside.
"""

from __future__ import annotations

import functools
import gc
import time

import torch

from bench.clock import cuda_events, of_graph, on_cpu, recorded, take_turns
from bench.gpu.job import Job
from bench.gpu.look import ceilings
from bench.machine import peak_mib
from bench.networks import generate
from bench.networks.generate import Generation
from bench.networks.given import Row
from bench.networks.step import (
    FLOW,
    METHODS,
    OURS,
    VERIFIED_ROWS,
    Training,
    TrainingPlan,
    counted,
    distance,
    gradients,
    judged,
    row_of,
)
from bench.rows import GENERATE, STEP, Rows
from mfmjt.model.config import CONFIGS

__all__ = ["agreement", "latency", "plans", "steps"]


@torch.no_grad()
def latency(job: Job, turn: str = "headline") -> None:
    """Time generation: the plans of a turn, "headline", "compiled" or "rest"."""
    rows = job.rows(GENERATE)
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    device = "tiny" if job.smoke else "cuda" if job.stand_in else job.torch_device.type
    for plan in generate.plans(device, turn):
        if job.stand_in:  # ours, for what it launches
            generation = Generation.make(plan, job.torch_device, tiny=job.smoke)
            for provider in (name for name in plan.providers if name.startswith(OURS)):
                generation.call(provider)()
            continue
        generate.time_plan(
            *(rows, plan, job.torch_device, torch.bfloat16, job.smoke, job.trying),
            has_time=functools.partial(job.has_time, rows),
            seconds=0.0,
        )
    if turn == "rest" and not job.smoke:
        generate.once(rows, job.torch_device, guard=job.trying)


def plans(turn: str, smoke: bool) -> list[TrainingPlan]:
    """Return the training steps of a turn, what has a target first."""

    def plan(name: str, batch: int, ratio: float, *names: str) -> TrainingPlan:
        length = 16 if smoke else CONFIGS[name].latent_length
        return TrainingPlan(name, batch, length, (ratio,), names)

    name, batches = ("nano", (10,)) if smoke else ("small_16k", (256, 64))
    if turn == "headline":
        found = []
        for batch in batches:
            found += [plan(name, batch, 0.1, FLOW, OURS, "mfmjt_rows", "flow_pytorch")]
            found += [plan(name, batch, 1.0, OURS)]
            found += [] if smoke else [plan(name, batch, 0.1, "jvp_no_grad")]
        return found
    if smoke:
        return []
    if turn == "compiled":
        return [plan(name, 64, 0.1, FLOW, "mfmjt_compiled", "jvp_compiled")]
    found = [plan("medium_44k", 64, 0.1, FLOW, OURS), plan("nano", 64, 0.1, FLOW, OURS)]
    found += [plan(name, 64, ratio, OURS, "jvp") for ratio in (1.0, 0.25, 0.75)]
    return [*found, plan(name, 64, 0.1, "jvp", "finite_difference", "improved", "alpha_flow")]


def steps(job: Job, turn: str = "headline") -> None:
    """Make a row for each provider of each plan of a turn; see `plans`."""
    rows, training = job.rows(STEP), None
    verdicts: dict[str, Row] = {}
    dtype = torch.float32 if job.smoke else torch.bfloat16
    dtype_name = str(dtype).removeprefix("torch.")
    gemm = ceilings(job).gemm_tflops[dtype_name]
    for plan in plans(turn, job.smoke):
        (ratio,) = plan.ratios
        if training is not None and training.plan[:3] != plan[:3]:
            training = None
            _free(job)
        for name in plan.providers:
            about = row_of(plan, ratio, name, job.torch_device.type, dtype_name, job.smoke)
            if rows.has(**about) or not job.has_time(rows, about, 15.0):
                continue
            method = METHODS[name]
            if job.stand_in and method.pytorch:
                continue
            with job.trying(rows, about):
                if training is None:
                    training, verdicts = Training(plan, job.torch_device, dtype, job.smoke), {}
                if job.stand_in:
                    training.step(method, 0.5, VERIFIED_ROWS, exact=True)()
                    training.step(method, ratio)()
                    continue
                if name not in verdicts:  # once a network, whatever the ratio
                    verdicts[name] = judged(training, method)
                row = {**about, **verdicts[name]}
                if row["status"] == "ok":
                    row |= _timed(job, training, name, ratio)
                    flow = row if name == FLOW else _flow(rows, about)
                    row["over_flow"] = row["ms_p50"] / flow["ms_p50"] if flow else None
                    if name in (FLOW, OURS):
                        row |= _rate(training, ratio, name, gemm, row["ms_p50"])
                print(rows.add(row), flush=True)
            if training is not None:
                training.work.net.zero_grad(set_to_none=True)
            _free(job)


def _free(job: Job) -> None:
    gc.collect()
    if job.cuda:
        torch.cuda.empty_cache()


def _flow(rows: Rows, about: Row) -> Row | None:
    """Return flow matching's row of the same network and batch, to which all ratios are held."""
    wanted = {k: about[k] for k in ("what", "network", "batch", "length")}
    wanted |= {"provider": FLOW, "status": "ok"}
    return next((row for row in rows.rows if wanted.items() <= row.items()), None)


def _timed(job: Job, training: Training, name: str, ratio: float) -> Row:
    """Return times of a replay, of the step that Python issues, and how the two agree."""
    step = training.step(METHODS[name], ratio)
    began = time.monotonic()
    loss = float(step())
    row: Row = {"loss": loss, "first_call_s": time.monotonic() - began}
    if METHODS[name].compiled:
        step()
    if not job.cuda:
        return row | {"peak_mib": None, **vars(take_turns({name: on_cpu(step)}, 0.0)[name])}
    first = gradients(training)
    step()
    again = distance(gradients(training), first)  # sums by atomics come in any order
    row["peak_mib"] = peak_mib(step, training.device)
    eager = take_turns({name: cuda_events(step, training.device)})[name]
    row |= {"eager_ms": eager.ms_p50, "eager_host_ms": eager.cpu_ms_p50}
    graph, of_replay = recorded(step)
    timing = take_turns({name: of_graph(graph)})[name]
    row |= vars(timing) | {"timer": "graph", "loss_of_graph": float(of_replay)}
    off = distance(gradients(training), first)
    return row | agreement(loss, float(of_replay), again, off)


def agreement(loss: float, replayed: float, again: float, gradient: float) -> Row:
    """Return whether a replay gives what a call gives, up to what two calls differ by.

    Args:
        loss: Of a call.
        replayed: Of a replay.
        again: Relative distance of the gradients of two calls.
        gradient: That of a replay's and a call's.
    """
    allowed = 4 * again + torch.finfo(torch.float32).eps ** 0.5
    row: Row = {"graph_gradient_error": gradient, "eager_gradient_error": again}
    if gradient <= allowed and abs(replayed / loss - 1) <= allowed:
        return row
    reason = f"the graph's loss is {replayed:.6g} for {loss:.6g}, its gradients {gradient:.2g} off"
    return row | {"status": "wrong", "reason": f"{reason}; {allowed:.2g} is allowed"}


def _rate(training: Training, ratio: float, name: str, gemm: float, ms: float) -> Row:
    try:
        flops = counted(training, ratio, name)["flops"]
    except Exception as error:  # the time is worth a row without it
        print(f"Not counted: {error}")
        return {}
    tflops = flops / ms / 1e9
    return {"flops": flops, "tflops": tflops, "of_gemm": round(tflops / gemm, 4)}
