"""Log-mel spectrograms as MMAudio computes them, with a Slaney filterbank of our own.

MMAudio (Cheng et al., 2025, arXiv:2412.15322) has two front ends, one per sample rate, which differ
in window, hop, number of bands and in the base of the logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.errors import InputError

__all__ = ["MEL_CONFIGS", "MelConfig", "MelSpectrogram", "slaney_filterbank"]


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


def _hz_to_mel(hz: Tensor) -> Tensor:
    above = _BREAK_HZ / _LINEAR_STEP + torch.log(hz.clamp(min=_BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return torch.where(hz < _BREAK_HZ, hz / _LINEAR_STEP, above)


def _mel_to_hz(mel: Tensor) -> Tensor:
    steps = mel - _BREAK_HZ / _LINEAR_STEP
    return torch.where(
        steps < 0, mel * _LINEAR_STEP, _BREAK_HZ * torch.exp(steps.clamp(min=0) * _LOG_STEP)
    )


def slaney_filterbank(sample_rate: int, window: int, bands: int, low: float, high: float) -> Tensor:
    """Triangular mel filters of unit area (per Hz, times two).

    Args:
        sample_rate: In Hz.
        window: FFT length.
        bands: Number of filters.
        low: Lower edge of the first filter, in Hz.
        high: Upper edge of the last filter, in Hz.

    Returns:
        `(bands, window // 2 + 1)` float32; computed in float64.
    """
    ends = _hz_to_mel(torch.tensor([low, high], dtype=torch.float64))
    mels = torch.linspace(float(ends[0]), float(ends[1]), bands + 2, dtype=torch.float64)
    edges = _mel_to_hz(mels)
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    ramps = edges[:, None] - bins
    widths = edges.diff()[:, None]
    rising, falling = -ramps[:-2] / widths[:-1], ramps[2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


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
        basis = slaney_filterbank(c.sample_rate, c.window, c.bands, c.low, c.high)
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
        spectrum = torch.stft(
            padded, c.window, c.hop, window=self.window, center=False, return_complex=True
        )
        # The 1e-9 under the root keeps the gradient finite in silence.
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
        mel = (self.filterbank @ magnitude).clamp(min=1e-5)
        return mel.log10() if c.decimal else mel.log()
