"""Who computes an op: ours, plain PyTorch, the compiler, and other people's packages.

A provider is a function of a case's inputs. In forward mode it runs under `torch.func.jvp`, as a
network does; what it cannot do it raises, and the row says so.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Case, module
from mfmjt.kernels import _native
from mfmjt.testing import JVP, JVP_BACKWARD, MODES, Function, Operands, Results, runner

__all__ = ["OURS", "REFERENCE", "Provider", "Unsupported", "liger", "package", "providers", "step"]

OURS, REFERENCE = "mfmjt", "eager"


class Unsupported(Exception):
    """A provider cannot be loaded or cannot run a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: Its name in tables.
        function: Takes the inputs of the case by name.
        compiled: Put the whole call through torch.compile; `Case.compile_too` cases only.
        formulas: Run with the C++ kernels switched off.
        devices: Device types to time it on.
        modes: Modes to time it in.
    """

    name: str
    function: Function
    compiled: bool = False
    formulas: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = MODES


def providers(case: Case, device: torch.device, mode: str) -> list[Provider]:
    """Return everyone who may be timed on a case in a mode: plain PyTorch first, then us."""
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
    if case.compile_too and any(name.rpartition("_")[0] == case.op for name in served):
        found.append(Provider("formula", case.function, formulas=True, devices=("cpu",)))
    found += getattr(module(case.op), "providers", lambda case: [])(case)
    return [
        p
        for p in found
        if device.type in p.devices and mode in p.modes and (case.compile_too or not p.compiled)
    ]


def package(name: str) -> Any:
    """Return a module of another package, loaded when it is first asked for.

    Raises:
        Unsupported: It does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # packages fail to load in many ways
        raise Unsupported(f"{name} does not load: {error}") from error


def liger(file: str, name: str) -> Any:
    """Return a function of liger-kernel; see `package`."""
    return getattr(package(f"liger_kernel.ops.{file}"), name)


def step(provider: Provider, mode: str) -> Callable[[Operands], Results]:
    """Return what is verified and timed: one call of a provider in a mode."""
    # The clock makes the CUDA graph.
    tune = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else "default"
    compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=tune)
    call = runner(provider.function, mode, compiler if provider.compiled else None)
    return _native.formulas()(call) if provider.formulas else call
