"""Exponential moving averages of a network's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["EMA"]


class EMA:
    """Running averages `a <- b_k a + (1 - b_k) w`, one set of tensors for each decay.

    At update k = 0, 1, ... the decay is `b_k = min(decay, (1 + k) / (10 + k))`: early on, when the
    weights still move far, the average forgets quickly.

    Args:
        params: The tensors to follow; the averages start as copies of them, fp32.
        decays: One average is kept for each.
    """

    def __init__(self, params: Sequence[Tensor], decays: Sequence[float]) -> None:
        self.params = [p.detach() for p in params]
        self.decays = tuple(decays)
        self.updates = 0
        self.averages = [[p.float().clone() for p in self.params] for _ in self.decays]

    def decay_at(self, decay: float, update: int) -> float:
        """Return the decay used at `update`, counted from 0."""
        return min(decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_(average, self.params, 1 - self.decay_at(decay, self.updates))
        self.updates += 1

    @torch.no_grad()
    def swap(self, index: int = 0) -> None:
        """Exchange the weights with average `index`; a second call undoes it exactly."""
        for param, average in zip(self.params, self.averages[index], strict=True):
            weight = param.clone()
            param.copy_(average)
            average.copy_(weight)
