from __future__ import annotations

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.networks import PaSST
from tests.support.weights import read


def test_agrees_with_the_public_network(near, near_spectrum) -> None:
    state, tensors = read("evaluate", "passt")
    network = PaSST.from_state_dict(state)
    waveform = tensors["in.waveform"] / 32768
    near_spectrum(network.log_mel(waveform)[:, :, ::8], tensors["out.log_mel"], 1024, 1 / 5)
    with torch.inference_mode():
        embedding, logits = network(waveform)
    near(embedding, tensors["out.embedding"], 3072)
    near(logits, tensors["out.logits"], 3072)


def test_silence_follows_a_short_clip_and_a_long_one_is_cut() -> None:
    with torch.device("meta"):
        network = PaSST()
    waveform = torch.rand(2, 330_000) - 0.5
    whole = network.log_mel(waveform)
    assert whole.shape == (2, 128, 1000)
    assert torch.equal(network.log_mel(waveform[:, :320_000]), whole)
    short = network.log_mel(waveform[:, :3200])
    padded = torch.nn.functional.pad(waveform[:, :3200], (0, 316_800))
    assert torch.equal(network.log_mel(padded), short)
    floor = (torch.tensor(1e-5).log() + 4.5) / 5
    # A logarithm of one rounded number, a sum and a quotient, rounded in either way.
    rounding = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(short[:, :, 13:], floor.expand(2, 128, 987), rtol=rounding, atol=0)
    with pytest.raises(InputError, match="NaN"):
        network(torch.full((1, 320), torch.nan))


def test_every_wrong_entry_is_named(hollow) -> None:
    state = {f"net.{name}": value for name, value in hollow("passt").items()}
    assert PaSST.from_state_dict(state).sample_rate == 32000
    del state["net.blocks.11.attn.qkv.bias"]
    state["net.freq_new_pos_embed"] = torch.zeros(1, 768, 8, 1)
    state["net.blocks.12.norm1.weight"] = torch.zeros(768)
    with pytest.raises(InputError) as caught:
        PaSST.from_state_dict(state)
    for told in (
        "missing blocks.11.attn.qkv.bias",
        "freq_new_pos_embed has shape (1, 768, 8, 1), not (1, 768, 12, 1)",
        "unexpected blocks.12.norm1.weight",
    ):
        assert told in str(caught.value)
