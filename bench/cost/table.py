"""The table of modelled costs: every kernel of every case that `bench aot` compiles, on sm_90."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from bench import aot
from bench.case import Case, cases, shapes
from bench.cost.model import cost
from bench.rows import Row, dtype_name
from mfmjt.testing import BACKWARD, JVP_BACKWARD, VALUE, Operands, as_tuple, runner

__all__ = ["cost_op", "line_of"]

QUICK = "small_16k B=64"


def _run(case: Case, dtype: torch.dtype, mode: str) -> None:
    """Call an op in one mode, on memory that is never touched."""
    inputs = {
        name: torch.empty(i.shape, dtype=dtype) if i.constant is None else i.constant()
        for name, i in case.inputs.items()
    }
    if mode == VALUE:
        with torch.no_grad():
            case.function(**inputs)
        return
    for name, i in case.inputs.items():
        inputs[name].requires_grad_(i.constant is None)
    tangents = {name: torch.empty_like(inputs[name]) for name in case.moving}
    cotangents = tuple(torch.empty_like(y) for y in as_tuple(case.function(**inputs)))
    runner(case.function, mode)(Operands(inputs, tangents, cotangents))


def cost_op(op: str, quick: bool) -> Iterator[Row]:
    """Yield a row for each kernel that a case of an op launches, once where modes share it.

    Args:
        op: One of `aot.OPS`.
        quick: Only small_16k's training shapes.
    """
    calls: list[tuple[str, str, torch.dtype, Callable[[], None]]] = []
    if op in aot.NETWORKS:
        for s in shapes("aot"):
            network = functools.partial(aot.NETWORKS[op], s, torch.bfloat16)
            calls.append((s.name, "all", torch.bfloat16, network))
    else:
        headline = [c for c in cases(op, "gpu") if c.compile_too]
        for dtype in aot.DTYPES:
            for case in [*(headline if dtype == torch.bfloat16 else []), *cases(op, "aot")]:
                modes = (VALUE, BACKWARD, JVP_BACKWARD) if BACKWARD in case.modes else (VALUE,)
                for mode in modes:
                    run = functools.partial(_run, case, dtype, mode)
                    calls.append((case.name, mode, dtype, run))
    seen = set()
    for shape, mode, dtype, run in calls:
        if quick and not shape.startswith(QUICK):
            continue
        with aot.offline(aot.TARGETS["sm_90"].target) as launches:
            run()
        for launch in launches:
            first = {"target": "sm_90", "op": op, "shape": shape, "dtype": dtype_name(dtype)}
            figures = cost(launch)
            key = *first.values(), *figures.values()
            if key not in seen:
                seen.add(key)
                yield {**first, "kernel": figures.pop("kernel"), "mode": mode, **figures}


def line_of(row: Row) -> str:
    """Return a row as it is printed."""
    name = " ".join(str(row[key]) for key in ("op", "shape", "dtype", "mode", "kernel"))
    loop = f"{row['turns']} x {row['loop_instructions']}"
    times = "  ".join(f"{k} {row[f'{k}_us']}" for k in ("issue", "units", "tensor", "memory"))
    return f"{name:90} {row['us']:>8} us by {row['bound']:8} {times}  loop {loop}"
