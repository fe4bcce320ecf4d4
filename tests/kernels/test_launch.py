"""Kernels launched as on an H200, by a driver that launches nothing: bench/gpu/stand_in.py.

All of Triton's way is real: arguments specialized and parsed, ptxas, registers and shared memory
against a block's, grids against the driver's limits. Nothing is computed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.precompile import build_driver

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OPS = [path.stem for path in sorted((ROOT / "mfmjt" / "kernels").glob("[a-z]*.py"))]
WITHOUT_KERNELS = {"linear"}  # the vendor's product serves

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc for a driver"),
]


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return build_driver(sys.executable, tmp_path_factory.mktemp("driver"))


def launched(driver: Path, code: str, *arguments: str) -> int:
    """How often `code` launched a kernel, of which none was refused."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_LIBCUDA_PATH": str(driver)}
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{code}{END}", *arguments],
        capture_output=True,
        text=True,
        cwd=driver,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    launches, refused, reason = json.loads(done.stdout.splitlines()[-1])
    assert refused == 0, reason
    return launches


BEGIN = """
import json, os, sys
from bench.gpu.stand_in import installed  # before the kernels are imported
import torch
from mfmjt import kernels
stand_in = installed(os.environ["TRITON_LIBCUDA_PATH"])
library = stand_in.__enter__()
torch.manual_seed(0)
"""

END = """
reason = library.stand_in_reason().decode()
print(json.dumps([library.stand_in_launches(), library.stand_in_refused(), reason]))
"""


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_KERNELS])
def test_what_a_gpu_is_checked_with_can_be_launched(driver, op):
    assert launched(driver, CHECKS, op) >= 4  # each dtype


CHECKS = """
from bench.case import cases, operands
from bench.providers import OURS, Provider, step
from mfmjt.testing import BACKWARD, JVP_BACKWARD, VALUE
for case in cases(sys.argv[1], "check"):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        given = operands(case, dtype, torch.device("cpu"))
        for mode in (VALUE,) if case.inference else (BACKWARD, JVP_BACKWARD):
            step(Provider(OURS, case.function), mode)(given)
"""


@pytest.mark.parametrize("width", [5001, 8192])
def test_norms_of_the_widest_rows_can_be_launched(driver, width):
    """Whose programs have 16 warps: more registers than a block has are easily asked for."""
    assert launched(driver, WIDE, str(width)) >= 10


WIDE = """
width = int(sys.argv[1])
for dtype in (torch.bfloat16, torch.float32):
    x, h = (torch.randn(2, 40, width, dtype=dtype) for _ in range(2))
    m = torch.randn(2, 1, width, dtype=dtype)
    for op, moving in ((kernels.adaln, (x, m, m)), (kernels.gated_residual_adaln, (x, h, m, m, m))):
        leaves = [t.clone().requires_grad_() for t in moving]
        y, _ = torch.func.jvp(op, tuple(leaves), moving)
        y = [y] if isinstance(y, torch.Tensor) else y
        torch.autograd.grad(y, leaves, [torch.ones_like(part) for part in y])
    with torch.no_grad():
        norm = kernels.streams.gated_residual_norm
        norm([x, x], [h, h], [m, m], [m, m], [m, m], None, 1e-5)
"""


def test_a_generation_and_a_training_step_can_be_launched(driver):
    """Of nano; the scale of guidance as a graph has it, a tensor."""
    assert launched(driver, NETWORK) > 200


NETWORK = """
from mfmjt import meanflow
from mfmjt.model import MFMJT
scale = torch.tensor([1.5], dtype=torch.double)
for dtype in (torch.bfloat16, torch.float32):
    net = MFMJT.from_config("nano").to(dtype)
    c = net.config
    z = torch.randn(2, c.latent_length, c.latent_dim)
    sizes = {"video": c.video_dim, "sync": c.sync_dim, "text": c.text_dim}
    cond = {n: torch.randn(2, getattr(c, f"{n}_length"), d, dtype=dtype) for n, d in sizes.items()}
    net.frozen().step(z, guidance=scale, **cond)
    t = torch.tensor([0.9, 0.5])
    noise = torch.randn_like(z).to(dtype)
    meanflow.loss(net, z.to(dtype), cond, noise=noise, r=t / 2, t=t).backward()
"""
