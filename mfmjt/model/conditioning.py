"""What the network needs besides the latent: times, conditions, rotary tables; and their checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.kernels import linear
from mfmjt.model.blocks import FrameCondition, Linear
from mfmjt.model.config import CONFIGS, MAX_TOKENS, SYNC_SEGMENT, ModelConfig

__all__ = [
    "Conditions",
    "Features",
    "TimeEmbedding",
    "check_batch",
    "check_features",
    "check_latent",
    "fill_nulls",
    "frame_condition",
    "nearest_rows",
    "r_embedding",
    "rope_table",
    "sinusoids",
    "stream_ropes",
    "tables",
    "time_frequencies",
    "times",
]

_CACHE_SIZE = 64
_cache: dict[tuple[object, ...], Tensor] = {}


def _cached(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, cached by `key`; for small constant tables.

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
    """Return all cached tables; a CUDA graph that reads them keeps them in memory by this."""
    return tuple(_cache.values())


def rope_table(length: int, head_dim: int, scaling: float, device: torch.device) -> Tensor:
    """Return cosine and sine of the rotary angles n·scaling·10000^(−2i/head_dim).

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


def stream_ropes(
    config: ModelConfig, length: int, video: Tensor | None, text: Tensor
) -> tuple[Tensor | None, ...]:
    """Return rotary tables of N latent tokens, of video tokens of the same time, and of text."""

    def table(tokens: int, scaling: float) -> Tensor:
        return rope_table(tokens, config.head_dim, scaling, text.device)

    rotary = config.positions == "rotary"
    ropes: list[Tensor | None] = [table(length, 1.0) if rotary else None]
    if video is not None and not rotary:
        ropes.append(None)
    elif video is not None:
        ropes.append(table(video.shape[1], length / video.shape[1]))
    return (*ropes, table(text.shape[1], 1.0) if config.text_rope else None)


def sinusoids(length: int, dim: int, scaling: float, device: torch.device) -> Tensor:
    """Return cosines and then sines of the angles n·scaling·10000^(−2i/dim), (N, dim)."""

    def make() -> Tensor:
        return rope_table(length, dim, scaling, device).transpose(1, 2).flatten(1)

    return _cached(("sinusoids", length, dim, scaling, device), make)


def nearest_rows(rows: int, length: int, device: torch.device) -> Tensor:
    """Return the index (length,) that resamples `rows` rows as `nearest-exact` interpolation does.

    It is computed by PyTorch, whose rounding decides at exact ties which row is taken.
    """

    def make() -> Tensor:
        position = torch.arange(rows, dtype=torch.float32, device=device)
        return F.interpolate(position[None, None], size=length, mode="nearest-exact")[0, 0].long()

    return _cached(("nearest", rows, length, device), make)


def time_frequencies(
    features: int, max_period: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (10000 / max_period)·10000^(−2i/F) of F features, (F/2,), for time in [0, 1]."""

    def make() -> Tensor:
        # In the published order of float32 operations: at 10,000 rad one rounding shows.
        i = torch.arange(0, features, 2, dtype=dtype, device=device)
        return 10_000.0 / max_period / 10_000.0 ** (i / features)

    return _cached(("frequencies", features, max_period, dtype, device), make)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, cosines first, through a two-layer perceptron.

    Frequencies are those of `time_frequencies`. All arithmetic is at
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

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, D), float32 or the wider of the dtypes involved."""
        weight_1, bias_1, weight_2, bias_2 = self.mlp.parameters()
        work = torch.promote_types(weight_1.dtype, torch.float32)
        with torch.autocast(t.device.type, enabled=False):
            frequencies = time_frequencies(self.frequency_dim, self.max_period, work, t.device)
            angle = t.to(work)[:, None] * frequencies
            x = torch.cat((angle.cos(), angle.sin()), dim=-1)
            x = F.silu(linear(x, weight_1.to(work), bias_1.to(work)))
            return linear(x, weight_2.to(work), bias_2.to(work))


def r_embedding(dim: int, time_scale: float = 1.0) -> TimeEmbedding:
    """Make the second embedding, which starts at zero, so that u(z, r, t) starts as u(z, t, t).

    Never with v2's frequencies: a tangent of 10,000 rad per unit of time drowns du/dt.
    """
    embedding = TimeEmbedding(dim, 256, max_period=10_000.0 / time_scale)
    nn.init.zeros_(embedding.mlp[2].get_parameter("weight"))
    return embedding


class Conditions(NamedTuple):
    """Encoded conditions, which do not depend on the latent or the time.

    The first dimension is the batch, or 1 where a condition is null for all samples. A network
    without video has None in its place.

    Attributes:
        video: Projected video tokens (B, N_video, D).
        sync: Projected synchronization features (B, N_sync, D), before resampling.
        text: Projected text tokens (B, N_text, D).
        pooled: Global condition (B, D).
    """

    video: Tensor | None
    sync: Tensor | None
    text: Tensor
    pooled: Tensor


class Features(NamedTuple):
    """What the encoders give, null where missing or masked; None for what the network lacks.

    Attributes:
        video: (B, N_video, video_dim).
        sync: (B, N_sync, sync_dim).
        text: (B, N_text, text_dim).
        pooled: (B, 1, pooled_dim).
    """

    video: Tensor | None
    sync: Tensor | None
    text: Tensor
    pooled: Tensor | None


def fill_nulls(
    given: Tensor | None, mask: Tensor | None, null: Tensor, length: int, dtype: torch.dtype
) -> Tensor:
    """Put null features where features are missing or masked.

    Args:
        given: Features (B, tokens, channels), or None.
        mask: (B,) bool, False for samples without features; None for none of these.
        null: Null features: one row for every token, or a table with a row for each, whose last
            row is repeated beyond its end.
        length: Tokens where no features are given.
        dtype: What given features are cast to.

    Returns:
        (B, tokens, channels); B is 1 where no features are given.
    """
    if given is not None:
        if mask is None:
            return given.to(dtype)
        length = given.shape[1]
    if null.shape[0] not in (1, length):
        null = null[torch.arange(length, device=null.device).clamp_(max=null.shape[0] - 1)]
    null = null.expand(length, null.shape[1])[None]
    if given is None or mask is None:
        return null
    return torch.where(mask[:, None, None], given.to(dtype), null)


def frame_condition(shared: Tensor, sync: Tensor, length: int) -> FrameCondition:
    """Silu of the global condition plus synchronization, resampled to the latent's tokens.

    Args:
        shared: Embedded times and pooled conditions (B, 1, D).
        sync: Projected synchronization features (B, N_sync, D).
        length: Latent tokens N.
    """
    rows = sync.shape[1]
    if rows > length:  # only the needed ones; the gradient of an index would add by atomics
        sync = F.interpolate(sync.mT, size=length, mode="nearest-exact").mT
    index = nearest_rows(rows, length, sync.device) if rows < length else None
    return FrameCondition(F.silu(shared + sync), index)


def times(name: str, value: Tensor | float, z: Tensor) -> Tensor:
    """Return a time for each sample of z, (B,); never in less than float32.

    Raises:
        InputError: Neither one number nor one for each sample.
    """
    if not isinstance(value, Tensor):
        value = torch.full((z.shape[0],), value, dtype=torch.float32, device=z.device)
    if value.ndim == 0:
        value = value.expand(z.shape[0])
    if value.shape != z.shape[:1]:
        raise InputError(
            f"{name} has shape {tuple(value.shape)}: z has {z.shape[0]} samples. "
            "Give one time for each sample, (batch,), or one number."
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def check_latent(z: Tensor, config: ModelConfig) -> None:
    """Raise InputError unless z is a latent (B, N, C) of the network."""
    if z.ndim != 3 or z.shape[-1] != config.latent_dim:
        raise InputError(
            f"z has shape {tuple(z.shape)}: {config.name} takes (batch, tokens, "
            f"{config.latent_dim}), channels last. Transpose it or choose another network."
        )
    _check_length("z", z.shape[1])


def check_features(
    config: ModelConfig,
    video: Tensor | None,
    sync: Tensor | None,
    text: Tensor | None,
    pooled: Tensor | None,
    video_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Raise InputError unless features and masks fit the network and one another.

    Features are (B or 1, tokens, channels), sync in whole segments, and pooled (B or 1, channels);
    masks are (B,) bool.
    """
    if not config.takes_video and not (video is None and sync is None):
        takes = ", ".join(name for name, known in CONFIGS.items() if known.takes_video)
        raise InputError(
            f"{config.name} is a network of text alone, and video comes with it. Leave the video "
            f"out, or take a network of video: {takes}, or this one trained further with video."
        )
    if config.pooled_dim is None and pooled is not None:
        raise InputError(
            f"pooled comes with {config.name}, which pools the text itself. Leave it out."
        )
    parts = (
        ("video", video, ("tokens", config.video_dim), video_mask),
        ("sync", sync, ("tokens", config.sync_dim), video_mask),
        ("text", text, ("tokens", config.text_dim), text_mask),
        ("pooled", pooled, (config.pooled_dim,), text_mask),
    )
    for name, given, axes, mask in parts:
        if given is None:
            continue
        if given.ndim != 1 + len(axes) or given.shape[-1] != axes[-1]:
            raise InputError(
                f"{name} has shape {tuple(given.shape)}: {config.name} takes (batch, "
                f"{', '.join(map(str, axes))}). Extract the features with the encoders of this "
                "network."
            )
        if len(axes) > 1:
            _check_length(name, given.shape[1])
        if mask is not None and (mask.shape != given.shape[:1] or mask.dtype != torch.bool):
            raise InputError(
                f"The mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: it needs "
                f"one boolean for each of {given.shape[0]} samples. Give torch.bool, (batch,)."
            )
    batches = {name: given.shape[0] for name, given, _, _ in parts if given is not None}
    if len(set(batches.values()) - {1}) > 1:
        had = ", ".join(f"{name} {count}" for name, count in batches.items())
        raise InputError(
            f"The conditions differ in samples: {had}. Give one of each for every sample."
        )
    if sync is not None and sync.shape[1] % SYNC_SEGMENT:
        raise InputError(
            f"sync has {sync.shape[1]} features: they come in segments of {SYNC_SEGMENT}. "
            "Cut or extend them to whole segments."
        )


def check_batch(cond: Conditions, batch: int) -> None:
    """Raise InputError unless every condition has `batch` samples, or one for all of them."""
    for name, part in zip(cond._fields, cond, strict=True):
        if part is not None and part.shape[0] not in (1, batch):
            raise InputError(
                f"{name} has {part.shape[0]} samples and z has {batch}: they must agree. "
                "Give one condition for each sample."
            )


def _check_length(name: str, length: int) -> None:
    if not 1 <= length <= MAX_TOKENS:
        raise InputError(
            f"{name} has {length} tokens: 1 to {MAX_TOKENS} are accepted. "
            "Cut longer inputs into windows."
        )
