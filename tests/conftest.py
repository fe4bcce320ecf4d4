from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    # What `torch.func.jvp` and inductor load at their first use is written in PyTorch's deprecated
    # TorchScript.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp
    import torch.utils.mkldnn

from mfmjt.kernels import _backends

pytest_plugins = ["tests.support.digests", "tests.support.fixtures"]

if _backends.INTERPRETED:
    np.seterr(
        all="ignore"
    )  # kernels run on NumPy here: infinities are theirs to handle, as on a GPU


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where tests/kernels run their ops, such as cuda [cpu]"
    )
    parser.addoption(
        "--library", action="store_true", help="call the library ops: no shortcut for eager calls"
    )
    parser.addoption(
        "--avx2",
        action="store_true",
        help="use nothing beyond AVX2, as on most processors; end at once where there is nothing",
    )


@pytest.fixture(scope="session", autouse=True)
def _single_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
