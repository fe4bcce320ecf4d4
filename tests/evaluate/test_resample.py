from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mfmjt.errors import InputError
from mfmjt.evaluate.resample import resample

VECTORS = Path(__file__).parent / "vectors" / "resample.safetensors"
with safe_open(VECTORS, framework="pt") as _file:
    RATES = json.loads(_file.metadata()["rates"])


@pytest.mark.parametrize(("before", "after"), RATES)
def test_it_is_the_published_one(before: int, after: int) -> None:
    with safe_open(VECTORS, framework="pt") as file:
        waveform = file.get_tensor(f"in.waveform_{before}").float() / 32768
        expected = file.get_tensor(f"out.from_{before}_to_{after}")
    found = resample(waveform, before, after)
    # torchaudio.functional computes this kernel in float32: its largest argument is pi times 6,
    # rounded in some hundred ulp by the sums that lead to it, and every tap is off by as much.
    width = math.ceil(6 * before / (0.99 * min(before, after)))
    bound = 6 * math.pi * torch.finfo(torch.float32).eps * math.sqrt(2 * width + before)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < bound * float(waveform.abs().max())


def test_rows_and_dtypes_are_kept() -> None:
    waves = torch.randn(2, 3, 441, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = resample(waves, 44100, 16000)
    assert found.shape == (2, 3, 160)
    assert found.dtype == torch.float64
    assert torch.equal(found[1, 2], resample(waves[1, 2], 44100, 16000))
    assert resample(waves, 8000, 8000) is waves


GOLDEN = {  # of the sweep below: samples 0, 100 and 12345, and the root of the mean square
    (48000, 16000): (0.003468, 0.504094, -0.288827, 0.353542),
    (44100, 16000): (0.002926, 0.502379, -0.273712, 0.353532),
    (16000, 32000): (-0.009745, -0.351111, -0.470739, 0.353626),
    (44100, 32000): (-0.004772, -0.353858, -0.465663, 0.353677),
    (16000, 48000): (-0.009745, 0.242715, 0.494211, 0.353626),
    (44100, 48000): (-0.009815, 0.247665, 0.486497, 0.353716),
}


@pytest.mark.parametrize(("before", "after"), GOLDEN)
def test_a_sweep_gets_its_known_values(before: int, after: int) -> None:
    n = torch.arange(2 * before, dtype=torch.float64)
    t = n / before
    sweep = 0.5 * torch.sin(2 * torch.pi * (200 * t + 300 * t**2))
    sweep += 0.02 * ((7919 * n % 1000) / 1000 - 0.5)
    found = resample(sweep, before, after)
    values = [*found[[0, 100, 12345]].tolist(), float(found.square().mean().sqrt())]
    # They are written with six digits.
    assert max(abs(a - b) for a, b in zip(values, GOLDEN[before, after], strict=True)) < 6e-7


def test_no_rate_is_refused() -> None:
    with pytest.raises(InputError, match="0 Hz"):
        resample(torch.zeros(4), 16000, 0)
