from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.evaluate.networks import ImageBind, PaSST, Synchformer
from mfmjt.evaluate.networks._frontend import (
    StoredLogMel,
    check_waveform,
    mel_filters,
    power,
    resized,
)


def chirp(rate: int) -> Tensor:
    """Two seconds of a rising tone with a little noise that every language computes alike."""
    n = torch.arange(2 * rate, dtype=torch.float64)
    t = n / rate
    noise = (7919 * n % 1000) / 1000 - 0.5
    return (0.5 * torch.sin(2 * torch.pi * (200 * t + 300 * t**2)) + 0.02 * noise)[None]


def like(found: Tensor, shape: tuple, figures: tuple[float, ...]) -> None:
    """Mean, standard deviation and three cells of a spectrogram, as the public code has them."""
    assert found.shape == (1, *shape)
    x = found[0].double()
    ours = (x.mean(), x.std(correction=0), x[0, 0], x[10, 20], x[50, 40])
    # Five decimals of the first two are known, and four of the cells.
    for value, figure, digits in zip(ours, figures, (5, 5, 4, 4, 4), strict=True):
        assert float(value) == pytest.approx(figure, abs=0.51 * 10**-digits)


def filled(filters: Tensor, total: float, count: int, digits: int) -> None:
    assert float(filters.sum()) == pytest.approx(total, abs=0.51 * 10**-digits)
    assert int((filters > 0).sum()) == count


def test_vggish() -> None:
    window = torch.hann_window(400, dtype=torch.float64)
    filters = mel_filters(16000, 512, 64, 125.0, 7500.0, "mel")
    filled(filters, 230.9136, 461, 4)
    magnitude = power(chirp(16000), window, 512, 160, centered=False).sqrt()
    like(
        (magnitude @ filters + 0.01).log(), (198, 64), (-2.07887, 1.69869, 2.6579, -4.1931, -4.0705)
    )


@pytest.mark.parametrize(
    ("rate", "fft", "hop", "high", "figures", "total", "count"),
    [
        (16000, 512, 160, 8e3, (-41.45159, 16.44508, 10.5225, -54.6461, -27.456), 2.04935, 495),
        (32000, 1024, 320, 14e3, (-39.20881, 16.7462, 16.7991, -54.1363, -47.2776), 2.04813, 866),
        (48000, 1024, 480, 14e3, (-39.85938, 18.28549, 19.8327, -42.3697, -30.6784), 1.36443, 577),
    ],
)
def test_decibels(rate, fft, hop, high, figures, total, count) -> None:
    spectrum = StoredLogMel(rate, fft, hop, 64, 50.0, high)
    filled(spectrum.filters, total, count, 5)
    like(spectrum(chirp(rate)), (201, 64), figures)


def test_passt() -> None:
    with torch.device("meta"):
        network = PaSST()
    filled(network.filters, 473.49055, 947, 5)
    x = chirp(32000)
    mel = power(x[:, 1:] - 0.97 * x[:, :-1], network.window, 1024, 320, centered=True)
    mel = ((mel @ network.filters + 1e-5).log() + 4.5) / 5
    like(mel, (200, 128), (-0.44313, 0.74943, 0.4685, -0.8977, -1.2627))
    # The network's own differs by the silence that follows, which the last frames see.
    # A rounding of log mel + 4.5, at most 8, in either way: the quotient by 5 is below 2.
    rounding = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        network.log_mel(x)[:, :, :198], mel[:, :198].mT.float(), rtol=0, atol=rounding
    )


def test_synchformer() -> None:
    with torch.device("meta"):
        network = Synchformer()
    assert network.afeat_extractor is not None
    filled(network.afeat_extractor.filters, 506.10608, 1013, 5)
    first = network.log_mel(chirp(16000))[:, 0].mT
    like(first, (66, 128), (-0.08594, 0.43765, 1.013, 0.5275, -0.2143))


def test_imagebind() -> None:
    with torch.device("meta"):
        network = ImageBind(1, {"vision": 1, "audio": 1}, {"vision": 1, "audio": 1})
    filled(network.filters, 252.61048, 504, 5)
    # One band lies between two bins and hears nothing; the public tool has it so.
    assert int((network.filters.sum(dim=0) == 0).sum()) == 1
    clip = network.log_mel(chirp(16000))[:, 0].mT
    like(clip, (204, 128), (-0.34435, 0.48803, -0.382, -0.0848, -0.4514))


def test_the_matrices_of_a_file_are_checked_and_its_mel_matrix_is_used() -> None:
    spectrum = StoredLogMel(16000, 512, 160, 64, 50.0, 8e3)
    window = torch.hann_window(512)
    angle = 2 * torch.pi * torch.arange(257.0)[:, None].double() * torch.arange(512) / 512
    state = {
        "a.spectrogram_extractor.stft.conv_real.weight": (window * angle.cos())[:, None],
        "a.spectrogram_extractor.stft.conv_imag.weight": (-window * angle.sin())[:, None],
        "a.logmel_extractor.melW": spectrum.filters.float() * (1 + 1e-6),
        "rest": torch.zeros(1),
    }
    assert list(spectrum.take(state, "a.", "a network")) == ["rest"]
    assert torch.equal(spectrum.filters.float(), state["a.logmel_extractor.melW"])
    for name in list(state)[:3]:
        for wrong, told in ((state[name].neg(), "another transform's"), (state[name][1:], "shape")):
            with pytest.raises(InputError, match=f"{name} .*{told}"):
                spectrum.take(state | {name: wrong}, "a.", "a network")


@pytest.mark.parametrize(
    ("waveform", "told"),
    [
        (torch.zeros(100), r"shape \(100,\)"),
        (torch.zeros(0, 100), r"shape \(0, 100\)"),
        (torch.zeros(1, 100, dtype=torch.int16), "int16"),
        (torch.zeros(1, 99), r"at least 100 samples \(0\.1 s at 1,000 Hz\).*has 99"),
        (torch.full((2, 100), torch.nan), "NaN"),
    ],
)
def test_what_is_no_waveform_is_refused(waveform, told) -> None:
    with pytest.raises(InputError, match=told):
        check_waveform(waveform, 100, "A network", 1000)


def test_a_waveform_is_cut_or_padded_at_its_end() -> None:
    x = torch.arange(1.0, 5)[None]
    assert resized(x, 3).tolist() == [[1, 2, 3]]
    assert resized(x, 6).tolist() == [[1, 2, 3, 4, 0, 0]]
