"""The table of modelled costs: every kernel of every case that `bench aot` compiles, on sm_90.

In bfloat16; beside these the cases to look at first on a GPU, and a vocoder's.
"""

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

DTYPE = torch.bfloat16
"""What networks run in on a GPU."""


def _run(case: Case, mode: str) -> None:
    """Call an op in one mode, on memory that is never touched."""
    inputs = {
        name: torch.empty(i.shape, dtype=DTYPE) if i.constant is None else i.constant()
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
        quick: The first case only.
    """
    calls: list[tuple[str, str, Callable[[], None]]] = []
    if op in aot.NETWORKS:
        for s in shapes("aot"):
            calls.append((s.name, "all", functools.partial(aot.NETWORKS[op], s, DTYPE)))
    else:
        for case in [*(c for c in cases(op, "gpu") if c.compile_too), *cases(op, "aot")]:
            modes = (VALUE, BACKWARD, JVP_BACKWARD) if BACKWARD in case.modes else (VALUE,)
            calls += [(case.name, mode, functools.partial(_run, case, mode)) for mode in modes]
    seen = set()
    for shape, mode, run in calls:
        if quick and shape != calls[0][0]:
            continue
        with aot.offline(aot.TARGETS["sm_90"].target) as launches:
            run()
        for launch in launches:
            first = {"target": "sm_90", "op": op, "shape": shape, "dtype": dtype_name(DTYPE)}
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
