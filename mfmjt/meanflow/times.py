"""Where on [0, 1] the objective looks: t = 0 is data, t = 1 noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["TimeSampler", "logit_normal", "time_pairs", "uniform"]

TimeSampler = Callable[[int, torch.device, "torch.Generator | None"], Tensor]
"""sampler(count, device, generator) -> (count,) float32 in [0, 1]."""


def logit_normal(mean: float = -2.0, std: float = 2.0) -> TimeSampler:
    """sigmoid(mean + std·n), n normal; (−2, 2) is the choice of arXiv 2509.06389."""
    if std < 0:
        raise InputError(f"std is {std}: a spread cannot be negative. Give 0 or more.")

    def sampler(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return (mean + std * torch.randn(count, device=device, generator=generator)).sigmoid()

    return sampler


def uniform() -> TimeSampler:
    """Uniform on [0, 1)."""

    def sampler(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.rand(count, device=device, generator=generator)

    return sampler


def time_pairs(
    count: int,
    intervals: int,
    sampler: TimeSampler,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (r, t): two sorted draws for the first `intervals` samples, r = t for the others.

    The number is fixed and the position too, so that shapes do not depend on the draw; samples of a
    batch are in random order anyway.

    Returns:
        r and t, each (count,) float32, r ≤ t.
    """
    first = sampler(count, device, generator)
    second = sampler(intervals, device, generator)
    r = torch.cat((torch.minimum(first[:intervals], second), first[intervals:]))
    t = torch.cat((torch.maximum(first[:intervals], second), first[intervals:]))
    return r, t
