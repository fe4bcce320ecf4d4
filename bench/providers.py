"""Who computes an op: ours, plain PyTorch, the compiler, and other people's packages.

A provider is a function of a case's inputs. In forward mode it runs under `torch.func.jvp`, as a
network does; what it cannot do it raises, and the row says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import BACKWARD, JVP, JVP_BACKWARD, MODES, Case, Function, Operands, module
from mfmjt.kernels import _native

__all__ = ["OURS", "REFERENCE", "Provider", "Results", "Unsupported", "liger", "providers", "step"]

OURS, REFERENCE = "mfmjt", "eager"

Results = dict[str, tuple[Tensor, ...]]


class Unsupported(Exception):
    """A provider cannot be loaded or cannot run a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: In tables.
        function: Takes the inputs of the case by name.
        compiled: The whole call goes through torch.compile; headline cases only.
        formulas: With the C++ kernels off.
        devices: Where it is of use.
        modes: When it is of use.
    """

    name: str
    function: Function
    compiled: bool = False
    formulas: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = MODES


def providers(case: Case, device: torch.device, mode: str) -> list[Provider]:
    """Everyone who may be timed on a case in a mode: plain PyTorch first, then us."""
    found = [
        Provider(REFERENCE, case.reference),
        Provider(OURS, case.function),
        Provider("compile", case.reference, compiled=True),
        # Calling torch.func.jvp takes some 0.3 ms, which a network pays once and not for each op;
        # the compiler takes it out of both. Device time has none of it.
        Provider(
            f"{OURS}_compile",
            case.function,
            compiled=True,
            devices=("cpu",),
            modes=(JVP, JVP_BACKWARD),
        ),
    ]
    served = _native.status().get("ops", "").split()
    if case.headline and any(name.rpartition("_")[0] == case.op for name in served):
        found.append(Provider("formula", case.function, formulas=True, devices=("cpu",)))
    found += getattr(module(case.op), "providers", lambda case: [])(case)
    return [
        p
        for p in found
        if device.type in p.devices and mode in p.modes and (case.headline or not p.compiled)
    ]


def liger(file: str, name: str) -> Any:
    """A function of liger-kernel, loaded when it is first called.

    Raises:
        Unsupported: It does not load.
    """
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name)
    except Exception as error:
        raise Unsupported(f"liger_kernel does not load: {error}") from error


def step(provider: Provider, case: Case, mode: str) -> Callable[[Operands], Results]:
    """What is verified and timed: one call of a provider in a mode.

    Returns:
        A function of operands that gives everything asked for: `value`, and with it `tangent` or
        `gradient` or both. All of it leaves the call, so that a compiler can drop none of it.
    """
    moving, trained = case.moving, case.trained

    def forward(
        leaves: dict[str, Tensor], dots: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        def moved(*at: Tensor) -> tuple[Tensor, ...]:
            y = provider.function(**(leaves | dict(zip(moving, at, strict=True))))
            return (y,) if isinstance(y, Tensor) else tuple(y)

        primals = tuple(leaves[name] for name in moving)
        if not mode.startswith("jvp"):
            return moved(*primals), ()
        values, tangents, *_ = torch.func.jvp(moved, primals, dots)
        if mode == JVP_BACKWARD:  # as in a MeanFlow target; a compiler would go back through them
            tangents = tuple(y_dot.detach() for y_dot in tangents)
        return values, tangents

    run = forward
    if provider.compiled:
        cuda = torch.cuda.is_available()
        tune = "max-autotune-no-cudagraphs" if cuda else "default"  # the harness makes the graph
        run = torch.compile(forward, fullgraph=True, dynamic=False, mode=tune)

    def call(given: Operands) -> Results:
        if not mode.endswith("bwd"):
            with torch.no_grad():
                values, tangents = run(given.leaves, given.dots)
            return {"value": values, "tangent": tangents} if tangents else {"value": values}
        values, tangents = run(given.leaves, given.dots)
        gradients = torch.autograd.grad(
            values, [given.leaves[name] for name in trained], given.bars
        )
        found = {"value": values, "gradient": gradients}
        return found if mode == BACKWARD else found | {"tangent": tangents}

    if not provider.formulas:
        return call

    def with_formulas(given: Operands) -> Results:
        with _native.formulas():
            return call(given)

    return with_formulas
