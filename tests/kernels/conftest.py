from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

from mfmjt import testing
from mfmjt.kernels import _backends, _eager, _native

# Processes share what they compile, also where inductor is used, which would have its own.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
NATIVE = {"test_standalone.py", "test_conv1d_toom.py", "test_native.py", "test_fuzz.py"}


def pytest_ignore_collect(collection_path, config):
    """Where Triton takes the place of the C++ kernels, their own tests judge nothing."""
    elsewhere = _backends.INTERPRETED or config.getoption("--device") != "cpu"
    return True if elsewhere and collection_path.name in NATIVE else None


def pytest_collection_modifyitems(config, items):
    """On a GPU leave out what draws its sizes: kernels are compiled for every one of them."""
    if config.getoption("--device") != "cpu":
        drawn = [i for i in items if getattr(i.obj, "is_hypothesis_test", False)]
        config.hook.pytest_deselected(items=drawn)
        items[:] = [item for item in items if item not in drawn]


# What `--avx2` needs in the environment, for libraries that look at it when they are loaded.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def pytest_configure(config):
    _eager.ENABLED = _eager.ENABLED and not config.getoption("--library")
    if not config.getoption("--avx2"):
        return
    if missing := [f"{name}={value}" for name, value in AVX2.items() if os.getenv(name) != value]:
        raise pytest.UsageError(f"--avx2 needs in the environment: {' '.join(missing)}")
    if not torch.cpu._is_avx512_supported():
        pytest.exit("This CPU has nothing beyond AVX2: --avx2 would leave nothing out.", 0)
    if "missing" not in _native.status():
        importlib.import_module("mfmjt._C").limit_isa("avx2")


@pytest.fixture(autouse=True)
def device(request):
    """With `--device cuda` the tensors of these tests are made on the GPU."""
    with torch.device(request.config.getoption("--device")):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN, so that no kernel gets by with leaving it."""
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
        yield
