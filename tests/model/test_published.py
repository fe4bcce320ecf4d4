from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mfmjt.errors import InputError
from mfmjt.meanflow import guide
from mfmjt.model import CONFIGS, MFMJT, load_mmaudio, load_network, to_mmaudio_state_dict
from tests.oracle import allowance, error
from tests.support.weights import draw, read

VECTORS = Path(__file__).parent / "vectors"
TINY = {"latent_length": 25, "video_length": 8, "sync_length": 24}


def agrees(result: torch.Tensor, truth: torch.Tensor, net: MFMJT) -> None:
    # The longest sum that feeds an output runs through every block's widest product.
    terms = net.config.depth * 3 * net.config.mlp_hidden
    assert error(result, truth) <= allowance(truth, torch.float32, terms)


@pytest.mark.parametrize("name", ["net_tiny", "net_tiny_v2"])
def test_gives_minus_the_published_velocity_at_the_opposite_time(name):
    state, given = read("model", name)
    net = load_mmaudio(state, **TINY)
    t = 1 - given["in.t"]
    with torch.no_grad():
        u = net(given["in.latent"], t, t, given["in.clip"], given["in.sync"], given["in.text"])
        empty = net(given["in.latent"], t, t)
    agrees(-u, given["out.velocity"], net)
    agrees(-empty, given["out.velocity_empty"], net)
    assert net.config.v2 == name.endswith("v2")


@pytest.mark.slow
def test_gives_the_published_velocity_at_full_size():
    state, given = read("model", "net_small_16k")
    net = load_mmaudio(state)
    assert net.config == CONFIGS["small_16k"]
    t = 1 - given["in.t"]
    with torch.no_grad():
        u = net(given["in.latent"], t, t, given["in.clip"], given["in.sync"], given["in.text"])
        empty = net(given["in.latent"], t, t)
    agrees(-u, given["out.velocity"], net)
    agrees(-empty, given["out.velocity_empty"], net)
    agrees(-guide(u, empty, 4.5, "cfg"), given["out.velocity_cfg4.5"], net)


@pytest.mark.parametrize("name", ["net_tiny", "net_tiny_v2"])
def test_import_and_export_are_inverse(name):
    state, _ = read("model", name)
    exported = to_mmaudio_state_dict(load_mmaudio(state))
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(exported[key], value), key


def test_import_does_not_change_its_source():
    state, _ = read("model", "net_tiny")
    before = {key: value.clone() for key, value in state.items()}
    load_mmaudio(state)
    assert all(torch.equal(before[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "millions", "trained", "entries"),
    [
        ("small_16k", 157.284, 157.205, 251),
        ("small_44k", 157.409, 157.330, 251),
        ("medium_44k", 621.806, 621.727, 251),
        ("large_44k", 1030.002, 1029.923, 416),
        ("large_44k_v2", 1030.576, 1030.497, 416),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions, trained, entries):
    with torch.device("meta"):
        net = MFMJT.from_config(name)
    published = {k: p for k, p in net.named_parameters() if not k.startswith("r_embed.")}
    assert len(published) == len(net.state_dict()) - 4 == entries
    assert round(sum(p.numel() for p in published.values()) / 1e6, 3) == millions
    frozen = [k for k, p in published.items() if not p.requires_grad and "q_norm" not in k]
    assert sorted(frozen) == ["empty_string_feat", "latent_mean", "latent_std"]
    idle = sum(published[k].numel() for k in frozen)
    assert round((sum(p.numel() for p in published.values()) - idle) / 1e6, 3) == trained


def test_names_and_shapes_are_the_published_ones():
    with safe_open(VECTORS / "net_small_16k.safetensors", framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    with torch.device("meta"):
        net = MFMJT.from_config("small_16k")
    ours = {k: list(v.shape) for k, v in net.state_dict().items() if not k.startswith("r_embed.")}
    assert ours == shapes


def test_tables_of_older_checkpoints_are_dropped():
    state, _ = read("model", "net_tiny")
    state["t_embed.freqs"] = torch.zeros(128)
    state["latent_rot"] = state["clip_rot"] = torch.zeros(1)
    load_mmaudio(state)


def test_every_wrong_parameter_is_named():
    state, _ = read("model", "net_tiny")
    del state["fused_blocks.1.linear1.bias"], state["clip_cond_proj.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["text_cond_proj.bias"] = torch.zeros(7)
    with pytest.raises(InputError) as caught:
        load_mmaudio(state)
    for text in (
        "missing fused_blocks.1.linear1.bias",
        "missing clip_cond_proj.bias",
        "unexpected extra.weight",
        "text_cond_proj.bias has shape (7,), not (128,)",
    ):
        assert text in str(caught.value)


def test_another_state_dict_is_refused():
    with pytest.raises(InputError, match=re.escape("missing audio_input_proj.0.weight")):
        load_mmaudio({"weight": torch.zeros(3)})


def test_reads_published_files_and_training_checkpoints(tmp_path):
    state, _ = read("model", "net_tiny")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"it": 3, "weights": state}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        exported = to_mmaudio_state_dict(load_mmaudio(tmp_path / name))
        assert torch.equal(exported["latent_std"], state["latent_std"])


def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_mmaudio(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_rule_draws_are_stable():
    # The rule is all that ties the stored outputs to weights.
    value = draw("t_embed.mlp.0.weight", [4, 256], 0)
    assert value.shape == (4, 256)
    assert torch.equal(value, draw("t_embed.mlp.0.weight", [4, 256], 0))
    assert not torch.equal(value, draw("t_embed.mlp.0.weight", [4, 256], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["net_tiny", "foleydash_tiny", "meanaudio_tiny", "fluxaudio_tiny"])
def test_16_bits_as_stored_are_those_of_float32(name, dtype, tmp_path):
    load = functools.partial(
        load_network, **(TINY if name in ("net_tiny", "foleydash_tiny") else {})
    )
    state = {key: value.to(dtype) for key, value in read("model", name)[0].items()}
    torch.save(state, tmp_path / "net.pth")
    whole, stored = load(state), load(tmp_path / "net.pth", as_stored=True)
    assert whole.dtype == torch.float32
    assert stored.dtype == dtype
    for asked in (torch.float32, torch.float16, torch.bfloat16):
        expected, found = (copy.deepcopy(net).to(asked).state_dict() for net in (whole, stored))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
