"""The ops' times by pytest-benchmark, for who expects that; `python -m bench ops` is the bench.

    python -m pytest tests/bench/test_speed.py --benchmark-only
    python -m pytest tests/bench/test_speed.py --benchmark-only -k "swiglu and jvp"

The same cases and providers, verified before they are timed, in float32 on one thread. Here one
function runs to its end before the next; there they take turns, which a busy machine disturbs less.
"""

from __future__ import annotations

import sys

import pytest
import torch

if "--benchmark-only" not in sys.argv:
    pytest.skip("times are taken with --benchmark-only", allow_module_level=True)

from bench.case import cases, operands
from bench.ops import OPS
from bench.providers import providers
from bench.run import prepare, truth_of

CPU = torch.device("cpu")
FIRST = [cases(op, "cpu")[0] for op in OPS]
TIMED = [
    pytest.param(case, mode, provider, id=f"{case.op}-{mode}-{provider.name}")
    for case in FIRST
    for mode in case.modes
    for provider in providers(case, CPU, mode)
]


@pytest.mark.parametrize(("case", "mode", "provider"), TIMED)
def test_speed(benchmark, case, mode, provider):
    given = operands(case, torch.float32, CPU)
    row, call = prepare(provider, mode, given, truth_of(case, given))
    if call is None:
        assert row["status"] == "unsupported", row["reason"]
        pytest.skip(row["reason"])
    benchmark.group = f"{case.op} {case.name} {mode}"
    benchmark(call, given)
