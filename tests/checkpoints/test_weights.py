from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfmjt.checkpoints import load_published, weights_in
from mfmjt.convert import from_mmaudio
from mfmjt.encoders import CLIP, Synchformer
from mfmjt.errors import InputError
from mfmjt.model import MFMJT, load_mmaudio, to_mmaudio_state_dict
from tests.checkpoints.loaders import CLIP_SIZES, SYNC_SIZES, network

State = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return to_mmaudio_state_dict(network())


def behind(prefix: str, state: State) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def moved(state: State, by: float) -> dict[str, Tensor]:
    return {name: value + by for name, value in state.items()}


def inside(name: str) -> str:
    """A name as it is where each block is compiled or sharded on its own."""
    return re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", f"_fsdp_wrapped_module.{name}")


WRAPPED = {
    "module": lambda s: behind("module.", s),
    "compiled": lambda s: behind("_orig_mod.", s),
    "both": lambda s: behind("module._orig_mod.", s),
    "blocks": lambda s: {inside(name): value for name, value in s.items()},
    "ema_model": lambda s: behind("ema_model.", s) | {"_extra_state": torch.zeros(1)},
    "averaged": lambda s: behind("module.", s) | {"n_averaged": torch.tensor(3)},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "ema": lambda s: {"ema": s},
    "state_dict": lambda s: {"epoch": 3, "state_dict": behind("module.", s)},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "weights": lambda s: {"it": 3, "weights": s},
    "deep": lambda s: {"checkpoint": {"network": {"module": s}}},
    "lightning": lambda s: {
        "state_dict": behind("model.net.", s) | {"criterion.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 1e-4},
    },
}


@pytest.mark.parametrize("way", WRAPPED)
def test_weights_are_found_in_wrappers_and_behind_prefixes(
    tmp_path: Path, state: dict[str, Tensor], way: str
) -> None:
    content = WRAPPED[way](state)
    torch.save(content, tmp_path / "w.pth")
    for source in (content, tmp_path / "w.pth"):
        net = load_mmaudio(source)
        found = to_mmaudio_state_dict(net)
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert net.notes == ()


AVERAGED = {
    "beside": lambda raw, mean: {"model": raw, "ema": mean},
    "first": lambda raw, mean: {"ema": mean, "model": raw},
    "ema_pytorch": lambda raw, mean: (
        behind("online_model.", raw) | behind("ema_model.", mean) | {"step": torch.tensor(1)}
    ),
    "ema_pytorch inside": lambda raw, mean: {
        "net": raw,
        "ema": behind("online_model.", raw) | behind("ema_model.", mean),
    },
    "lightning": lambda raw, mean: {"state_dict": behind("net.", raw) | behind("net_ema.", mean)},
    "named": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean},
    "post hoc": lambda raw, mean: {
        "weights": raw,
        "ema": behind("ema_models.0.ema_model.", mean) | behind("ema_models.1.ema_model.", raw),
    },
    "schema": lambda raw, mean: {"schema": raw, "averaged": mean},
}


@pytest.mark.parametrize("way", AVERAGED)
def test_averaged_weights_are_taken_and_it_is_said(
    tmp_path: Path, state: dict[str, Tensor], way: str
) -> None:
    content = AVERAGED[way](moved(state, 1.0), state)
    torch.save(content, tmp_path / "w.pth")
    net = load_mmaudio(tmp_path / "w.pth")
    assert torch.equal(net.latent_mean, state["latent_mean"])
    (note,) = net.notes
    assert re.search(r"There are [23] sets of weights of .*(ema\S*|averaged) was taken\.$", note)
    done = from_mmaudio(tmp_path / "w.pth", tmp_path / "ours.safetensors")
    assert done.notes == (note,)
    assert torch.equal(MFMJT.load(done.path).latent_mean, state["latent_mean"])


def test_what_has_no_average_is_taken_from_the_raw_weights(state: dict[str, Tensor]) -> None:
    frozen = ("latent_mean", "latent_std", "empty_string_feat")
    mean = {name: value for name, value in state.items() if name not in frozen}
    raw = {name: value + (name not in frozen) for name, value in state.items()}
    net = load_mmaudio({"model": raw, "ema": mean})
    found = to_mmaudio_state_dict(net)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert net.notes[0].endswith("ema was taken, with 3 tensors of the others that it lacks.")


def test_of_several_that_are_not_averaged_none_is_guessed(state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"2 sets of weights .*teacher, student\. Save the one"):
        load_mmaudio(behind("teacher.", state) | behind("student.", moved(state, 1.0)))


def test_the_ends_are_found_in_wrappers_too() -> None:
    clip, sync = CLIP(CLIP_SIZES).state_dict(), Synchformer(SYNC_SIZES).state_dict()
    CLIP.from_state_dict({"state_dict": behind("module.", clip), "epoch": 1}, CLIP_SIZES)
    for prefix in ("", "vfeat_extractor.", "module.vfeat_extractor."):
        other = {"afeat_extractor.x": torch.zeros(1)} if prefix else {}
        given = {"model": behind(prefix, sync) | other}
        Synchformer.from_state_dict(given, SYNC_SIZES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP in the layout of Hugging Face's"),
        ("vfeat_extractor.cls_token", "Synchformer"),
        ("decoder.learnable_gain", "the mel autoencoder of MMAudio"),
        ("sync_input_proj.0.weight", "a network of MMAudio's"),
        ("transformer.lora_A.weight", "an adapter"),
    ],
)
def test_another_kind_is_told_in_one_short_line(name: str, told: str) -> None:
    wrong = {f"{name}.{i}": torch.zeros(1) for i in range(2000)}
    with pytest.raises(InputError, match=rf"missing visual\.conv1\.weight; .*{told}") as caught:
        CLIP.from_state_dict(wrong)
    assert len(str(caught.value)) <= 600
    assert "and 1,997 more" in str(caught.value)


def test_of_many_wrong_entries_five_are_named_and_all_counted() -> None:
    other = CLIP(CLIP_SIZES).state_dict()
    with pytest.raises(InputError, match=r"; .*; .*; .*; .* and \d{3} more\.") as caught:
        CLIP.from_state_dict(other)  # the published sizes
    assert len(str(caught.value)) <= 600
    many = {f"{'x' * 500}{i}": torch.zeros(1) for i in range(5000)}
    with pytest.raises(InputError, match="and 4,997 more") as caught:
        load_published(torch.nn.Linear(2, 2, device="meta"), many, "a layer")
    assert len(str(caught.value)) <= 600


def test_what_holds_no_numbers_is_refused() -> None:
    for value, told in (
        (torch.ones(2, 2, dtype=torch.int64), "torch.int64, not floating point"),
        (torch.ones(2, 2, device="meta"), "no plain values"),
        (torch.ones(2, 2).to_sparse(), "no plain values"),
        (torch.ones(2, 2, dtype=torch.complex64), "not floating point"),
    ):
        layer = torch.nn.Linear(2, 2, bias=False, device="meta")
        with pytest.raises(InputError, match=told):
            load_published(layer, {"weight": value}, "a layer")


def test_a_value_repeated_to_any_size_costs_no_memory(state: dict[str, Tensor]) -> None:
    shape = (3 * 10**6, 10**6)
    huge = torch.zeros(1).expand(shape)
    with pytest.raises(InputError, match="repeated"):
        load_mmaudio({**state, "fused_blocks.0.attn.qkv.weight": huge})
    deep = {f"fused_blocks.{10**9}.linear1.bias": torch.zeros(16)}
    with pytest.raises(InputError, match="no state dict"):
        load_mmaudio({**state, **deep})


def test_dictionaries_that_hold_one_another_end() -> None:
    round_and_round: dict = {}
    round_and_round["inside"] = round_and_round
    wide: dict = {}
    for _ in range(6):
        wide = dict.fromkeys(range(100), wide)
    for content in (round_and_round, wide):
        with pytest.raises(InputError, match="no tensors"):
            weights_in(content, "a", "anything")
