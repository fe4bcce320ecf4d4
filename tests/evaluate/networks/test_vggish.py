from __future__ import annotations

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.networks import VGGish
from tests.support.weights import read


@pytest.fixture(scope="module")
def public():
    state, tensors = read("evaluate", "vggish")
    return VGGish.from_state_dict(state), tensors


def test_agrees_with_the_public_network(public, near) -> None:
    network, tensors = public
    waveform = tensors["in.waveform"] / 32768
    embedding = network(waveform)
    assert not embedding.requires_grad
    with torch.inference_mode():
        near(network.log_mel(waveform), tensors["out.log_mel"], 400)
    near(embedding, tensors["out.embedding"], 12288)
    near(embedding.relu()[0], tensors["out.embedding_relu"], 12288)


def test_every_piece_is_embedded_by_itself(public, near) -> None:
    network, _ = public
    waveform = torch.rand(2, 9 * 16000 + 5000) * 2 - 1  # more pieces than are embedded at once
    with torch.inference_mode():
        embedding = network(waveform)
        assert embedding.shape == (2, 9, 128)
        for clip, piece in ((0, 0), (0, 8), (1, 7)):
            own = waveform[clip : clip + 1, 15360 * piece :][:, :15600]
            near(embedding[clip, piece], network(own)[0, 0], 12288)
    with pytest.raises(InputError, match=r"15,600 samples \(0\.975 s"):
        network(waveform[:, :15599])


def test_every_wrong_entry_is_named(hollow) -> None:
    state = {f"module.{name}": value for name, value in hollow("vggish").items()}
    assert VGGish.from_state_dict({"model": state}).sample_rate == 16000
    del state["module.features.6.bias"]
    state["module.embeddings.4.weight"] = torch.zeros(64, 4096)
    state["module.embeddings.6.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        VGGish.from_state_dict(state)
    for told in (
        "missing features.6.bias",
        "embeddings.4.weight has shape (64, 4096), not (128, 4096)",
        "unexpected embeddings.6.weight",
    ):
        assert told in str(caught.value)
    with pytest.raises(InputError, match=r"VGGish: missing features\.13\.weight; .* of the PANNs"):
        VGGish.from_state_dict({"conv_block1.conv1.weight": torch.zeros(1)})
