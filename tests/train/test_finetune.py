from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mfmjt import meanflow
from mfmjt.convert import from_meanaudio, from_mmaudio, to_mmaudio
from mfmjt.errors import InputError
from mfmjt.model import (
    MFMJT,
    config_for,
    load_mmaudio,
    to_meanaudio_state_dict,
    to_mmaudio_state_dict,
)
from mfmjt.model.lora import LoRA
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import NetworkTraining, load_config
from mfmjt.train.tasks.network import NetworkTask, _codec, starting_network, train_network
from tests.oracle import allowance, error
from tests.support.peers import load_peft
from tests.support.weights import read
from tests.train.conftest import TINY
from tests.train.states import load_state


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint in MMAudio's layout, of a small network for the store's features."""
    torch.manual_seed(5)
    net = MFMJT.from_config("nano", **TINY)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
        net.latent_std.fill_(1.5)
    path = tmp_path / "mmaudio_tiny.pth"
    torch.save(to_mmaudio_state_dict(net), path)
    return path


@pytest.fixture
def finetune(recipe, published):
    """finetune(**changes) is a fine-tuning of `published`."""

    def make(**changes) -> NetworkTraining:
        fixed = {"init_from": str(published), "model": "auto", "overrides": {}, "window": 0}
        return recipe(**(fixed | {"full_every": 0} | changes))

    return make


@pytest.mark.parametrize("name", ["net_tiny", "net_tiny_v2"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_it_starts_as_the_published_velocity_turned_around(tmp_path, name, adapted):
    """u(z, r, t) = -v(z, 1 - t) for every r, against MMAudio's own outputs."""
    if adapted:
        load_peft()
    state, given = read("model", name)
    torch.save(state, tmp_path / "mmaudio.pth")
    config = NetworkTraining(
        model="auto",
        init_from=str(tmp_path / "mmaudio.pth"),
        overrides={"latent_length": 25, "video_length": 8, "sync_length": 24},
        lora=LoRA(rank=2) if adapted else None,
    )
    net = starting_network(config)
    t, cond = 1 - given["in.t"], (given["in.clip"], given["in.sync"], given["in.text"])
    terms = net.config.depth * 3 * net.config.mlp_hidden
    truth = given["out.velocity"]
    with torch.no_grad():
        for r in (t, t / 3, torch.zeros_like(t)):
            u = net(given["in.latent"], r, t, *cond)
            assert error(-u, truth) <= allowance(truth, torch.float32, terms)


@pytest.mark.parametrize("ours", [False, True], ids=["published", "ours"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_meanaudio_starts_a_network_of_video_as_itself(tmp_path, ours, adapted):
    """Whatever the video, against MeanAudio's own outputs; and a step then moves what is new."""
    if adapted:
        load_peft()
    state, given = read("model", "meanaudio_tiny")
    path = tmp_path / "meanaudio.pth"
    torch.save(state, path)
    if ours:
        path = from_meanaudio(path, tmp_path / "meanaudio.safetensors").path
    config = NetworkTraining(
        model="auto",
        init_from=str(path),
        overrides={"video": "gated", "video_dim": 6, "sync_dim": 5},
        lora=LoRA(rank=2) if adapted else None,
    )
    net = starting_network(config)
    cond = {"text": given["in.text"], "pooled": given["in.pooled"]}
    cond |= {"video": torch.randn(2, 8, 6), "sync": torch.randn(2, 24, 5)}
    terms = net.config.depth * 3 * net.config.mlp_hidden
    for r, t, truth in zip(given["in.r"], given["in.t"], given["out.u"], strict=True):
        with torch.no_grad():
            u = net(given["in.latent"], r, t, **cond)
        assert error(u, truth) <= allowance(truth, torch.float32, terms)
    loss = meanflow.loss(net, given["in.latent"], cond, ratio=0.5)
    loss.backward()
    for block in net.joint_blocks:
        assert block.video_gate.grad.any()


def test_a_network_of_text_becomes_one_of_video_by_training(recipe, tmp_path):
    """On a store of videos, whose text is narrower and whose whole texts have no vector."""
    net = MFMJT.from_config(
        "nano", **TINY, video="none", text_rope=True, pooled_dim=5, towards_data=False
    )
    torch.save(to_meanaudio_state_dict(net), tmp_path / "meanaudio.pth")
    config = recipe(
        init_from=str(tmp_path / "meanaudio.pth"),
        model="auto",
        overrides={"video": "gated", "video_dim": 128, "sync_dim": 128},
        lr=1e-3,
    )
    trained = MFMJT.load(train_network(config).file)
    assert trained.config.video == "gated"
    start = starting_network(config).state_dict()
    moved = {n for n, v in trained.state_dict().items() if not torch.equal(v, start[n].half())}
    assert {"clip_cond_proj.weight", "sync_input_proj.2.w2.weight"} <= moved


def test_which_of_several_weights_it_starts_from_is_said(finetune, published, capsys):
    state = torch.load(published, weights_only=True)
    both = published.with_name("both.pth")
    torch.save({"model": {k: v + 1 for k, v in state.items()}, "ema": state}, both)
    train_network(finetune(steps=1, init_from=str(both)))
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "Note: " in line)
    assert note.endswith("under model, ema: ema was taken.")


def test_a_step_of_nothing_gives_the_network_back(finetune, published):
    """Normalisation and null text are the checkpoint's, and the store's latents follow them."""
    config = finetune(steps=1, lr=0.0, weight_decay=0.0)
    train_network(config)
    start = load_mmaudio(published).state_dict()
    tensors, _ = load_state(config.out)
    assert all(torch.equal(tensors[f"net.{name}"], value) for name, value in start.items())
    with Processes() as processes:
        task = NetworkTask(config, processes)
    rows = torch.arange(2)
    features = task.store.rows(rows)["latent"]
    task.store.latent_mean, task.store.latent_std = torch.zeros(()), torch.ones(())
    raw = task.store.rows(rows)["latent"]
    net = load_mmaudio(published)
    assert torch.equal(features, net.normalize(raw).detach())


def test_only_adapters_are_trained_and_all_is_exported_merged(finetune, published, tmp_path):
    load_peft()
    config = finetune(steps=4, lora=LoRA(rank=2), lr=1e-2, ratio=0.5, ema=(0.0,))
    whole = train_network(config)
    start = load_mmaudio(published).state_dict()
    tensors, _ = load_state(config.out)
    frozen = [name for name in tensors if name.endswith(".base_layer.weight")]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(tensors[name], start[name[4:].replace(".base_layer", "")])
    moved = {name.split(".", 1)[1] for name in tensors if name.startswith("exp_avg.")}
    assert all(".lora_" in name or name.startswith("r_embed.") for name in moved)

    # The exported network is what the adapter's file makes of the checkpoint, rounded to fp16.
    adapter = whole.file.parent / "adapter.safetensors"
    merged = from_mmaudio(published, tmp_path / "m.safetensors", adapter=adapter).path
    ours, theirs = MFMJT.load(whole.file).state_dict(), MFMJT.load(merged).state_dict()
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in ours)
    changed = [name for name in ours if not torch.equal(theirs[name], start[name])]
    assert any("qkv" in name for name in changed)
    # And so does the way back.
    (note,) = to_mmaudio(whole.file, tmp_path / "back.pth").notes[1:]
    assert "It was trained" in note
    back = load_mmaudio(tmp_path / "back.pth").state_dict()
    kept = [name for name in ours if not name.startswith("r_embed.")]
    assert all(torch.equal(back[name], ours[name]) for name in kept)

    # It goes on with the same adapters, and with no others.
    again = train_network(finetune(steps=5, lora=LoRA(rank=2), lr=1e-2, ratio=0.5, ema=(0.0,)))
    assert again.step == 5
    with pytest.raises(InputError, match="was trained with lora="):
        train_network(finetune(steps=6, lora=LoRA(rank=3), ema=(0.0,)))


def test_settings_say_what_they_need(finetune, published):
    given = [f"init_from={published}", "lora.rank=4", "lora.alpha=8"]
    config = load_config(NetworkTraining, "finetune", "network", given)
    assert config.lora == LoRA(4, 8)
    assert config.model == "auto"
    with pytest.raises(InputError, match="init_from=FILE"):
        starting_network(NetworkTraining(model="auto"))
    with pytest.raises(InputError, match="has shape"):
        starting_network(finetune(model="small_16k"))
    with pytest.raises(InputError, match="previews are sound"):
        NetworkTraining(codec=None)
    for changes, says in (
        ({"compile": True, "checkpointing": True}, "exclude one another"),
        ({"cuda_graph": True, "accumulate": 2}, "of one pass"),
    ):
        with pytest.raises(InputError, match=says):
            NetworkTraining(**changes)
    with pytest.raises(InputError, match="needs one process with a GPU"):
        train_network(finetune(cuda_graph=True))


def test_a_network_of_ours_is_told_from_a_published_one(finetune, published, tmp_path):
    ours = from_mmaudio(published, tmp_path / "ours.safetensors").path
    layout = to_mmaudio(ours, tmp_path / "theirs.safetensors").path
    nets = [starting_network(finetune(init_from=str(path))) for path in (ours, layout, published)]
    first = nets[0].state_dict()
    for net in nets[1:]:
        assert net.config == nets[0].config
        assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


def test_a_models_folder_reads_the_captions_and_decodes_the_previews(recipe, ends, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (ends.codec_path, ends.encoders_path):
        shutil.copy(path, folder)
    parts = {"codec": str(folder), "encoders": str(folder)}
    common = {"steps": 1, "preview_every": 1, "preview_clips": 1}
    files = recipe(out=str(tmp_path / "files"), **common)
    train_network(files)
    train_network(recipe(out=str(tmp_path / "folder"), **common | parts))
    name = "previews/clip0_step0000001.wav"
    assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    with pytest.raises(InputError, match="20 channels, and the network 8"):
        _codec(str(folder), config_for("nano", latent_dim=8))
