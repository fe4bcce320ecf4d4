"""The table of modelled costs: every kernel of every case that `bench aot` compiles, on sm_90.

In bfloat16; beside these the cases to look at first on a GPU, and a vocoder's. None with masks: how
often their loops run is in memory.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from bench import aot
from bench.case import Case, Cost, cases, shapes
from bench.cost.model import cost
from bench.rows import Row, dtype_name
from mfmjt.testing import VALUE, Operands, as_tuple, runner

__all__ = ["cost_op", "line_of"]

DTYPE = torch.bfloat16
"""What networks run in on a GPU."""


def _calls(case: Case) -> dict[str, Callable[[], object]]:
    """Return what calls an op in each of its modes, on memory that is never touched."""
    inputs = {
        name: torch.empty(i.shape, dtype=DTYPE) if i.constant is None else i.constant()
        for name, i in case.inputs.items()
    }
    if case.modes == (VALUE,):
        return {VALUE: torch.no_grad()(functools.partial(case.function, **inputs))}
    for name, i in case.inputs.items():
        inputs[name].requires_grad_(i.constant is None)
    tangents = {name: torch.empty_like(inputs[name]) for name in case.moving}
    with aot.offline(aot.TARGETS["sm_90"].target):
        results = as_tuple(case.function(**inputs))
    given = Operands(inputs, tangents, tuple(map(torch.empty_like, results)))
    return {m: functools.partial(runner(case.function, m), given) for m in case.modes}


def cost_op(op: str, quick: bool) -> Iterator[Row]:
    """Yield a row for each kernel that a case of an op launches in a mode, and how often.

    `padding` is the matrix work of all launches of the mode over what the case needs, by its FLOPs:
    idle parts of tiles, and products that are made twice.

    Args:
        op: One of `aot.OPS`.
        quick: The first case only.
    """
    calls: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {}
    needed: dict[str, Cost] = {}
    if op in aot.NETWORKS:
        for s in shapes("aot"):
            network = functools.partial(aot.NETWORKS[op], s, DTYPE)
            calls[s.name] = functools.partial(dict, {"all": network})
    else:
        compiled = [case for case in cases(op, "aot") if case.model != "masks"]
        for case in [*(c for c in cases(op, "gpu") if c.compile_too), *compiled]:
            calls[case.name], needed[case.name] = functools.partial(_calls, case), case.flops
    for shape in list(calls)[: 1 if quick else None]:
        for mode, run in calls[shape]().items():
            with aot.offline(aot.TARGETS["sm_90"].target) as launches:
                run()
            first = {"target": "sm_90", "op": op, "shape": shape, "dtype": dtype_name(DTYPE)}
            found = Counter(tuple(cost(launch).items()) for launch in launches)
            work = sum(dict(items)["gflop"] * n for items, n in found.items())
            flops = needed[shape].of(mode) / 1e9 if shape in needed else 0
            padding = float(f"{work / flops:.3g}") if flops else ""
            for items, n in found.items():
                figures = dict(items)
                kernel = {"kernel": figures.pop("kernel"), "mode": mode, "launches": n}
                yield first | kernel | figures | {"padding": padding}


def line_of(row: Row) -> str:
    """Return a row as it is printed."""
    name = " ".join(str(row[key]) for key in ("op", "shape", "dtype", "mode", "kernel"))
    loop = f"{row['turns']} x {row['loop_instructions']}"
    times = "  ".join(
        f"{k} {row[f'{k}_us']}" for k in ("issue", "chain", "units", "tensor", "memory")
    )
    return (
        f"{name:90} {row['launches']} x {row['us']:>8} us by {row['bound']:8} {times}  loop {loop}"
    )
