from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.oracle import allowance, error
from tests.support.weights import about


@pytest.fixture(scope="session")
def hollow() -> Callable[[str], dict[str, Tensor]]:
    """Tensors of the published names and shapes, of unset values: nearly free at any size."""

    def made(vectors: str) -> dict[str, Tensor]:
        shapes = about("evaluate", vectors)[0]["shapes"]
        return {name: torch.empty(shape) for name, shape in shapes.items()}

    return made


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor, int], None]:
    """Compare with the public result: float32 sums of so many terms, one network after another."""

    def compare(found: Tensor, truth: Tensor, terms: int) -> None:
        assert error(found, truth) <= allowance(truth, torch.float32, terms)
        assert float((found - truth).norm() / truth.norm()) <= 1e-5

    return compare


@pytest.fixture(scope="session")
def near_spectrum() -> Callable[[Tensor, Tensor, int, float], None]:
    """Compare logarithms of power with those of a Fourier sum of so many terms in float32.

    `neper` is the unit of the logarithm: what e times the power adds. A sum's rounding is that of
    its largest terms, so cells near the floor are off by more. Power is the sum of two squares,
    whose derivative is 2 sqrt(2) times its root at most.
    """

    def compare(found: Tensor, truth: Tensor, terms: int, neper: float) -> None:
        rounding = (4 + math.sqrt(terms)) * torch.finfo(torch.float32).eps
        below = (truth.max() - truth) / neper
        allowed = 8**0.5 * neper * rounding * torch.exp(below / 2)
        assert bool(((found - truth).abs() <= allowed).all())
        assert float((found - truth).norm() / truth.norm()) <= 1e-5

    return compare
