from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfmjt.errors import InputError
from mfmjt.evaluate.resample import resample

EPS = torch.finfo(torch.float32).eps


def test_equals_torchaudio() -> None:
    vector = load_file(Path(__file__).parent / "vectors" / "resample.safetensors")
    names = [name for name in vector if name.startswith("out.")]
    assert len(names) == 7
    for name in names:
        rate, new_rate = (int(part) for part in name.split("_")[1::2])
        waveform = vector[f"in.waveform_{rate}"] / 32768
        found, truth = resample(waveform, rate, new_rate), vector[name]
        # Its kernel is computed in float32: times are rounded, then magnified to zeros of the sinc.
        base = 0.99 * min(rate, new_rate) / math.gcd(rate, new_rate)
        allowed = (4 + math.sqrt(12) * base) * EPS * float(waveform.abs().max())
        assert found.shape == truth.shape
        assert float((found - truth).abs().max()) <= allowed


@pytest.mark.parametrize(
    ("rate", "new_rate", "values"),
    [
        (48000, 16000, (0.003468, 0.504094, -0.288827, 0.353542)),
        (44100, 16000, (0.002926, 0.502379, -0.273712, 0.353532)),
        (16000, 32000, (-0.009745, -0.351111, -0.470739, 0.353626)),
        (44100, 32000, (-0.004772, -0.353858, -0.465663, 0.353677)),
        (16000, 48000, (-0.009745, 0.242715, 0.494211, 0.353626)),
        (44100, 48000, (-0.009815, 0.247665, 0.486497, 0.353716)),
    ],
)
def test_known_samples_of_a_rising_tone(rate, new_rate, values) -> None:
    n = torch.arange(2 * rate, dtype=torch.float64)
    t = n / rate
    x = 0.5 * torch.sin(2 * torch.pi * (200 * t + 300 * t**2))
    x = x + 0.02 * ((7919 * n % 1000) / 1000 - 0.5)
    y = resample(x, rate, new_rate)
    found = (*y[[0, 100, 12345]], y.square().mean().sqrt())
    for value, figure in zip(found, values, strict=True):
        assert float(value) == pytest.approx(figure, abs=0.51e-6)


def test_shapes_and_dtypes_stay() -> None:
    x = torch.rand(2, 3, 1001)
    assert resample(x, 16000, 16000) is x
    y = resample(x, 44100, 16000)
    assert y.shape == (2, 3, math.ceil(1001 * 160 / 441))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[1, 2], resample(x[1, 2], 44100, 16000))


def test_rates_without_a_simple_ratio_are_refused() -> None:
    with pytest.raises(InputError, match="44,101 Hz to 16,000 Hz is no simple ratio"):
        resample(torch.zeros(10), 44101, 16000)
    with pytest.raises(InputError, match="must be positive"):
        resample(torch.zeros(10), 0, 16000)
