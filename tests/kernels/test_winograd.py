from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mfmjt.kernels.cpu import winograd
from tests import oracle


@pytest.mark.parametrize("tokens", [1, 2, 7, 10])
def test_three_taps(tokens: int) -> None:
    """Equal in exact arithmetic: in float64 only roundings of 3 * 5 terms are left."""
    x, weight = oracle.randn(2, tokens, 5), oracle.randn(4, 3, 5)
    truth = F.conv1d(x.transpose(1, 2), weight.transpose(1, 2), padding=1).transpose(1, 2)
    found = winograd.convolve(x, winograd.transform(weight))
    assert found.is_contiguous()
    assert oracle.error(found, truth) <= oracle.allowance(truth, torch.float64, terms=15)


def test_rounds_little_more_than_the_definition() -> None:
    """What is summed is sqrt(5/3) as large (root mean square), and so is its rounding.

    Of white x and w, m0 has the variance 2, m1 and m2 have 2 * 3/4 each, and three products have 3.
    """
    x, weight = torch.randn(1, 64, 128), torch.randn(32, 3, 128)
    truth = F.conv1d(x.double().mT, weight.double().mT, padding=1).mT
    direct = (F.conv1d(x.mT, weight.mT, padding=1).mT - truth).square().mean().sqrt()
    ours = (winograd.convolve(x, winograd.transform(weight)) - truth).square().mean().sqrt()
    assert ours <= 1.1 * (5 / 3) ** 0.5 * direct  # 2,048 errors tell 3 %; the transforms round too
