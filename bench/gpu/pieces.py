"""Pieces that measure: the machine, ops against the truth, ops, generation and training steps."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench import machine
from bench.case import Case, Cost, Input, cases, operands
from bench.gpu.job import Job
from bench.machine import Ceilings
from bench.networks import generate
from bench.networks import step as training_steps
from bench.networks.given import CPU, network
from bench.providers import OURS, Provider, providers
from bench.providers import step as runner_of
from bench.rows import CHECK, GENERATE, KERNELS, STEP, Row, Rows, dtype_name, output_of, write_json
from bench.run import Trial
from mfmjt import kernels as ops_of_ours
from mfmjt.kernels import _backends
from mfmjt.testing import BACKWARD, JVP_BACKWARD, MODES, VALUE, Truth, poisoned

__all__ = ["check", "checks", "environment", "kernels", "latency", "memcheck", "step"]

TIMED = (torch.bfloat16, torch.float32)
"""Dtypes in which ops are timed, the one that matters most first."""


def environment(job: Job) -> None:
    """Write environment.json; ceilings stay those of the rows that are there."""
    path, known = job.out / "environment.json", _known(job)
    stamp = machine.environment(job.torch_device) | _compiler()
    stamp["triton_available"] = _backends.AVAILABLE
    if job.cuda:
        asked = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        stamp["clocks"] = output_of("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
    stamp["ceilings"] = known
    write_json(path, stamp)  # a GPU that fails next leaves this behind
    write_json(path, stamp | {"ceilings": vars(ceilings(job))})


def ceilings(job: Job) -> Ceilings:
    """Return those of environment.json, or measure them where that piece could not."""
    known = _known(job)
    return Ceilings(**known) if known else Ceilings.measure(job.torch_device, TIMED, job.smoke)


def _known(job: Job) -> Row | None:
    path = job.out / "environment.json"
    return json.loads(path.read_text()).get("ceilings") if path.exists() else None


def _compiler() -> Row:
    """Return what kernels in a cache are known by: they fit where these agree."""
    try:
        from triton import knobs
        from triton.runtime.cache import triton_key

        key = hashlib.sha256(triton_key().encode()).hexdigest()
        return {"triton_key": key, "ptxas": knobs.nvidia.ptxas.version}
    except Exception as error:  # of another version, or without ptxas: a cache may still fit
        return {"triton_key": None, "ptxas": repr(error)}


CHECKED = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
"""What networks run in first."""


def check(job: Job, op: str) -> None:
    """Compare an op with float64 on the CPU; it may err twice as much as its reference does there.

    Args:
        job: The piece.
        op: An op, or "network".
    """
    rows = job.rows(CHECK)
    for case, dtype in checks(op, job.smoke, job.torch_device):
        truth: Truth | None = None
        for mode in _modes(case):
            where = " under jvp" if mode == JVP_BACKWARD else ""
            about = _about(case.op, case.name, dtype_name(dtype), mode, "all" + where)
            if rows.has(**about) or not job.has_time(rows, about):
                continue
            with job.trying(rows, about):
                given = operands(case, dtype, CPU).to(dtype, job.torch_device)
                call = runner_of(Provider(OURS, case.function), mode)
                if job.stand_in:
                    call(given)
                    continue
                truth = truth or Truth(case.reference, given, case.terms, _modes(case)[-1], CPU)
                with poisoned():  # what a kernel leaves unwritten shows
                    results = call(given)
                    job.synchronize()
                for kind, error in truth.judge(results).errors.items():
                    rows.add({**about, "kind": kind + where, **error})


def checks(op: str, smoke: bool, device: torch.device) -> Iterator[tuple[Case, torch.dtype]]:
    """Yield what is compared of an op, those dtypes first that networks run in."""
    if op == "network":
        yield _network_case(smoke, device), torch.float32
        return
    for dtype in CHECKED:
        for case in cases(op, "tiny" if smoke else "check"):
            yield case if case.inference else replace(case, modes=MODES), dtype


def _about(op: str, case: str, dtype: str, mode: str, kind: str) -> Row:
    return {"op": op, "case": case, "dtype": dtype, "mode": mode, "kind": kind, "ok": False}


def _modes(case: Case) -> tuple[str, ...]:
    return (VALUE,) if case.inference else (BACKWARD, JVP_BACKWARD)


def _network_case(smoke: bool, device: torch.device) -> Case:
    """Return the whole network as one op of its noisy latent and its times, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network("nano", 20 if smoke else 80, smoke)
    c, batch = net.config, 4
    inputs = {
        "z": Input((batch, c.latent_length, c.latent_dim)),
        "t": Input((batch,), scale=0.5),
        "video": Input((batch, c.video_length, c.video_dim), moves=False),
        "sync": Input((batch, c.sync_length, c.sync_dim), moves=False),
        "text": Input((batch, c.text_length, c.text_dim), moves=False),
    }
    # Placed ahead: under forward mode parameters cannot be moved.
    placed = {
        (place.type, dtype): copy.deepcopy(net).to(place, dtype)
        for place, dtype in ((CPU, torch.float64), (device, torch.float32))
    }

    def function(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        u: Tensor = placed[z.device.type, z.dtype](z, torch.zeros_like(t), t, **cond)
        return u

    def reference(**inputs: Tensor) -> Tensor:
        if isinstance(inputs["z"], torch._subclasses.FakeTensor):  # its shape is asked for
            return inputs["z"]
        with ops_of_ours.reference():
            return function(**inputs)

    return Case(
        op="network",
        name=c.name,
        model=c.name,
        batch=batch,
        length=c.latent_length,
        inputs=inputs,
        function=function,
        reference=reference,
        flops=Cost(0),
        elements=Cost(0),
        terms=c.depth * batch * c.latent_length * c.mlp_hidden,
    )


def memcheck(job: Job, op: str) -> tuple[Rows, Row] | None:
    """Run an op once on small and on whole shapes, for compute-sanitizer to watch.

    The small ones fill no block, the networks' no last one. Whether the sanitizer saw something it
    says by the exit status, which decides upon the row that is returned.
    """
    rows = job.rows(CHECK)
    verdict = _about(op, "all", "bfloat16 float32", "memcheck", "memcheck") | {"ok": True}
    if rows.has(**verdict):
        return None
    for case in (c for scale in ("tiny", "check")[: 2 - job.smoke] for c in cases(op, scale)):
        for dtype in CHECKED[:2]:
            about = {**verdict, "case": case.name, "dtype": dtype_name(dtype), "ok": False}
            if not rows.has(**about) and job.has_time(rows, about):
                with job.trying(rows, about):
                    for mode in _modes(case):
                        given = operands(case, dtype, job.torch_device)
                        runner_of(Provider(OURS, case.function), mode)(given)
    return rows, verdict


def kernels(job: Job, turn: str, ops: tuple[str, ...]) -> None:
    """Time ops.

    Args:
        job: The piece.
        turn: "headline", the first cases in bfloat16; "compiled", these through the compiler; or
            "rest", these in float32, and the other cases.
        ops: Which.
    """
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    limits, rows, device = ceilings(job), job.rows(KERNELS), job.torch_device
    turns = [(TIMED[0], True)]
    if turn == "rest":
        turns = [(TIMED[1], True), *((dtype, False) for dtype in TIMED)]
    for dtype, compile_too in turns:
        for case in (case for op in ops for case in cases(op, "tiny" if job.smoke else "gpu")):
            if case.compile_too != compile_too and not (job.smoke and compile_too):
                continue
            trial = Trial(case, dtype, device)
            for mode in case.modes:
                about = machine.row_of(case, dtype, mode, limits) | {"malloc": device.type}
                about |= {"threads": torch.get_num_threads()}
                # Stable, so that PyTorch comes right after ours.
                for provider in sorted(providers(case, device, mode), key=lambda p: p.name != OURS):
                    if provider.compiled == (turn == "compiled"):
                        _time(job, rows, trial, provider, {**about, "provider": provider.name})
            if "sets" in vars(trial):  # it was made, for there was time
                del trial
                job.free()


def _time(job: Job, rows: Rows, trial: Trial, provider: Provider, about: Row) -> None:
    """Make a row of a provider, if there is none and there is time."""
    if rows.has(**about) or (job.stand_in and provider.name != OURS):
        return
    if not job.has_time(rows, about):
        return
    with job.trying(rows, about):
        if job.stand_in:
            runner_of(provider, about["mode"])(trial.sets[0])
            return
        began = time.monotonic()
        row, timing = trial.time(provider, about["mode"], 0.0 if job.smoke else 0.3)
        if timing is not None:
            row |= {
                "of_roofline": round(about["floor_ms"] / timing.ms_p50, 4),
                "tflops": round(about["flops"] / timing.ms_p50 / 1e9, 2),
                "gbps": round(about["bytes"] / timing.ms_p50 / 1e6, 1),
                "seconds": round(time.monotonic() - began, 1),
            }
        rows.add({**about, **row}, timing)
        if row.get("timer") == "events":
            job.note()
            job.leave("a failed capture; others are not to be trusted")


def _device(job: Job) -> str:
    """Return the device of a table of plans."""
    return "tiny" if job.smoke else "cuda" if job.stand_in else job.torch_device.type


def latency(job: Job, turn: str = "headline") -> None:
    """Time generation: the plans of a turn, "headline", "compiled" or "rest"."""
    rows = job.rows(GENERATE)
    torch.backends.cudnn.benchmark = True  # plain PyTorch shall have its best convolutions
    for plan in generate.plans(_device(job), turn):
        generate.time_plan(
            *(rows, plan, job.torch_device, torch.bfloat16, job.smoke, job.stand_in),
            guard=job.trying,
            has_time=functools.partial(job.has_time, rows),
            seconds=0.0,
        )
    if turn == "rest" and not job.smoke:
        generate.once(rows, job.torch_device, guard=job.trying)


def step(job: Job, turn: str = "headline") -> None:
    """Make a row for each provider of each plan of a turn; see `training_steps.plans`."""
    rows, dtype = job.rows(STEP), torch.float32 if job.smoke else torch.bfloat16
    gemm = ceilings(job).gemm_tflops[dtype_name(dtype)]
    for plan in training_steps.plans(_device(job), turn):
        training_steps.time_plan(
            *(rows, plan, job.torch_device, dtype, gemm, job.smoke, job.stand_in),
            guard=job.trying,
            has_time=functools.partial(job.has_time, rows, seconds=15.0),
            seconds=0.0,
        )
