from __future__ import annotations

import math

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.networks import Cnn14
from tests.support.weights import about, draw, read

TERMS = 9 * 2048


@pytest.fixture(scope="module")
def state_and_tensors():
    return read("evaluate", "panns_cnn14_16k")


@pytest.fixture(scope="module")
def network(state_and_tensors):
    return Cnn14.from_state_dict(state_and_tensors[0])


def test_agrees_with_the_public_network(state_and_tensors, network, near, near_spectrum) -> None:
    tensors = state_and_tensors[1]
    waveform = tensors["in.waveform"] / 32768
    with torch.inference_mode():
        embedding, logits = network(waveform)
    near(network.spectrum.filters, tensors["out.melW"], 1)
    near_spectrum(network.log_mel(waveform), tensors["out.log_mel"], 512, 10 / math.log(10))
    near(embedding, tensors["out.embedding"], TERMS)
    near(logits, tensors["out.logits"], TERMS)
    near(logits.sigmoid(), tensors["out.probabilities"], TERMS)


def test_clips_do_not_see_one_another_and_may_be_short(network, near) -> None:
    waveform = torch.rand(2, 4960) * 2 - 1
    with torch.inference_mode():
        together = network(waveform)
        for clip in range(2):
            alone = network(waveform[clip : clip + 1])
            near(together.embedding[clip], alone.embedding[0], TERMS)
            near(together.logits[clip], alone.logits[0], TERMS)
    with pytest.raises(InputError, match=r"4,960 samples \(0\.31 s at 16,000 Hz\)"):
        network(waveform[:, :4959])


def test_the_tensors_that_are_given_stay_as_they_are(state_and_tensors) -> None:
    # The norms are folded into the convolutions.
    metadata, name = about("evaluate", "panns_cnn14_16k")[0], "conv_block1.conv1.weight"
    drawn = draw(name, metadata["shapes"][name], metadata["seed"], "Cnn14")
    assert torch.equal(state_and_tensors[0][name], drawn)


def test_at_32_khz_the_spectrum_has_another_window_and_hop(hollow) -> None:
    network = Cnn14.from_state_dict({"model": hollow("panns_cnn14_16k")}, sample_rate=32000)
    log_mel = network.log_mel(torch.zeros(1, 9920))
    assert log_mel.shape == (1, 32, 64)
    assert (network.spectrum.fft, network.spectrum.hop) == (1024, 320)
    with pytest.raises(InputError, match=r"9,920 samples \(0\.31 s at 32,000 Hz\)"):
        network(torch.zeros(1, 9919))


def test_the_rate_is_that_of_the_fourier_matrices(hollow) -> None:
    state = hollow("panns_cnn14_16k")
    name = "spectrogram_extractor.stft.conv_real.weight"

    def fourier(fft):
        turns = torch.arange(fft // 2 + 1.0)[:, None].double() * torch.arange(fft) / fft
        return (torch.hann_window(fft) * (2 * torch.pi * turns).cos())[:, None].float()

    tracked = {"bn0.num_batches_tracked": torch.tensor(3)}
    for rate, fft in ((16000, 512), (32000, 1024)):
        given = state | tracked | {name: fourier(fft)}
        assert Cnn14.from_state_dict(given).sample_rate == rate
        with pytest.raises(InputError, match=f"cannot be used at {48000 - rate:,} Hz"):
            Cnn14.from_state_dict(given, sample_rate=48000 - rate)
    with pytest.raises(InputError, match="its FFT has 129 bins"):
        Cnn14.from_state_dict(state | {name: fourier(256)})
    with pytest.raises(InputError, match="8,000 Hz"):
        Cnn14.from_state_dict(state, sample_rate=8000)


def test_every_wrong_entry_is_named(hollow) -> None:
    state = hollow("panns_cnn14_16k")
    del state["conv_block3.bn2.running_var"]
    state["fc_audioset.weight"] = torch.zeros(10, 2048)
    state["conv_block7.conv1.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        Cnn14.from_state_dict(state)
    for told in (
        "missing conv_block3.bn2.running_var",
        "fc_audioset.weight has shape (10, 2048), not (527, 2048)",
        "unexpected conv_block7.conv1.weight",
    ):
        assert told in str(caught.value)
