"""Time embeddings, rotary tables and the resampling of frame conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.kernels import linear
from mfmjt.model.blocks import Linear

__all__ = ["Conditions", "TimeEmbedding", "nearest_rows", "r_embedding", "rope_table", "tables"]

_CACHE_SIZE = 64
_cache: dict[tuple[object, ...], Tensor] = {}


def _cached(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, remembered by `key`; for small constant tables.

    A table made while compiling, under a functorch transform or as a fake tensor must not outlive
    that moment, so it is not kept; nor may a mode that makes fake tensors meet a real one. One made
    under inference mode could not be saved for backward.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()
    table = _cache.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = make()
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(table)
        if type(table) is Tensor and not wrapped:
            if len(_cache) >= _CACHE_SIZE:
                _cache.pop(next(iter(_cache)), None)
            _cache[key] = table
    return table


def tables() -> tuple[Tensor, ...]:
    """All that are remembered now; who holds them may go on reading them."""
    return tuple(_cache.values())


def rope_table(length: int, head_dim: int, scaling: float, device: torch.device) -> Tensor:
    """Cosine and sine of the rotary angles n·scaling·10000^(−2i/head_dim).

    Args:
        length: Number of positions N.
        head_dim: Channels per head D.
        scaling: Factor on positions; latent tokens per video token for the video stream, so that
            both streams count time in latent tokens.
        device: Where the table is needed.

    Returns:
        (N, D/2, 2) float32, cosine first.
    """

    def make() -> Tensor:
        i = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
        n = torch.arange(length, dtype=torch.float64, device=device)
        angle = n[:, None] * (scaling * 10_000.0 ** (-i / head_dim))
        return torch.stack((angle.cos(), angle.sin()), dim=-1).float()

    return _cached(("rope", length, head_dim, scaling, device), make)


def nearest_rows(rows: int, length: int, device: torch.device) -> Tensor:
    """Index (length,) that resamples `rows` rows as `interpolate(mode="nearest-exact")` does.

    PyTorch's own rounding is asked, because at exact ties it decides which row is taken.
    """

    def make() -> Tensor:
        position = torch.arange(rows, dtype=torch.float32, device=device)
        return F.interpolate(position[None, None], size=length, mode="nearest-exact")[0, 0].long()

    return _cached(("nearest", rows, length, device), make)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, cosines first, through a two-layer perceptron.

    Frequencies are (10000 / max_period)·10000^(−2i/F) for time in [0, 1]. All arithmetic is at
    least float32, whatever the parameters' dtype: with `max_period` 1 the fastest angle is 10,000
    rad, and rounding t to bfloat16 would make a third of the features wrong.
    """

    def __init__(self, dim: int, frequency_dim: int, max_period: float) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.max_period = max_period
        first, last = Linear(frequency_dim, dim), Linear(dim, dim)
        for layer in (first, last):
            # Without memory there is nothing to fill, and PyTorch would import its compiler for it.
            if not layer.weight.is_meta:
                nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def _frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        def make() -> Tensor:
            # In the published order of float32 operations: at 10,000 rad one rounding shows.
            i = torch.arange(0, self.frequency_dim, 2, dtype=dtype, device=device)
            return 10_000.0 / self.max_period / 10_000.0 ** (i / self.frequency_dim)

        return _cached(("frequencies", self.frequency_dim, self.max_period, dtype, device), make)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, D), float32 or the wider of the dtypes involved."""
        weight_1, bias_1, weight_2, bias_2 = self.mlp.parameters()
        work = torch.promote_types(weight_1.dtype, torch.float32)
        with torch.autocast(t.device.type, enabled=False):
            angle = t.to(work)[:, None] * self._frequencies(work, t.device)
            x = torch.cat((angle.cos(), angle.sin()), dim=-1)
            x = F.silu(linear(x, weight_1.to(work), bias_1.to(work)))
            return linear(x, weight_2.to(work), bias_2.to(work))


def r_embedding(dim: int) -> TimeEmbedding:
    """Embedding of t − r that starts at zero, so that u(z, r, t) starts as u(z, t, t).

    Never with v2's frequencies: a tangent of 10,000 rad per unit of time drowns du/dt.
    """
    embedding = TimeEmbedding(dim, 256, max_period=10_000.0)
    nn.init.zeros_(embedding.mlp[2].get_parameter("weight"))
    return embedding


class Conditions(NamedTuple):
    """What the network needs of its conditions, whatever the latent and the time.

    The first dimension is the batch, or 1 where a condition is null for all samples.

    Attributes:
        video: Projected video tokens (B, N_video, D).
        sync: Projected synchronisation features (B, N_sync, D), not yet resampled.
        text: Projected text tokens (B, N_text, D).
        pooled: Global condition (B, D).
    """

    video: Tensor
    sync: Tensor
    text: Tensor
    pooled: Tensor
