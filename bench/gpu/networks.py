"""Pieces for whole networks: one guided step of generation, and training steps as CUDA graphs."""

from __future__ import annotations

import functools

import torch

from bench.gpu.job import Job
from bench.gpu.look import ceilings
from bench.networks import generate, step
from bench.networks.step import FLOW, OURS, TrainingPlan
from bench.rows import GENERATE, STEP, dtype_name
from mfmjt.model.config import CONFIGS

__all__ = ["latency", "plans", "steps"]


def latency(job: Job, turn: str = "headline") -> None:
    """Time generation: the plans of a turn, "headline", "compiled" or "rest"."""
    rows = job.rows(GENERATE)
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    device = "tiny" if job.smoke else "cuda" if job.stand_in else job.torch_device.type
    for plan in generate.plans(device, turn):
        generate.time_plan(
            *(rows, plan, job.torch_device, torch.bfloat16, job.smoke, job.stand_in),
            guard=job.trying,
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
    rows, dtype = job.rows(STEP), torch.float32 if job.smoke else torch.bfloat16
    gemm = ceilings(job).gemm_tflops[dtype_name(dtype)]
    for plan in plans(turn, job.smoke):
        step.time_plan(
            *(rows, plan, job.torch_device, dtype, gemm, job.smoke, job.stand_in),
            guard=job.trying,
            has_time=functools.partial(job.has_time, rows, seconds=15.0),
            seconds=0.0,
        )
        job.free()
