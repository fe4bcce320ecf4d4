"""The judge of `mfmjt.testing`, as the tests use it: under Triton's interpreter too."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mfmjt import testing
from mfmjt.kernels import _backends
from mfmjt.testing import allowance, check_compiled, error, strided

__all__ = [
    "DTYPES",
    "OPCHECKS_OF_A_DUAL",
    "allowance",
    "check_compiled",
    "check_op",
    "error",
    "randn",
    "strided",
]

DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
if _backends.INTERPRETED:  # Triton's interpreter has no working bfloat16
    DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.bfloat16)

# Kernels take long there, and run one after the other.
check_op = functools.partial(testing.check_op, repeat=not _backends.INTERPRETED)

# The dual ops refuse gradients of their tangents, and this check of PyTorch's asks for them all.
OPCHECKS_OF_A_DUAL = ("test_schema", "test_autograd_registration", "test_faketensor")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
