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
        self.averages = [[p.float().clone() for p in self.params] for _ in self.decays]
        # Where the weights are: how often they were averaged may depend on what they became.
        self._updates = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @property
    def updates(self) -> int:
        """Updates so far; waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates.fill_(count)

    @torch.no_grad()
    def update(self, when: Tensor | None = None) -> None:
        """Move every average towards the present weights.

        Args:
            when: A boolean, on the device of the weights: False leaves everything as it is. It is
                not waited for.
        """
        k = self._updates
        new = _local(self.params)
        for decay, average in zip(self.decays, self.averages, strict=True):
            share = 1 - ((1 + k) / (10 + k)).clamp(max=decay)
            if when is not None:
                share = share * when
            old = _local(average)
            way = torch._foreach_sub(new, old)
            torch._foreach_mul_(way, share.float())
            torch._foreach_add_(old, way)
        self._updates += 1 if when is None else when

    @torch.no_grad()
    def swap(self, index: int = 0) -> None:
        """Exchange the weights with average `index`; a second call undoes it exactly."""
        for param, average in zip(self.params, self.averages[index], strict=True):
            weight = param.clone()
            param.copy_(average)
            average.copy_(weight)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that may be in shards."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
