"""The resampler of published scores: a windowed sinc, as torchaudio's default options define it.

The networks that judge sound have been given audio of this resampler, and Fréchet distances move
with it, so scores use it alone.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.errors import InputError

__all__ = ["resample"]

ROLLOFF = 0.99  # cut-off, as a share of the lower of both Nyquist frequencies
ZEROS = 6  # crossings of the sinc on either side


def resample(waveform: Tensor, before: int, after: int) -> Tensor:
    """Change the sample rate of sounds with a sinc of 6 zeros under a squared-cosine window.

    For output phase p and tap j, with rates reduced by their greatest common divisor and
    b = 0.99 min(before, after), the kernel is sinc(t) cos²(πt / 12) b / before at
    t = b (j / before - p / after), cut off at |t| = 6. It is computed in float64.

    Args:
        waveform: Samples `(..., S)`, floating point.
        before: Their rate in Hz.
        after: The wanted rate in Hz.

    Returns:
        Samples `(..., ceil(S after / before))` in the dtype of `waveform`.

    Raises:
        InputError: A rate below 1 Hz.
    """
    if min(before, after) < 1:
        raise InputError(f"Sound of {before} Hz cannot get {after} Hz: a rate is at least 1 Hz.")
    if before == after:
        return waveform
    shared = math.gcd(before, after)
    before, after = before // shared, after // shared
    kernel, width = _kernel(before, after)
    samples = waveform.shape[-1]
    rows = F.pad(waveform.reshape(-1, 1, samples), (width, width + before))
    phases = F.conv1d(rows, kernel.to(rows), stride=before)  # (rows, after, blocks)
    whole = phases.transpose(1, 2).reshape(*waveform.shape[:-1], -1)
    return whole[..., : -(-samples * after // before)]


@functools.lru_cache(maxsize=8)
def _kernel(before: int, after: int) -> tuple[Tensor, int]:
    """Return the kernel `(after, 1, 2 width + before)` float64 of reduced rates, and its width."""
    base = min(before, after) * ROLLOFF
    width = math.ceil(ZEROS * before / base)
    taps = torch.arange(-width, width + before, dtype=torch.float64) / before
    phases = torch.arange(after, dtype=torch.float64)[:, None] / after
    t = ((taps - phases) * base).clamp(-ZEROS, ZEROS)
    window = torch.cos(t * math.pi / ZEROS / 2) ** 2
    return (torch.sinc(t) * window * base / before)[:, None], width
