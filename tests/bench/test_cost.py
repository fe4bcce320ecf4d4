"""The model of launches on sm_90: what it counts is what Python counts; the table is up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cost.page import write_costs

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_loops_run_as_often_as_in_python_and_products_are_counted(tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)  # Triton reads a kernel's source from its file
    done = python("counted.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


COUNTED = """
import bench.aot as aot, torch
from bench.cost import model
from bench.cost.sass import follow
from mfmjt.kernels.triton import jit, tl

@jit
def looping_kernel(x, n, columns, step):
    row = tl.program_id(0) // columns
    for i in range(5 * row + tl.program_id(0) % columns, n, step):
        for j in range(0, i, columns):
            tl.debug_barrier()
            tl.store(x + i * 100 + j + tl.arange(0, 128), tl.load(x + i + tl.arange(0, 128)))

@jit
def waiting_kernel(x):
    while tl.load(x) > 0:
        tl.store(x + 1, 0)

@jit
def product_kernel(a, b, c, depth, N: tl.constexpr, K: tl.constexpr):
    rows, columns, k = tl.arange(0, 64), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([64, N], tl.float32)
    for first in range(0, depth, K):
        left = tl.load(a + rows[:, None] * depth + (first + k)[None, :])
        right = tl.load(b + (first + k)[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)

half = torch.bfloat16
sizes = [(64, 320), (320, 32), (64, 32)]
tensors = [torch.empty(n, m, dtype=half) for n, m in sizes[:2]] + [torch.empty(64, 32)]
with aot.offline(aot.TARGETS["sm_90"].target) as launches:
    looping_kernel[(1000,)](torch.empty(99), 700, 7, 4)
    waiting_kernel[(1,)](torch.empty(2))
    product_kernel[(1,)](*tensors, 320, N=32, K=64, num_warps=4)
looping, waiting, product = launches

code, given = model.code_of(looping.kernel.asm["cubin"]), model.arguments(looping)
barriers = [i for i, one in enumerate(code.instructions) if one.name.startswith("BAR")]
for program in (0, 1, 6, 7, 200, 500, 973, 999):
    times = follow(code, (program, 0, 0), looping.grid, given)
    first = 5 * (program // 7) + program % 7
    assert sum(times[i] for i in barriers) == sum(-(-i // 7) for i in range(first, 700, 4)), program

code, given = model.code_of(waiting.kernel.asm["cubin"]), model.arguments(waiting)
times = follow(code, (0, 0, 0), waiting.grid, given)
assert max(times) == 2, times  # a loop that data end

row = model.cost(product)
assert row["gflop"] == float(f"{2 * 64 * 320 * 32 / 1e9:.4g}"), row
assert row["turns"] == 5, row
moved = 2 * (64 * 320 + 320 * 32) + 4 * 64 * 32
assert row["megabytes"] == float(f"{moved / 1e6:.4g}"), row
assert row["memory_us"] == float(f"{moved / model.MEMORY * 1e6:.4g}"), row
assert row["us"] == max(v for k, v in row.items() if k.endswith("_us")), row
"""


@pytest.mark.parametrize("op", ["adaln", "conv1d", "joint_attention", "snake", "swiglu"])
def test_costs_are_as_the_table_says(op):
    arguments = ["--cost", "--quick", "--op", op, "--compare", "bench/results/aot"]
    done = python("-m", "bench", "aot", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{op} " in done.stdout


def test_the_page_has_the_tables(tmp_path):
    """Made anew from the committed rows, it is the same."""
    text = (ROOT / "docs" / "kernel-costs.md").read_text()
    for path in (ROOT / "bench" / "results" / "aot").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = write_costs(tmp_path).read_text()
    assert f"<!-- bench/results/aot/costs.md -->\n{table}<!-- end -->" in text
    assert table == (ROOT / "bench" / "results" / "aot" / "costs.md").read_text()


def test_a_measured_time_stands_beside_the_modelled_one(tmp_path):
    row = {"op": "swiglu", "case": "small_16k B=256", "dtype": "bfloat16", "mode": "value"}
    timed = row | {"provider": "mfmjt", "malloc": "cuda", "ms_p50": 0.25}
    slow = timed | {"provider": "eager", "ms_p50": 9.0}
    (tmp_path / "h200").mkdir()
    rows = "".join(json.dumps(r) + "\n" for r in (timed, slow))
    (tmp_path / "h200" / "kernels.jsonl").write_text(rows)
    (tmp_path / "aot").mkdir()
    header = "op,shape,dtype,mode,launches,us,bound,padding\n"
    lines = [
        f"swiglu,small_16k B=256,bfloat16,{mode},2,50,memory,1.5\n" for mode in ("value", "jvp")
    ]
    (tmp_path / "aot" / "cost_triton_3_7.csv").write_text(header + "".join(lines))
    table = write_costs(tmp_path / "aot").read_text()
    assert "| swiglu | small_16k B=256 | value | 2 | 100 | memory | 1.50 | 2.50 |" in table
    assert "| swiglu | small_16k B=256 | jvp | 2 | 100 | memory | 1.50 | not measured |" in table
