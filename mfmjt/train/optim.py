"""The optimizer of a training: AdamW, its learning rate, and moving averages of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfmjt.train.recipe import Loop

__all__ = ["EMA", "adamw", "schedule", "set_lr", "step_where"]


def schedule(step: int, share: float, warmup: int, kind: str, floor: float = 0.0) -> float:
    """Return the learning rate over its peak.

    Args:
        step: Steps done.
        share: How much of the fall is done, 0 to 1.
        warmup: Steps over which the rate rises from 0.
        kind: How it then falls: `cosine`, `linear`, or `constant` where it does not.
        floor: Where it falls to.
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if kind == "constant":
        return rise
    fall = 1 - share if kind == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return rise * (floor + (1 - floor) * max(0.0, fall))


def adamw(params: Sequence[Tensor], loop: Loop, fused: bool) -> torch.optim.AdamW:
    """Make the optimizer, its state included, so that a saved one has where to be loaded to.

    Args:
        params: What it steps.
        loop: Its settings.
        fused: Use PyTorch's fused kernels, which round otherwise than the plain ones.
    """
    optimizer = torch.optim.AdamW(
        params,
        lr=loop.lr,
        betas=loop.betas,
        weight_decay=loop.weight_decay,
        fused=fused,
        capturable=loop.cuda_graph,
    )
    device = params[0].device
    if loop.cuda_graph:
        # A number would be recorded; a place for one is read anew by every replay.
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
    for p in params:
        optimizer.state[p] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, in place where a recording reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def step_where(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Step if `good`, a boolean scalar; a fused optimizer finds out on the device."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif good:
        optimizer.step()


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
        """Move every average toward the present weights.

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
    def swap(self) -> None:
        """Exchange the weights with the first average, if any; a second call undoes it exactly."""
        for first in self.averages[:1]:
            for param, average in zip(self.params, first, strict=True):
                weight = param.clone()
                param.copy_(average)
                average.copy_(weight)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this process holds of tensors that may be in shards."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
