"""Spectra and mel filters as the published networks take them, and checks of waveforms.

Everything is computed in float64: logarithms of nearly empty bands magnify the rounding of an FFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfmjt.codec.mel import filterbank, htk_mel
from mfmjt.errors import InputError

__all__ = ["StoredLogMel", "check_waveform", "mel_filters", "power", "resized"]


def check_waveform(waveform: Tensor, least: int, what: str, rate: int) -> None:
    """Check that this is a batch of mono clips long enough for a network.

    Args:
        waveform: Should be floating point `(B, samples)`.
        least: Samples that the network needs.
        what: The network, for the message.
        rate: Its sample rate in Hz.

    Raises:
        InputError: Another shape or dtype, too few samples, or values that are not finite.
    """
    if waveform.ndim != 2 or not waveform.is_floating_point() or waveform.shape[0] == 0:
        raise InputError(
            f"A waveform of shape {tuple(waveform.shape)}, {waveform.dtype} is nothing for {what}: "
            "floating-point (batch, samples) in [-1, 1] is needed."
        )
    if waveform.shape[1] < least:
        raise InputError(
            f"{what} needs at least {least:,} samples ({least / rate:.3g} s at {rate:,} Hz), and "
            f"this clip has {waveform.shape[1]:,}. Leave it out, or pad it with zeros."
        )
    if not bool(waveform.isfinite().all()):
        raise InputError("The waveform holds NaN or infinite samples. Leave the clip out.")


def resized(waveform: Tensor, samples: int) -> Tensor:
    """Cut `(B, S)` at its end, or pad it with zeros there, to `(B, samples)`."""
    return F.pad(waveform[:, :samples], (0, max(0, samples - waveform.shape[1])))


def power(waveform: Tensor, window: Tensor, fft: int, hop: int, centered: bool) -> Tensor:
    """Return power spectra.

    Args:
        waveform: `(B, S)` float.
        window: Weights `(n,)`, n <= fft, float64.
        fft: Length of the FFT; shorter frames are padded with zeros.
        hop: Samples from one frame to the next.
        centered: Frames are centered on every hop-th sample, with the ends reflected, and so S must
            be above fft / 2. Else all frames lie within the waveform, S >= n.

    Returns:
        `(B, frames, fft // 2 + 1)` float64.
    """
    x, window = waveform.double(), window.to(waveform.device)
    if centered:
        spectrum = torch.stft(x, fft, hop, len(window), window, center=True, return_complex=True)
    else:
        frames = x.unfold(1, len(window), hop) * window
        spectrum = torch.fft.rfft(frames, fft).transpose(1, 2)
    return torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2)


def mel_filters(
    rate: int,
    fft: int,
    bands: int,
    low: float,
    high: float,
    scale: Literal["slaney", "mel", "hz"],
) -> Tensor:
    """Return triangular filters, equally spaced on a mel scale.

    Args:
        rate: Sample rate in Hz.
        fft: Length of the FFT.
        bands: Number of filters.
        low: Lower edge of the first filter, in Hz.
        high: Upper edge of the last filter, in Hz.
        scale: "slaney": Slaney's scale and unit area. "mel" and "hz": HTK's scale, peaks of 1, and
            flanks that are straight over mels (as in Kaldi) or over frequency.

    Returns:
        `(fft // 2 + 1, bands)` float64.
    """
    if scale == "slaney":
        return filterbank(rate, fft, bands, low, high).double().T
    ends = htk_mel(torch.tensor([low, high], dtype=torch.float64))
    points = torch.linspace(float(ends[0]), float(ends[1]), bands + 2, dtype=torch.float64)
    at = torch.arange(fft // 2 + 1, dtype=torch.float64) * (rate / fft)
    if scale == "mel":
        at = htk_mel(at)
    else:
        points = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    below, middle, above = points[:-2], points[1:-1], points[2:]
    rising = (at[:, None] - below) / (middle - below)
    return torch.minimum(rising, (above - at[:, None]) / (above - middle)).clamp(min=0)


class StoredLogMel(nn.Module):
    """Log-mel spectra in dB of networks whose files hold the Fourier and mel matrices.

    The spectrum is an FFT all the same; the Fourier matrices serve to check which transform the
    file is for. The mel matrix of the file is used as it is.

    Args:
        rate: Sample rate in Hz.
        fft: Length of the FFT and of the Hann window.
        hop: Samples from one frame to the next.
        bands: Mel bands.
        low: Lower edge of the first band, in Hz.
        high: Upper edge of the last band, in Hz.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, rate: int, fft: int, hop: int, bands: int, low: float, high: float) -> None:
        super().__init__()
        self.fft, self.hop = fft, hop
        with torch.device("cpu"):
            filters = mel_filters(rate, fft, bands, low, high, "slaney")
            window = torch.hann_window(fft, dtype=torch.float64)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", window, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return `(B, S // hop + 1, bands)` float32 of `(B, S)`, S > fft / 2."""
        mel = power(waveform, self.window, self.fft, self.hop, centered=True) @ self.filters
        return mel.clamp(min=1e-10).log10().mul(10).float()

    def take(self, state: Mapping[str, Tensor], prefix: str, what: str) -> dict[str, Tensor]:
        """Check the matrices of a state dict, take its mel matrix, and return all else.

        Files without them are taken: the matrices are then computed.

        Args:
            state: Names as published.
            prefix: Of the names `spectrogram_extractor.*` and `logmel_extractor.*`.
            what: Whose state this should be, for the message.

        Raises:
            InputError: The matrices are another transform's.
        """
        rest = dict(state)
        bins = self.fft // 2 + 1
        for part, wave in (("real", torch.cos), ("imag", lambda angle: -torch.sin(angle))):
            name = f"{prefix}spectrogram_extractor.stft.conv_{part}.weight"
            found = rest.pop(name, None)
            turns = torch.arange(bins)[:, None] * torch.arange(self.fft) % self.fft / self.fft
            expected = self.window * wave(2 * torch.pi * turns.double())
            self._check(found, expected[:, None], name, what)
        name = f"{prefix}logmel_extractor.melW"
        found = rest.pop(name, None)
        self._check(found, self.filters, name, what)
        if found is not None:
            self.filters = found.double()
        return rest

    def _check(self, found: Tensor | None, expected: Tensor, name: str, what: str) -> None:
        """Refuse a stored matrix that differs from the computed one by more than rounding."""
        if found is None:
            return
        if found.shape != expected.shape:
            wrong = f"has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        elif not bool(((found.double() - expected).abs() < 1e-5).all()):
            wrong = "is another transform's"
        else:
            return
        raise InputError(
            f"This is no state dict of {what}: {name} {wrong}. Give the file as its publisher "
            "keeps it."
        )
