"""Pieces that check the ops: against float64 on the CPU, and under compute-sanitizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.case import Case, Cost, Input, cases, operands
from bench.gpu.job import Job
from bench.networks.given import network
from bench.providers import OURS, Provider, step
from bench.rows import CHECK, Row, Rows, dtype_name
from mfmjt import kernels
from mfmjt.testing import BACKWARD, JVP_BACKWARD, MODES, VALUE, Truth

__all__ = ["check", "checks", "memcheck"]

CHECKED = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
"""What networks run in first."""
CPU = torch.device("cpu")


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
                call = step(Provider(OURS, case.function), mode)
                if job.stand_in:
                    call(given)
                    continue
                truth = truth or Truth(case.reference, given, case.terms, _modes(case)[-1], CPU)
                _poison(job)
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


def _poison(job: Job) -> None:
    """Fill the allocator's free memory with NaN, so that what a kernel leaves unwritten shows."""
    if job.cuda:
        nan = float("nan")
        blocks = [torch.full((2**n,), nan, device=job.device) for n in range(8, 27) for _ in "ab"]
        del blocks


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
        with kernels.reference():
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
                        step(Provider(OURS, case.function), mode)(given)
    return rows, verdict
