"""What launchers give to kernels; Triton 3.6 compares no tuple that holds None with None."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mfmjt.kernels.triton.launching import present, views


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (2, 3, 4), (2, 1, 4), (1, 3, 4), (2, 3, 5, 4)])
def test_views_hold_strides_and_no_none(shape):
    x = torch.zeros(shape)
    [(pointer, *steps)] = views([x])
    assert pointer is x
    strides = [d if n > 1 else 0 for d, n in zip(x.stride(), x.shape[:-1], strict=False)]
    strides = [0, *strides] if x.ndim == 2 else strides
    assert [getattr(d, "value", d) for d in steps] == [*strides, 0, 0][:3]


def test_absent_tensors_are_others_that_are_marked():
    x = torch.zeros(3)
    [first, second], there = present([None, x])
    assert (first is x, second is x, there) == (True, True, (0, 1))
    assert present([x, x])[1] == (1, 1)
    assert present([None, None]) is None
