from __future__ import annotations

import pytest
import torch

from mfmjt.encoders.clap import CLAPText
from mfmjt.encoders.text_model import import_transformers
from mfmjt.errors import InputError
from mfmjt.evaluate.networks import CLAP
from tests.support.texts import needs_transformers
from tests.support.weights import read

TERMS = 4096


def test_agrees_with_the_public_network(near, near_spectrum) -> None:
    state, tensors = read("evaluate", "clap_htsat_base")
    network = CLAP.from_state_dict({"epoch": 15, "state_dict": state})
    waveform = tensors["in.waveform0"][None] / 32768
    near(network.spectrum.filters, tensors["out.melW"], 1)
    log_mel = network.log_mel(waveform)
    near_spectrum(log_mel[:, ::13], tensors["out.log_mel"], 1024, 10 / torch.tensor(10.0).log())
    with torch.inference_mode():
        near(network.hidden(waveform), tensors["out.audio_hidden"], TERMS)
        near(network.encode_audio(waveform), tensors["out.audio"], TERMS)


@pytest.fixture(scope="module")
def small() -> CLAP:
    torch.manual_seed(0)
    return CLAP(8, (2, 2, 4, 2), (1, 2, 4, 8)).eval()


def test_sizes_are_those_of_the_tensors(small) -> None:
    beside = {
        "audio_branch.layers.0.blocks.1.attn_mask": torch.zeros(64, 64, 64),
        "audio_branch.layers.0.blocks.1.attn.relative_position_index": torch.zeros(64, 64).int(),
        "audio_branch.bn0.num_batches_tracked": torch.tensor(1),
        "audio_branch.tscam_conv.weight": torch.zeros(1),
        "logit_scale_a": torch.tensor(1.0),
        "text_transform.sequential.0.bias": torch.zeros(1),
    }
    state = {f"module.{name}": value for name, value in (small.state_dict() | beside).items()}
    network = CLAP.from_state_dict({"state_dict": state})
    waveform = torch.rand(2, 4800) - 0.5
    with torch.inference_mode():
        found = network.encode_audio(waveform)
        assert torch.equal(found, small.encode_audio(waveform))
        alone = network.encode_audio(waveform[1:])
    assert found.shape == (2, 512)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(alone[0], found[1])


def test_short_sounds_are_repeated_whole_and_long_ones_cut(small) -> None:
    sound = torch.rand(1, 200_000) - 0.5
    padded = torch.nn.functional.pad(sound.repeat(1, 2), (0, 80_000))
    assert torch.equal(small.log_mel(sound), small.log_mel(padded))
    longer = torch.cat([padded, sound], dim=1)
    assert torch.equal(small.log_mel(longer), small.log_mel(padded))
    assert small.log_mel(sound[:, :4800]).shape == (1, 1001, 64)
    with pytest.raises(InputError, match="at least 1 samples"):
        small.log_mel(sound[:, :0])


def test_shifted_windows_wrap_around_without_seeing_the_other_edge(small) -> None:
    """In a shifted layer a patch at the lower edge does not depend on those at the upper one."""
    block = small.audio_branch.layers[0].blocks[1]
    assert block.shift == 4
    x = torch.randn(1, 64, 64, 8)
    other = x.clone()
    other[:, :4] += 1
    with torch.inference_mode():
        changed = (block(x) - block(other)).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_every_wrong_entry_is_named(small) -> None:
    state = dict(small.state_dict())
    del state["audio_branch.layers.2.blocks.3.mlp.fc2.bias"]
    state["audio_projection.0.weight"] = torch.zeros(512, 32)
    state["audio_branch.patch_embed.fusion_model.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        CLAP.from_state_dict(state)
    for told in (
        "missing audio_branch.layers.2.blocks.3.mlp.fc2.bias",
        "audio_projection.0.weight has shape (512, 32), not (512, 64)",
        "unexpected audio_branch.patch_embed.fusion_model.weight",
    ):
        assert told in str(caught.value)
    table = "audio_branch.layers.1.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(InputError, match=rf"{table} has shape \(225, 3\), not \(225, 1\)"):
        CLAP.from_state_dict(small.state_dict() | {table: torch.zeros(225, 3)})


def test_captions_go_through_roberta(small) -> None:
    needs_transformers()
    config = import_transformers().RobertaConfig(
        vocab_size=50,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=20,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    text = CLAPText(config, None).eval()
    state = text.state_dict() | small.state_dict() | {"text_branch.embeddings.position_ids": ids(9)}
    network = CLAP.from_state_dict({f"module.{name}": value for name, value in state.items()})
    assert network.text is None
    given = ids(7).expand(2, -1).clone()
    mask = torch.ones_like(given)
    given[1, 5:], mask[1, 5:] = 1, 0
    with torch.inference_mode():
        found = network.encode_text(given.int(), mask.int())
        torch.testing.assert_close(found, text.encode(given, mask))
        # Padding is seen by no token.
        torch.testing.assert_close(network.encode_text(given[1:, :5], mask[1:, :5]), found[1:])
    assert not network.text.training
    with pytest.raises(InputError, match=r"no half for captions: there were no text_branch"):
        CLAP.from_state_dict(small.state_dict()).encode_text(given, mask)


def ids(count: int) -> torch.Tensor:
    return torch.arange(2, 2 + count)[None]
