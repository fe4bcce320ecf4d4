"""The mel spectrum that detector and classifier listen through."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

__all__ = ["mel_filters", "mel_power"]


def _hz_to_mel(frequency: torch.Tensor) -> torch.Tensor:
    return 2595.0 * torch.log10(1.0 + frequency / 700.0)


@functools.lru_cache(maxsize=8)
def mel_filters(sample_rate: int, window: int, bands: int, lowest: float = 40.0) -> torch.Tensor:
    """Triangular filters on the HTK mel scale, each of unit sum, as (window // 2 + 1, bands).

    A filter is never narrower than one bin to each side: at short windows the low bands would
    otherwise fall between two bins and hear nothing.

    Args:
        sample_rate: In Hz.
        window: Samples per spectrum.
        bands: Number of filters between `lowest` and half the sample rate.
        lowest: Lower edge in Hz.
    """
    step = sample_rate / window
    edges_mel = torch.linspace(
        float(_hz_to_mel(torch.tensor(lowest))),
        float(_hz_to_mel(torch.tensor(sample_rate / 2))),
        bands + 2,
        dtype=torch.float64,
    )
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    low = torch.minimum(low, centre - step)
    high = torch.maximum(high, centre + step)
    bins = torch.arange(window // 2 + 1, dtype=torch.float64)[:, None] * step
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters / filters.sum(dim=0)).float()


def mel_power(
    waveform: torch.Tensor, sample_rate: int, window: int, hop: int, bands: int
) -> torch.Tensor:
    """Power in mel bands of Hann-windowed spectra centred on every `hop`-th sample.

    Args:
        waveform: Samples (B, S), float32; silence is assumed around them.
        sample_rate: In Hz.
        window: Samples per spectrum.
        hop: Samples between spectra.
        bands: Mel bands.

    Returns:
        Power (B, S // hop + 1, bands).
    """
    padded = functional.pad(waveform, (window // 2, window // 2))
    spectrum = torch.stft(
        padded,
        window,
        hop,
        window=torch.hann_window(window, device=waveform.device),
        center=False,
        return_complex=True,
    )
    filters = mel_filters(sample_rate, window, bands).to(waveform.device)
    return torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2) @ filters
