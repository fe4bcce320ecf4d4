from __future__ import annotations

import importlib
import os

import pytest
import torch

from mfmjt.kernels import _ext, _triton

# Triton's interpreter takes the place of the C++ kernels, whose own tests then judge nothing.
collect_ignore = ["test_ext.py", "test_alone.py", "test_fuzz.py"] if _triton.INTERPRETED else []

# What `--avx2` needs in the environment, for libraries that look at it when they are loaded.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def pytest_configure(config):
    if not config.getoption("--avx2"):
        return
    if missing := [f"{name}={value}" for name, value in AVX2.items() if os.getenv(name) != value]:
        raise pytest.UsageError(f"--avx2 needs in the environment: {' '.join(missing)}")
    if not torch.cpu._is_avx512_supported():
        pytest.exit("This CPU has nothing beyond AVX2: --avx2 would leave nothing out.", 0)
    if "missing" not in _ext.status():
        importlib.import_module("mfmjt._C").limit_isa("avx2")


@pytest.fixture(autouse=True)
def device(request):
    """With `--device cuda` the tensors of these tests are made on the GPU."""
    with torch.device(request.config.getoption("--device")):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN, so that no kernel gets by with leaving it."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
