from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfmjt.codec import MelSpectrogram
from mfmjt.codec.mel import MEL_CONFIGS, filterbank
from mfmjt.errors import InputError

VECTORS = Path(__file__).parent / "vectors"
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_equals_the_published_front_end(mode: str) -> None:
    vector = load_file(VECTORS / f"mel_{mode}.safetensors")
    mel = MelSpectrogram(mode)
    window = MEL_CONFIGS[mode].window
    basis, expected = vector["out.mel_basis"], vector["out.mel"]
    torch.testing.assert_close(mel.filterbank, basis, rtol=0, atol=2 * EPS * float(basis.max()))
    # An FFT's rounding grows with the logarithm of its length, a band's sum with its bins; the
    # logarithm turns the relative error of a magnitude into an absolute one.
    error = EPS * (math.log2(window) + math.sqrt(window))
    torch.testing.assert_close(mel(vector["in.waveform"]), expected, rtol=error, atol=error)


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_a_tone_lights_the_band_of_its_frequency(mode: str) -> None:
    config = MEL_CONFIGS[mode]
    mel = MelSpectrogram(mode)
    time = torch.arange(config.sample_rate) / config.sample_rate
    bins = torch.linspace(0, config.sample_rate / 2, config.window // 2 + 1)
    centres = (mel.filterbank @ bins) / mel.filterbank.sum(1)
    for band in (config.bands // 2, config.bands * 3 // 4):
        tone = 0.5 * torch.sin(2 * math.pi * centres[band] * time)
        assert mel(tone[None]).mean(-1).argmax() == band


@pytest.mark.parametrize("window", [64, 353, 512])
def test_no_htk_filter_falls_between_two_bins(window: int) -> None:
    filters = filterbank(16000, window, 40, low=40.0, scale="htk")
    torch.testing.assert_close(filters.sum(dim=1), torch.ones(40))
    assert bool((filters.amax(dim=1) > 0).all())
    # Slaney's are as narrow as they come out, and some hear nothing at the shortest window.
    empty = filterbank(16000, window, 40).sum(dim=1) == 0
    assert bool(empty.any()) == (window < 353)


def test_silence_is_the_floor_and_loud_sound_is_clamped() -> None:
    mel = MelSpectrogram("16k")
    noise = torch.rand(1, 4096, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    torch.testing.assert_close(mel(noise), mel(3 * noise), rtol=0, atol=0)
    floor = math.log10(1e-5)
    assert float(mel(torch.zeros(1, 4096)).max()) == pytest.approx(floor, rel=EPS)


def test_frames_are_samples_over_hop() -> None:
    mel = MelSpectrogram("16k")
    for samples in (512, 513, 767, 768, 16000):
        assert mel(torch.zeros(2, samples)).shape == (2, 80, samples // 256)


def test_refuses_what_it_cannot_analyse() -> None:
    with pytest.raises(InputError, match="48k"):
        MelSpectrogram("48k")
    mel = MelSpectrogram("16k")
    for shape in ((384, 1), (1, 384), (1, 1, 4096), (4096,)):
        with pytest.raises(InputError, match="Waveform of shape"):
            mel(torch.zeros(shape))


def test_gradient_is_finite_in_silence() -> None:
    sound = torch.zeros(1, 2048, requires_grad=True)
    MelSpectrogram("16k")(sound).sum().backward()
    assert sound.grad is not None
    assert bool(sound.grad.isfinite().all())
