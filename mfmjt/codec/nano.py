"""The codec of the shipped model: a mel variational autoencoder with an iSTFT decoder.

The encoder sees 80 log-mel bands at 62.5 Hz and, because their 64 ms windows blur attacks, 16 bands
of 16 ms windows at 250 Hz; it gives 20 Gaussian latents at 31.25 Hz. The decoder follows Vocos
(Siuzdak, 2023, arXiv:2306.00814): ConvNeXt blocks at rising frame rates predict magnitudes and
phases of a short-time spectrum, inverted by one FFT per frame. A second magnitude shapes fixed
noise: latents cannot say the phase of every noise bin, and rain made of smooth magnitudes buzzes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.checkpoints import load_module, save_module
from mfmjt.codec.base import Codec
from mfmjt.codec.mel import MelSpectrogram, filterbank, stft
from mfmjt.errors import InputError

__all__ = ["NanoCodec", "NanoCodecConfig"]

_NOISE_FRAMES = 509  # prime, so that the period never lines up with a rhythm in the clip


@dataclass(frozen=True)
class NanoCodecConfig:
    """Sizes of a `NanoCodec`.

    Attributes:
        latent_dim: Latent channels.
        encoder_dim: Width of the encoder.
        encoder_depth: Blocks of the encoder, half of them after the stride.
        decoder_dims: Width of the decoder at 31.25, 62.5 and 125 frames/s.
        decoder_depths: Blocks at each of these rates.
        expansion: Hidden width of a block over its width.
    """

    latent_dim: int = 20
    encoder_dim: int = 160
    encoder_depth: int = 4
    decoder_dims: tuple[int, int, int] = (256, 224, 192)
    decoder_depths: tuple[int, int, int] = (2, 2, 4)
    expansion: int = 2


class _Block(nn.Module):
    """ConvNeXt block over `(B, N, C)`: depthwise convolution, norm, two-layer MLP, residual."""

    def __init__(self, dim: int, expansion: int, kernel: int = 7) -> None:
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim * expansion)
        self.down = nn.Linear(dim * expansion, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(mixed))))


class _Upsample(nn.Module):
    """Two frames out of each `(B, N, C)` -> `(B, 2N, D)`, by one linear map."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.split = nn.Linear(dim, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        return self.split(x).unflatten(-1, (2, -1)).flatten(1, 2)


class NanoCodec(Codec):
    """16 kHz mono waveform <-> 20 latent channels at 31.25 Hz.

    Args:
        config: Sizes; the default is the shipped codec.

    Attributes:
        sample_rate: 16000 Hz.
        hop: 512 samples per latent frame.
        latent_dim: Latent channels.
    """

    sample_rate = 16000
    hop = 512
    fft = 512
    fine_hop = 128
    fine_window: Tensor
    fine_filterbank: Tensor
    window: Tensor
    clock: Tensor
    noise: Tensor

    def __init__(self, config: NanoCodecConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or NanoCodecConfig()
        self.latent_dim = c.latent_dim
        bins = self.fft // 2 + 1

        self.mel = MelSpectrogram("16k")
        fine = filterbank(self.sample_rate, 256, 16)
        self.register_buffer("fine_window", torch.hann_window(256), persistent=False)
        self.register_buffer("fine_filterbank", fine, persistent=False)
        self.stem = nn.Linear(80 + 4 * 16, c.encoder_dim)
        half = c.encoder_depth // 2
        blocks = [_Block(c.encoder_dim, c.expansion) for _ in range(c.encoder_depth)]
        self.encoder_fine = nn.Sequential(*blocks[:half])
        self.stride = nn.Linear(2 * c.encoder_dim, c.encoder_dim)
        self.encoder_coarse = nn.Sequential(*blocks[half:])
        self.encoder_norm = nn.LayerNorm(c.encoder_dim)
        self.posterior = nn.Linear(c.encoder_dim, 2 * c.latent_dim)

        dims, depths = c.decoder_dims, c.decoder_depths
        stages: list[nn.Module] = [nn.Linear(c.latent_dim, dims[0])]
        for level, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if level:
                stages.append(_Upsample(dims[level - 1], dim))
            stages.extend(_Block(dim, c.expansion) for _ in range(depth))
        self.decoder = nn.Sequential(*stages, nn.LayerNorm(dims[-1]))
        self.head = nn.Linear(dims[-1], 4 * bins)

        self.register_buffer("window", torch.hann_window(self.fft), persistent=False)
        # A bin's own frequency turns it by k·π/2 per frame of a quarter window. Taking this clock
        # out leaves only the slow drift off the bin's center for the network to say.
        quarter_turns = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64)
        turns = torch.arange(4)[:, None] * torch.arange(bins) % 4
        self.register_buffer("clock", quarter_turns[turns], persistent=False)
        draw = np.random.Generator(np.random.PCG64(0)).standard_normal((_NOISE_FRAMES, bins, 2))
        noise = torch.view_as_complex(torch.from_numpy(draw.astype(np.float32)))
        self.register_buffer("noise", noise, persistent=False)
        self._initialize(bins)

    def _initialize(self, bins: int) -> None:
        """Start quiet: magnitudes near -60 dB, posteriors narrow."""
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            self.head.bias.zero_()
            self.head.bias[:bins] = -2.0
            self.head.bias[3 * bins :] = -4.0
            self.posterior.bias[self.latent_dim :] = -3.0

    def features(self, waveform: Tensor) -> Tensor:
        """Compute the encoder's input `(B, S / 256, 144)` of `(B, S)`, S a multiple of 512."""
        mel = self.mel(waveform).transpose(1, 2)
        padded = F.pad(waveform.clamp(-1, 1)[:, None], (96, 96), mode="reflect")[:, 0]
        spectrum = stft(padded, self.fine_window, 64)
        fine = (self.fine_filterbank @ spectrum.abs()).clamp(min=1e-5).log10()
        fine = fine.transpose(1, 2).unflatten(1, (-1, 4)).flatten(2)
        # Fixed numbers rather than batch statistics: log10 mels of sounds lie around -3 ± 1.5.
        return (torch.cat([mel, fine], dim=-1) + 3.0) / 1.5

    def encode(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latents.

        Args:
            waveform: `(B, S)` float in [-1, 1], 16 kHz, S >= 1; padded with zeros to whole frames.

        Returns:
            Mean and log-variance, each `(B, ceil(S / 512), latent_dim)`.

        Raises:
            InputError: Wrong shape, no samples, or NaN/Inf among them.
        """
        if waveform.ndim != 2 or not waveform.is_floating_point():
            raise InputError(
                f"Waveform of shape {tuple(waveform.shape)}, {waveform.dtype} cannot be encoded: "
                "float samples (batch, samples) are needed. Reshape or convert it."
            )
        if waveform.numel() == 0:
            raise InputError(
                "Waveform is empty: there is nothing to encode. Give at least 1 sample."
            )
        if not bool(torch.isfinite(waveform).all()):
            raise InputError(
                "Waveform holds NaN or infinity: it cannot be encoded. Check its source."
            )
        padded = F.pad(waveform, (0, -waveform.shape[-1] % self.hop))
        x = self.encoder_fine(self.stem(self.features(padded)))
        x = self.encoder_coarse(self.stride(x.unflatten(1, (-1, 2)).flatten(2)))
        mean, logvar = self.posterior(self.encoder_norm(x)).float().chunk(2, dim=-1)
        return mean, logvar.clamp(-12.0, 4.0)

    def decode(self, latent: Tensor) -> Tensor:
        """Waveform of latents; the same latents give the same samples.

        Args:
            latent: `(B, N, latent_dim)`, N >= 1.

        Returns:
            `(B, N * 512)` float32; nominally in [-1, 1], not clipped.

        Raises:
            InputError: Wrong shape or no frames.
        """
        if latent.ndim != 3 or latent.shape[-1] != self.latent_dim or latent.shape[1] == 0:
            raise InputError(
                f"Latents of shape {tuple(latent.shape)} cannot be decoded: "
                f"(batch, frames >= 1, {self.latent_dim}) is needed."
            )
        return self._inverse(self._spectrum(self.head(self.decoder(latent)).float()))

    def _spectrum(self, head: Tensor) -> Tensor:
        """`(B, T, 4 * 257)` -> complex `(B, T, 257)`: tones plus shaped noise."""
        magnitude, real, imaginary, roughness = head.chunk(4, dim=-1)
        direction = torch.complex(real, imaginary)
        direction = direction / (direction.abs() + 1e-3)
        frames = head.shape[1]
        clock = self.clock.repeat(-(-frames // 4), 1)[:frames]
        noise = self.noise.repeat(-(-frames // _NOISE_FRAMES), 1)[:frames]
        # e^5 is a full-scale sine in one bin.
        tones = magnitude.clamp(max=5.0).exp() * direction * clock
        return tones + roughness.clamp(max=5.0).exp() * noise

    def _inverse(self, spectrum: Tensor) -> Tensor:
        """Windowed inverse FFT and overlap-add: `(B, T, 257)` -> `(B, T * 128)`."""
        count = spectrum.shape[1]
        added = self._overlap_add(torch.fft.irfft(spectrum, self.fft) * self.window)
        # Squared windows add up to 3/2 except at both ends, where fewer frames overlap.
        envelope = self._overlap_add(self.window.square().expand(1, count, -1))
        return added / envelope

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """`(B, T, 512)` -> `(B, T * 128)`, frame n centered on its own 128 samples."""
        overlap = self.fft // self.fine_hop
        parts = frames.unflatten(-1, (overlap, self.fine_hop)).unbind(2)
        shifted = [F.pad(part, (0, 0, i, overlap - 1 - i)) for i, part in enumerate(parts)]
        added = torch.stack(shifted).sum(0)
        start = (self.fft - self.fine_hop) // 2
        return added.flatten(1)[:, start : start + frames.shape[1] * self.fine_hop]

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the weights, stored as `dtype`, with the configuration as safetensors metadata."""
        save_module(path, self, self.config, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NanoCodec:
        """Read what `save` wrote, as float32 in evaluation mode.

        Raises:
            InputError: No such file, not safetensors, or not a `NanoCodec`'s.
        """
        return load_module(path, cls, NanoCodecConfig, "codec")
