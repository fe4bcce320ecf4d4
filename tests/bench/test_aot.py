"""Kernels compiled for GPUs that are not there, each in a process of its own: see bench/aot.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = [path.stem for path in sorted((ROOT / "mfmjt" / "kernels").glob("[a-z]*.py"))]
WITHOUT_KERNELS = {"linear", "precision"}  # the vendor's matmul serves; no op
WIDE_OPS = {"adaln", "gated_residual_adaln"}  # also compiled for the widest rows they take

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_KERNELS])
def test_kernels_fit_their_gpus_and_are_as_the_table_says(op):
    done = python("-m", "bench", "aot", "--quick", "--op", op, "--compare", "bench/results/aot")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f" {op} ") >= 4  # one kernel for each target
    assert (" widest " in done.stdout) == (op in WIDE_OPS)


def test_kernels_are_compiled_on_a_build_for_gpus_too_and_none_is_a_failure():
    """Such a build has kernels of its own for a CPU's tensors: formulas, of which none compiles."""
    done = python("-c", BUILT_FOR_GPUS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sm_90 swiglu") >= 3
    assert done.stderr.startswith("No kernel was compiled")


BUILT_FOR_GPUS = """
import torch

torch.version.cuda = "13.0"  # all that the package reads of a build before it has a GPU
from bench import aot
from mfmjt import kernels

arguments = ["--quick", "--op", "swiglu", "--target", "sm_90"]
assert aot.main(arguments) == 0
with kernels.reference():
    assert aot.main(arguments) == 1
"""


def test_launches_begin_early_only_where_that_is_switched_on():
    """Programmatic dependent launch, which AMD and older GPUs do not have; nowhere by default."""
    done = python("-c", EARLY)
    assert done.returncode == 0, done.stderr


EARLY = """
import torch, bench.aot as aot
from mfmjt.kernels import streams
from mfmjt.kernels.triton import launching

def compiled(target):
    with aot.offline(aot.TARGETS[target].target) as launches:
        streams.guide(torch.empty(1, 5, 4), torch.empty(2, 5, 4), 1.5)
    return launches[0].kernel

assert not launching.EARLY
assert "griddepcontrol" not in compiled("sm_90").asm["ptx"]
launching.EARLY = frozenset({90, 100})
for target in ("sm_90", "sm_100"):
    kernel = compiled(target)
    assert kernel.metadata.launch_pdl
    code = kernel.asm["ptx"]
    wait, launch = code.index("griddepcontrol.wait"), code.index("griddepcontrol.launch_dependents")
    assert wait < launch < code.index("ld.global")
assert "griddepcontrol" not in compiled("sm_80").asm["ptx"]
assert "amdgcn" in compiled("gfx942").asm
"""


def test_the_gate_finds_what_is_wrong(tmp_path):
    (tmp_path / "spill.py").write_text(SPILL)  # Triton reads a kernel's source from its file
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "spill.py"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


SPILL = """
import torch, bench.aot as aot
from mfmjt.kernels.triton import jit, tl

@jit
def spilling_kernel(x, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + i)
    tl.store(x + i, tile / tl.sum(tile))  # the whole tile is alive until its sum is known

for name, n in (("sm_90", 128), ("gfx942", 256)):  # gfx942 has four times the registers
    chip = aot.TARGETS[name]
    with aot.offline(chip.target) as compiled:
        spilling_kernel[(1,)](torch.empty(n * n), N=n, num_warps=1)
    row = {"target": name, "op": "conv1d", "dtype": "bfloat16"} | aot.resources(compiled[0].kernel)
    assert any(fault.startswith("spills") for fault in aot.faults(row)), row
    bare = row | {"spills": 0, "matrix": "", "kernel": "_conv1d_fwd_kernel", "shared": 0}
    assert aot.faults(bare) == ["no matrix instruction"]
    assert aot.faults(bare | {"tensor_memory": 640, "matrix": "tcgen05.mma"}) == [
        "needs 640 of 512 columns of tensor memory"
    ]
    assert aot.faults(bare | {"shared": 2**20, "matrix": "mma.sync"})[0].startswith("needs 1048576")
    crowded = bare | {"matrix": "mma.sync", "warps": 16, "registers": 129}
    needs = "needs 66048 registers; a block has 65536"
    assert aot.faults(crowded) == ([needs] if chip.target.backend == "cuda" else [])
    assert aot.faults(crowded | {"registers": 128}) == []
"""
