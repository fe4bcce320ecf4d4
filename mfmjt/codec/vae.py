"""MMAudio's mel autoencoder, from the formulas of magnitude-preserving networks.

One-dimensional over time, with mel bands as channels (Cheng et al., 2025, arXiv:2412.15322; the
primitives are those of Karras et al., "EDM2", 2024, arXiv:2312.02696, equations by number):

- convolutions have no bias, and each output channel's weights have unit norm (47, 66);
- pixel norm divides by the root mean square over channels;
- mp_silu(x) = silu(x) / 0.596 (81);
- mp_sum(a, b) = ((1 - t) a + t b) / sqrt((1 - t)² + t²) with t = 0.3 (88).

Weights are normalized once, on loading, so that at run time they are plain convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, weights_in
from mfmjt.errors import InputError

__all__ = ["VAE", "VAE_CONFIGS", "Posterior", "VAEConfig"]

_EPS = 1e-4
_SUM_WEIGHT = 0.3
_CLAMP = 256.0
_GAINS = ("encoder.learnable_gain", "decoder.learnable_gain")


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `VAE`.

    Attributes:
        bands: Mel bands.
        latent_dim: Latent channels.
        width: Channels of the first level; the second and third have 2 and 4 times as many.
    """

    bands: int
    latent_dim: int
    width: int


VAE_CONFIGS = {"16k": VAEConfig(80, 20, 384), "44k": VAEConfig(128, 40, 512)}


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents.

    Attributes:
        mean: `(B, latent_dim, T)`.
        logvar: `(B, latent_dim, T)`, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor


def _conv(inner: int, outer: int, kernel: int = 3) -> nn.Conv1d:
    return nn.Conv1d(inner, outer, kernel, padding=kernel // 2, bias=False)


def _pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(x.shape[dim]) + _EPS).to(x.dtype)


def _mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def _mp_sum(a: Tensor, b: Tensor) -> Tensor:
    t = _SUM_WEIGHT
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def _unit_norm(weight: Tensor) -> Tensor:
    """W / (||w|| + eps sqrt(n)) per output channel of n inputs: equations 47 and 66 in one."""
    norm = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
    return weight / (norm + _EPS * math.sqrt(weight[0].numel()))


class _ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = _conv(inner, outer)
        self.conv2 = _conv(outer, outer)
        self.nin_shortcut = _conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = _pixel_norm(x)
        h = self.conv2(_mp_silu(self.conv1(_mp_silu(x))))
        return _mp_sum(self.nin_shortcut(x), h).clamp(-_CLAMP, _CLAMP)


class _Attention(nn.Module):
    """One head over time; q, k and v are pixel-normalized."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = _conv(dim, 3 * dim, 1)
        self.proj_out = _conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Output channels of qkv are (dim, 3), each of dim's q, k and v side by side.
        qkv = self.qkv(x).unflatten(1, (-1, 3))
        q, k, v = _pixel_norm(qkv).transpose(1, 3).unbind(2)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return _mp_sum(x, self.proj_out(h.transpose(1, 2)))


class _Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(dim, dim)
        self.attn_1 = _Attention(dim)
        self.block_2 = _ResBlock(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Module):
    """Half the rate: 1x1 convolution, mean of pairs, 1x1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(dim, dim, 1)
        self.conv2 = _conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class _Upsample(nn.Module):
    """Twice the rate: each frame repeated, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


class _Level(nn.Module):
    """Residual blocks at one width, then a change of rate where `resample` is given."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, inner: int, outer: int, blocks: int, resample: str = "") -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResBlock(inner if i == 0 else outer, outer) for i in range(blocks)
        )
        self.downsample = _Downsample(outer) if resample == "down" else nn.Identity()
        self.upsample = _Upsample(outer) if resample == "up" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class _Encoder(nn.Module):
    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        w = c.width
        self.conv_in = _conv(c.bands, w)
        self.down = nn.ModuleList(
            [_Level(w, w, 2, "down"), _Level(w, 2 * w, 2), _Level(2 * w, 4 * w, 2)]
        )
        self.mid = _Middle(4 * w)
        self.conv_out = _conv(4 * w, 2 * c.latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(_mp_silu(self.mid(x)))


class _Decoder(nn.Module):
    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        w = c.width
        self.conv_in = _conv(c.latent_dim, 4 * w)
        self.mid = _Middle(4 * w)
        # Published names count levels by resolution, so the last is used first.
        self.up = nn.ModuleList(
            [_Level(2 * w, w, 3), _Level(4 * w, 2 * w, 3, "up"), _Level(4 * w, 4 * w, 3)]
        )
        self.conv_out = _conv(w, c.bands)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_mp_silu(x))


class VAE(nn.Module):
    """Mel spectrogram <-> Gaussian latents at half its frame rate.

    Args:
        config: `"16k"`, `"44k"`, or sizes.

    Attributes:
        config: Sizes.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()
    data_mean: Tensor
    data_std: Tensor

    def __init__(self, config: str | VAEConfig) -> None:
        super().__init__()
        self.config = c = _config(config)
        self.encoder = _Encoder(c)
        self.decoder = _Decoder(c)
        self.register_buffer("data_mean", torch.zeros(1, c.bands, 1))
        self.register_buffer("data_std", torch.ones(1, c.bands, 1))
        for conv in self.modules():
            if isinstance(conv, nn.Conv1d):
                nn.init.normal_(conv.weight)
                with torch.no_grad():
                    conv.weight.copy_(_unit_norm(conv.weight))

    @classmethod
    def from_mmaudio(cls, state_dict: Mapping[str, Tensor], config: str | VAEConfig) -> VAE:
        """Return the autoencoder of a published state dict (`v1-16.pth`, `v1-44.pth`), in float32.

        Args:
            state_dict: Names and shapes as published, weights not yet normalized, or a checkpoint
                with these inside.
            config: `"16k"`, `"44k"`, or the sizes of one that was trained otherwise.

        Raises:
            InputError: No such configuration, or entries are missing, unexpected or of another
                shape; the first are named.
        """
        config = _config(config)
        what = f"MMAudio's mel autoencoder of {config.bands} bands"
        state, notes = weights_in(state_dict, "decoder.conv_in.weight", what)
        with torch.device("meta"):
            vae = cls(config)
        gains = load_published(vae, state, what, also=[(name, ()) for name in _GAINS])
        vae.notes = notes
        for module in vae.modules():
            if isinstance(module, nn.Conv1d):
                module.weight = nn.Parameter(_unit_norm(module.weight.detach()))
        with torch.no_grad():
            # The gain starts at zero; the convolution's is one more.
            vae.encoder.conv_out.weight.mul_(gains[_GAINS[0]] + 1)
            vae.decoder.conv_out.weight.mul_(gains[_GAINS[1]] + 1)
        return vae.eval()

    def encode(self, mel: Tensor) -> Posterior:
        """Posterior of the latents.

        Args:
            mel: `(B, bands, T)` log-mel frames, T >= 2; an odd last frame is not used.

        Returns:
            Mean and log-variance `(B, latent_dim, T // 2)`, float32.

        Raises:
            InputError: Another shape.
        """
        _check(mel, self.config.bands, "Mel spectrogram", "bands", 2)
        x = (mel - self.data_mean) / self.data_std
        mean, logvar = self.encoder(x.to(self._dtype)).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latent: Tensor) -> Tensor:
        """Mel spectrogram of latents.

        Args:
            latent: `(B, latent_dim, T)`, T >= 1.

        Returns:
            `(B, bands, 2T)` float32 log-mel frames.

        Raises:
            InputError: Another shape.
        """
        _check(latent, self.config.latent_dim, "Latents", "channels", 1)
        return self.decoder(latent.to(self._dtype)).float() * self.data_std + self.data_mean

    @property
    def _dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype


def _config(config: str | VAEConfig) -> VAEConfig:
    if isinstance(config, VAEConfig):
        return config
    if config not in VAE_CONFIGS:
        raise InputError(
            f"No autoencoder {config!r}: known are {', '.join(VAE_CONFIGS)}. Give one of them."
        )
    return VAE_CONFIGS[config]


def _check(x: Tensor, channels: int, what: str, kind: str, least: int) -> None:
    if x.ndim != 3 or x.shape[1] != channels or x.shape[2] < least:
        raise InputError(
            f"{what} of shape {tuple(x.shape)} cannot be used: (batch, {channels} {kind}, "
            f"frames >= {least}) is needed."
        )
