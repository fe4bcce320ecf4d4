"""BigVGAN: the vocoders that MMAudio uses, mel spectrogram in, waveform out.

Lee et al., "BigVGAN", 2023, arXiv:2206.04658. Each stage raises the rate by a transposed
convolution; then the mean of three residual blocks with kernels 3, 7 and 11, whose activation is
the anti-aliased SnakeBeta (`mfmjt.kernels.snake`). Making sound on a GPU, the blocks of a stage
share their launches, channels last (`mfmjt.kernels.vocoder`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfmjt.checkpoints import load_published, weights_in
from mfmjt.errors import InputError
from mfmjt.kernels import conv1d, snake, vocoder

__all__ = ["BIGVGAN_CONFIGS", "BigVGAN", "BigVGANConfig"]

_KERNELS = (3, 7, 11)
_DILATIONS = (1, 3, 5)


@dataclass(frozen=True)
class BigVGANConfig:
    """Sizes of a `BigVGAN`.

    Attributes:
        bands: Mel bands.
        width: Channels before the first stage; each stage halves them.
        rates: Factor by which each stage raises the rate.
        kernels: Kernel length of each stage's transposed convolution.
        tanh: Output through tanh where true, clamped to [-1, 1] where false.
        bias: The last convolution has a bias.
    """

    bands: int
    width: int
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    tanh: bool
    bias: bool


BIGVGAN_CONFIGS = {
    "16k": BigVGANConfig(80, 1536, (4, 4, 2, 2, 2, 2), (8, 8, 4, 4, 4, 4), tanh=True, bias=True),
    "44k": BigVGANConfig(
        128, 1536, (8, 4, 2, 2, 2, 2), (16, 8, 4, 4, 4, 4), tanh=False, bias=False
    ),
}


class _Snake(nn.Module):
    """SnakeBeta with frequency e^alpha and height e^-beta per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha, self.beta)


class _Conv1d(nn.Conv1d):
    """Same padding and a dilation; on a CPU by Toom and Cook's method where no gradient is wanted.

    Attributes:
        fast: Let a CPU be fast rather than as exact as PyTorch.
    """

    fast = True

    def __init__(self, channels: int, kernel: int, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(channels, channels, kernel, padding=padding, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.fast or x.device.type != "cpu":
            return super().forward(x)
        y = conv1d(x.transpose(1, 2), self.weight, self.bias, self.dilation[0], fast=True)
        return y.transpose(1, 2)


class _AMPBlock(nn.Module):
    """Three residual pairs of convolutions, the first of each pair dilated by 1, 3 and 5."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_Conv1d(channels, kernel, d) for d in _DILATIONS)
        self.convs2 = nn.ModuleList(_Conv1d(channels, kernel) for _ in _DILATIONS)
        self.activations = nn.ModuleList(_Snake(channels) for _ in range(2 * len(_DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            h = first(self.activations[2 * i](x))
            x = x + second(self.activations[2 * i + 1](h))
        return x


def _stage(x: Tensor, blocks: list[_AMPBlock]) -> Tensor:
    """Return the mean of residual blocks of x (B, N, C), all in the same launches."""
    xs, last = [x] * len(blocks), len(_DILATIONS) - 1
    for i, dilation in enumerate(_DILATIONS):
        first, second = [b.convs1[i] for b in blocks], [b.convs2[i] for b in blocks]
        hs = _activated(xs, [b.activations[2 * i] for b in blocks])
        hs = _activated(
            vocoder.convolve(hs, *_parameters(first), dilation),
            [b.activations[2 * i + 1] for b in blocks],
        )
        xs = vocoder.convolve(hs, *_parameters(second), residuals=xs, mean=i == last)
    return xs[0]


def _activated(xs: list[Tensor], snakes: list[Any]) -> list[Tensor]:
    return vocoder.activate(xs, [s.alpha for s in snakes], [s.beta for s in snakes])


def _parameters(convolutions: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights, arranged as `vocoder.convolve` reads them, and biases, if there are."""
    for module in convolutions:
        vocoder.arrange(module.weight, 2, 0, 1)
    biases = [module.bias for module in convolutions if module.bias is not None]
    return [module.weight for module in convolutions], biases


class BigVGAN(nn.Module):
    """Vocoder of log-mel spectrograms as `MelSpectrogram` makes them.

    Args:
        config: `"16k"` (16 kHz, 256 samples a frame), `"44k"` (44.1 kHz, 512 samples), or sizes.

    Attributes:
        config: Sizes.
        hop: Samples per mel frame.
        notes: One line each on what was odd about the file that it was read from.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: str | BigVGANConfig) -> None:
        super().__init__()
        self.config = c = _config(config)
        self.hop = math.prod(c.rates)
        self.conv_pre = nn.Conv1d(c.bands, c.width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        width = c.width
        for rate, kernel in zip(c.rates, c.kernels, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2)
            # A sequence of one, as in published names.
            self.ups.append(nn.Sequential(up))
            width //= 2
            self.resblocks.extend(_AMPBlock(width, k) for k in _KERNELS)
        self.activation_post = _Snake(width)
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3, bias=c.bias)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], config: str | BigVGANConfig) -> BigVGAN:
        """Return the vocoder of a published state dict, in float32, weight norm folded.

        Args:
            state_dict: As in `best_netG.pt` (MMAudio's 16 kHz) or `bigvgan_generator.pt` (NVIDIA's
                44.1 kHz), with or without their outer `{"generator": ...}` or another, with weight
                norm under either of its names, or already folded.
            config: `"16k"`, `"44k"`, or the sizes of another.

        Raises:
            InputError: No such configuration, or entries are missing, unexpected or of another
                shape; the first are named.
        """
        config = _config(config)
        what = f"BigVGAN of {config.bands} bands"
        state, notes = weights_in(state_dict, "conv_pre.bias", what)
        with torch.device("meta"):
            vocoder = cls(config)
        # The low-pass filters are the same in every file; `snake` computes them.
        load_published(vocoder, _folded(state), what, lambda name: name.endswith(".filter"))
        vocoder.notes = notes
        return vocoder.eval()

    def set_fast(self, fast: bool) -> BigVGAN:
        """Let a CPU convolve faster and round more, where no gradient is wanted.

        Args:
            fast: True as a new vocoder has it; in `eval()` and float32 the sound differs by a few
                1e-6 of its loudest sample, and takes two thirds of the time. False for convolutions
                as exact as PyTorch's.

        Returns:
            Itself.
        """
        for module in self.modules():
            if isinstance(module, _Conv1d):
                module.fast = fast
        return self

    def forward(self, mel: Tensor) -> Tensor:
        """Waveform of a mel spectrogram.

        Args:
            mel: `(B, bands, T)` log-mel frames, T >= 1.

        Returns:
            `(B, 1, T * hop)` in [-1, 1], of the weights' dtype.

        Raises:
            InputError: Another shape.
        """
        if mel.ndim != 3 or mel.shape[1] != self.config.bands or mel.shape[2] == 0:
            raise InputError(
                f"Mel spectrogram of shape {tuple(mel.shape)} cannot be used: (batch, "
                f"{self.config.bands} bands, frames >= 1) is needed."
            )
        x, kinds = mel.to(self.conv_pre.weight.dtype), len(_KERNELS)
        if self._halves and vocoder.suits(x, self.parameters()):
            return self._limited(self._channels_last(x.transpose(1, 2)).transpose(1, 2))
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(x)
            first, *others = self.resblocks[i * kinds : (i + 1) * kinds]
            total = first(x)
            for block in others:
                total = total + block(x)
            x = total / kinds
        return self._limited(self.conv_post(self.activation_post(x)))

    def _limited(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if self.config.tanh else x.clamp(-1.0, 1.0)

    @property
    def _halves(self) -> bool:
        """Return True if each transposed convolution is twice as long as its stride, and even."""
        pairs = zip(self.config.rates, self.config.kernels, strict=True)
        return all(kernel == 2 * rate and rate % 2 == 0 for rate, kernel in pairs)

    def _channels_last(self, x: Tensor) -> Tensor:
        """Return (B, T hop, 1) of a mel (B, T, bands)."""
        (x,) = vocoder.convolve([x], *_parameters([self.conv_pre]))
        ups: list[Any] = [up[0] for up in self.ups]  # type: ignore[index]
        blocks: list[Any] = list(self.resblocks)
        for i, (up, rate) in enumerate(zip(ups, self.config.rates, strict=True)):
            vocoder.arrange(up.weight, 2, 1, 0)
            x = vocoder.upsample(x, up.weight, up.bias, rate)
            x = _stage(x, blocks[i * len(_KERNELS) : (i + 1) * len(_KERNELS)])
        xs = _activated([x], [self.activation_post])
        return vocoder.convolve(xs, *_parameters([self.conv_post]))[0]


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of plain convolutions, w = g v / ||v|| with the norm over all but the first axis."""
    plain: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    directions: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace(".act.", ".")
        name = re.sub(r"\.parametrizations\.weight\.original0$", ".weight_g", name)
        name = re.sub(r"\.parametrizations\.weight\.original1$", ".weight_v", name)
        if name.endswith(".weight_g"):
            scales[name[:-2]] = value
        elif name.endswith(".weight_v"):
            directions[name[:-2]] = value
        else:
            plain[name] = value
    for name, v in directions.items():
        g = scales.pop(name, None)
        if g is None or v.ndim != 3 or g.numel() != v.shape[0]:
            plain[f"{name}_v"] = v  # named as unexpected, and the weight as missing
            continue
        v = v.float()
        norm = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True)
        plain[name] = g.float().reshape(-1, 1, 1) * v / norm
    return plain | {f"{name}_g": g for name, g in scales.items()}


def _config(config: str | BigVGANConfig) -> BigVGANConfig:
    if isinstance(config, BigVGANConfig):
        return config
    if config not in BIGVGAN_CONFIGS:
        raise InputError(
            f"No vocoder {config!r}: known are {', '.join(BIGVGAN_CONFIGS)}. Give one of them."
        )
    return BIGVGAN_CONFIGS[config]
