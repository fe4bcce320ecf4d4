"""The resampling that published figures were made with: torchaudio's default."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["resample"]

_ROLLOFF = 0.99
_ZEROS = 6  # of the sinc to each side
_LARGEST = 2**25  # numbers of a kernel


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample by a sinc in a Hann window, as `torchaudio.functional.resample` does by default.

    With both rates divided by their greatest common divisor, sample p of each new_rate samples is
    the sum over j of x[j] sinc(t) cos²(π t / 12) b / rate, where b = 0.99 min(rate, new_rate) and
    t = (j / rate - p / new_rate) b, within 6 zeros of the sinc. The gain at 0 Hz is not exactly 1.

    Args:
        waveform: `(..., S)` float.
        rate: Of the waveform, in Hz.
        new_rate: Wanted, in Hz.

    Returns:
        `(..., ceil(S new_rate / rate))` of the waveform's dtype; itself where the rates are equal.

    Raises:
        InputError: A rate is not positive, or both have so small a common divisor that the filter
            would not fit into memory.
    """
    if rate == new_rate:
        return waveform
    if min(rate, new_rate) < 1:
        raise InputError(f"{rate} Hz to {new_rate} Hz: sample rates must be positive.")
    common = math.gcd(rate, new_rate)
    before, after = rate // common, new_rate // common
    base = _ROLLOFF * min(before, after)
    width = math.ceil(_ZEROS * before / base)
    if after * (2 * width + before) > _LARGEST:
        raise InputError(
            f"{rate:,} Hz to {new_rate:,} Hz is no simple ratio. Resample the sound to a usual "
            "rate, such as 48,000 Hz, first."
        )
    device = waveform.device
    taps = torch.arange(-width, width + before, dtype=torch.float64, device=device) / before
    phases = torch.arange(after, dtype=torch.float64, device=device) / after
    t = ((taps - phases[:, None]) * base).clamp(-_ZEROS, _ZEROS)
    kernel = t.sinc() * (t * math.pi / (2 * _ZEROS)).cos().square() * (base / before)
    x = F.pad(waveform.reshape(-1, 1, waveform.shape[-1]), (width, width + before))
    y = F.conv1d(x, kernel[:, None].to(x.dtype), stride=before)  # (rows, after, periods)
    y = y.transpose(1, 2).flatten(1)[:, : -(-waveform.shape[-1] * after // before)]
    return y.reshape(*waveform.shape[:-1], -1)
