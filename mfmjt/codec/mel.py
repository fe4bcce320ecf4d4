"""Mel filterbanks, and log-mel spectrograms as MMAudio computes them.

MMAudio (Cheng et al., 2025, arXiv:2412.15322) has two front ends, one per sample rate, which differ
in window, hop, number of bands and in the base of the logarithm.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError

__all__ = [
    "MEL_CONFIGS",
    "MelConfig",
    "MelSpectrogram",
    "filterbank",
    "htk_mel",
    "mel_power",
    "stft",
]


@dataclass(frozen=True)
class MelConfig:
    """Settings of one mel front end.

    Attributes:
        sample_rate: In Hz.
        window: Length of the FFT and of the Hann window, in samples.
        hop: Samples from one frame to the next.
        bands: Number of mel bands.
        low: Lower edge of the first band, in Hz.
        high: Upper edge of the last band, in Hz.
        decimal: Logarithm to base 10 where true, natural where false.
    """

    sample_rate: int
    window: int
    hop: int
    bands: int
    low: float
    high: float
    decimal: bool


MEL_CONFIGS = {
    "16k": MelConfig(16000, 1024, 256, 80, 0.0, 8000.0, decimal=True),
    "44k": MelConfig(44100, 2048, 512, 128, 0.0, 22050.0, decimal=False),
}

# Slaney's Auditory Toolbox (1998): linear up to 1 kHz in steps of 200/3 Hz, then 27 steps per
# factor of 6.4.
_LINEAR_STEP = 200.0 / 3.0
_BREAK_HZ = 1000.0
_LOG_STEP = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27.0


def _slaney_edges(low: float, high: float, count: int) -> Tensor:
    hz = torch.tensor([low, high], dtype=torch.float64)
    above = _BREAK_HZ / _LINEAR_STEP + torch.log(hz.clamp(min=_BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    ends = torch.where(hz < _BREAK_HZ, hz / _LINEAR_STEP, above)
    mel = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)
    steps = mel - _BREAK_HZ / _LINEAR_STEP
    return torch.where(
        steps < 0, mel * _LINEAR_STEP, _BREAK_HZ * torch.exp(steps.clamp(min=0) * _LOG_STEP)
    )


def htk_mel(hz: Tensor) -> Tensor:
    """Give mels of frequencies in Hz, on HTK's scale."""
    return 2595.0 * torch.log10(1.0 + hz / 700.0)


def _htk_edges(low: float, high: float, count: int) -> Tensor:
    # Both ends in float32, as they were when the judge of `mfmjt evaluate` was trained.
    ends = htk_mel(torch.tensor([low, high]))
    mel = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def filterbank(
    sample_rate: int,
    window: int,
    bands: int,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["slaney", "htk"] = "slaney",
) -> Tensor:
    """Give triangular mel filters.

    Args:
        sample_rate: In Hz.
        window: FFT length.
        bands: Number of filters.
        low: Lower edge of the first filter, in Hz.
        high: Upper edge of the last filter, in Hz; by default half the sample rate.
        scale: Slaney's filters have unit area (per Hz, times two). HTK's have unit sum, and are
            never narrower than one bin to each side: at short windows the low bands would otherwise
            fall between two bins and hear nothing.

    Returns:
        `(bands, window // 2 + 1)` float32; computed in float64.
    """
    step = sample_rate / window
    edges = _slaney_edges if scale == "slaney" else _htk_edges
    points = edges(low, sample_rate / 2 if high is None else high, bands + 2)[:, None]
    below, middle, above = points[:-2], points[1:-1], points[2:]
    if scale == "htk":
        below, above = torch.minimum(below, middle - step), torch.maximum(above, middle + step)
    bins = torch.arange(window // 2 + 1, dtype=torch.float64) * step
    rising, falling = (bins - below) / (middle - below), (above - bins) / (above - middle)
    filters = torch.minimum(rising, falling).clamp(min=0)
    if scale == "slaney":
        return (filters * (2 / (above - below))).float()
    return (filters / filters.sum(dim=1, keepdim=True)).float()


def stft(waveform: Tensor, window: Tensor, hop: int) -> Tensor:
    """Give spectra `(B, len(window) // 2 + 1, frames)` of `(B, S)`, complex, without padding."""
    return torch.stft(waveform, len(window), hop, window=window, center=False, return_complex=True)


@functools.lru_cache(maxsize=8)
def _htk_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    return filterbank(sample_rate, window, bands, low=40.0, scale="htk").T.contiguous()


def mel_power(waveform: Tensor, sample_rate: int, window: int, hop: int, bands: int) -> Tensor:
    """Give the power in HTK's mel bands from 40 Hz up of spectra centered on every hop-th sample.

    Args:
        waveform: Samples `(B, S)`, float32; silence is assumed around them.
        sample_rate: In Hz.
        window: Samples per spectrum.
        hop: Samples between spectra.
        bands: Number of bands.

    Returns:
        Power `(B, S // hop + 1, bands)`.
    """
    padded = F.pad(waveform, (window // 2, window // 2))
    spectrum = stft(padded, torch.hann_window(window, device=waveform.device), hop)
    filters = _htk_filters(sample_rate, window, bands).to(waveform.device)
    return torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2) @ filters


class MelSpectrogram(nn.Module):
    """Log-mel spectrogram `log(max(W sqrt(|STFT|^2 + 1e-9), 1e-5))` of a waveform in [-1, 1].

    Args:
        mode: `"16k"` (80 bands, hop 256, base 10) or `"44k"` (128 bands, hop 512, base e).

    Raises:
        InputError: The mode is neither.
    """

    window: Tensor
    filterbank: Tensor

    def __init__(self, mode: str) -> None:
        super().__init__()
        if mode not in MEL_CONFIGS:
            raise InputError(
                f"No mel spectrogram {mode!r}: there are {', '.join(MEL_CONFIGS)}. Give one."
            )
        self.config = c = MEL_CONFIGS[mode]
        basis = filterbank(c.sample_rate, c.window, c.bands, c.low, c.high)
        self.register_buffer("window", torch.hann_window(c.window), persistent=False)
        self.register_buffer("filterbank", basis, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Log-mel frames; values outside [-1, 1] are clamped.

        Args:
            waveform: `(B, S)` float, at the configuration's sample rate, S > (window - hop) / 2.

        Returns:
            `(B, bands, frames)` with `frames = S // hop` (S a multiple of the hop or not).

        Raises:
            InputError: The waveform is not `(B, S)` or too short to be reflected at its ends.
        """
        c = self.config
        margin = (c.window - c.hop) // 2
        if waveform.ndim != 2 or waveform.shape[-1] <= margin:
            raise InputError(
                f"Waveform of shape {tuple(waveform.shape)} cannot be analysed: "
                f"(batch, samples) with more than {margin} samples is needed. Pad it with zeros."
            )
        padded = F.pad(waveform.clamp(-1, 1)[:, None], (margin, margin), mode="reflect")[:, 0]
        spectrum = stft(padded, self.window, c.hop)
        # The 1e-9 under the root keeps the gradient finite in silence.
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
        mel = (self.filterbank @ magnitude).clamp(min=1e-5)
        return mel.log10() if c.decimal else mel.log()
