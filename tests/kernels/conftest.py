from __future__ import annotations

import pytest
import torch

from mfmjt.kernels import _triton

# Triton's interpreter takes the place of the C++ kernels, whose own tests then judge nothing.
collect_ignore = ["test_ext.py", "test_alone.py", "test_fuzz.py"] if _triton.INTERPRETED else []


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
