"""Is what the ops compute right? Against float64 on the CPU, and under compute-sanitizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.case import TINY, Case, Cost, Input, cases, operands
from bench.gpu.job import Job
from bench.providers import OURS, Provider, step
from bench.rows import CHECK, dtype_name
from mfmjt import kernels
from mfmjt.model import MFMJT
from mfmjt.testing import BACKWARD, JVP_BACKWARD, MODES, VALUE, Truth

__all__ = ["CHECKED", "check", "checks", "memcheck"]

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
        for mode, where in (
            ((VALUE, ""),) if case.inference else ((BACKWARD, ""), (JVP_BACKWARD, " under jvp"))
        ):
            about = {
                "op": case.op,
                "case": case.name,
                "dtype": dtype_name(dtype),
                "mode": mode,
                "kind": "all" + where,
                "ok": False,
            }
            if rows.has(**about) or not job.has_time(rows, about):
                continue
            with job.trying(rows, about):
                given = operands(case, dtype, CPU).to(dtype, job.torch_device)
                call = step(Provider(OURS, case.function), mode)
                if job.stand_in:
                    call(given)
                    continue
                last = VALUE if case.inference else JVP_BACKWARD
                truth = truth or Truth(case.reference, given, case.terms, last, CPU)
                _poison(job)
                found = call(given)
                job.synchronize()
                for kind, error in truth.judge(found).errors.items():
                    rows.add({**about, "kind": kind + where, **error})


def checks(op: str, smoke: bool, device: torch.device) -> Iterator[tuple[Case, torch.dtype]]:
    """Yield what is compared of an op, those dtypes first that networks run in."""
    if op == "network":
        yield _network_case(smoke, device), torch.float32
        return
    for dtype in CHECKED:
        for case in cases(op, "tiny" if smoke else "check"):
            yield case if case.inference else replace(case, modes=MODES), dtype


def _poison(job: Job) -> None:
    """NaN in the allocator's free memory, so that what a kernel leaves unwritten shows."""
    if job.cuda:
        nan = float("nan")
        blocks = [torch.full((2**n,), nan, device=job.device) for n in range(8, 27) for _ in "ab"]
        del blocks


def _network_case(smoke: bool, device: torch.device) -> Case:
    """Return the whole network as one op of its noisy latent and its times, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MFMJT.from_config("nano", **(TINY if smoke else {}))
        with torch.no_grad():
            for p in net.parameters():  # a fresh network gives zero, which anything matches
                p.add_(torch.randn_like(p) * 0.02)
    config, length = net.config, 20 if smoke else 80
    video, sync = config.lengths(length)
    inputs = {
        "z": Input((4, length, config.latent_dim)),
        "t": Input((4,), scale=0.5),
        "video": Input((4, video, config.video_dim), moves=False),
        "sync": Input((4, sync, config.sync_dim), moves=False),
        "text": Input((4, config.text_length, config.text_dim), moves=False),
    }
    # Placed ahead: under forward mode parameters cannot be moved.
    placed = {
        (place.type, dtype): copy.deepcopy(net).to(place, dtype)
        for place, dtype in ((CPU, torch.float64), (device, torch.float32))
    }

    def function(z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        u: Tensor = placed[z.device.type, z.dtype](z, torch.zeros_like(t), t, **cond)
        return u

    def reference(**given: Tensor) -> Tensor:
        if isinstance(given["z"], torch._subclasses.FakeTensor):  # its shape is asked for
            return given["z"]
        with kernels.reference():
            return function(**given)

    return Case(
        op="network",
        name=config.name,
        model=config.name,
        batch=4,
        length=length,
        inputs=inputs,
        function=function,
        reference=reference,
        flops=Cost(0),
        elements=Cost(0),
        terms=config.depth * 4 * length * config.mlp_hidden,
    )


def memcheck(job: Job, op: str) -> None:
    """Run an op once on each of some odd shapes, for compute-sanitizer to watch.

    Whether it saw something it says by the exit status.
    """
    rows = job.rows(CHECK)
    about: dict[str, Any] = {"op": op, "case": "odd shapes", "mode": "memcheck", "ok": True}
    if rows.has(**about, dtype="bfloat16 float32"):
        return
    for dtype in (torch.bfloat16, torch.float32):
        for call in _odd(op, functools.partial(_drawn, job.device, dtype)):
            fields = {**about, "dtype": dtype_name(dtype), "kind": "memcheck", "ok": False}
            if job.has_time(rows, fields):
                with job.trying(rows, fields):
                    call()
    job.verdict = rows, {**about, "dtype": "bfloat16 float32", "kind": "memcheck"}


def _drawn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def _odd(op: str, draw: Callable[..., Tensor]) -> Iterator[Callable[[], object]]:
    """Calls of an op on shapes that fill no block."""
    if op == "adaln":
        for n, c in ((37, 448), (1, 20), (250, 300)):
            moving = (draw(2, n, c), draw(2, 1, c), draw(2, n, c))
            yield functools.partial(_all_modes, kernels.adaln, moving)
    elif op == "conv1d":
        for n, c, outs, taps in ((37, 20, 448, 7), (250, 448, 2560, 3), (5, 64, 48, 3)):
            still = (draw(outs, c, taps), draw(outs))
            yield functools.partial(_all_modes, kernels.conv1d, (draw(2, n, c),), still)
    elif op == "joint_attention":
        for width in (64, 128, 40):
            given = tuple(draw(2, n, 3, width) for _ in "qkv" for n in (61, 17, 77))
            yield functools.partial(_all_modes, _attention, given)
    elif op == "snake":
        for n in (1, 7, 515, 4096):
            given = (draw(2, 24, n), draw(24), draw(24))
            yield torch.no_grad()(functools.partial(kernels.snake, *given))


def _attention(*qkv: Tensor) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = kernels.joint_attention(qkv[:3], qkv[3:6], qkv[6:])
    return out


def _all_modes(
    function: Callable[..., Any], moving: tuple[Tensor, ...], still: tuple[Tensor, ...] = ()
) -> None:
    """Value and gradient, then value and tangent."""
    found = function(*moving, *still)
    found = found if isinstance(found, tuple) else (found,)
    torch.autograd.grad(found, (*moving, *still), [torch.randn_like(y) for y in found])
    dots = tuple(torch.randn_like(x) for x in moving)
    torch.func.jvp(lambda *xs: function(*xs, *still), moving, dots)
