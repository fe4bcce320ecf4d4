from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.train.checkpoint import CheckpointFolder
from mfmjt.train.tasks.network import train_network
from mfmjt.train.trainer import CHECKPOINTS
from tests.train.states import load_state, newest


def make() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(40, 3), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}


def test_what_is_saved_is_what_was(tmp_path):
    """Training goes on while a state is written, and leaves it alone."""
    folder, tensors = CheckpointFolder(tmp_path), make()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    folder.save(3, tensors, {"step": 3, "nested": [1, None, "ä"]})
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    folder.wait()
    path = folder.find()
    assert path == tmp_path / "step-000000003"
    assert folder.read(path) == {"step": 3, "nested": [1, None, "ä"]}
    folder.load(path, tensors, 3)
    assert all(torch.equal(tensors[key], kept[key]) for key in kept)


def test_nothing_is_a_pickle(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, make(), {})
    folder.wait()
    assert {path.suffix for path in folder.find().iterdir()} == {".json", ".safetensors"}


def test_two_states_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save(step, make(), {})
    folder.wait()
    assert {path.name for path in tmp_path.iterdir()} == {
        "latest",
        "step-000000002",
        "step-000000003",
    }
    # One that goes on from an earlier state comes to a step for a second time.
    again = CheckpointFolder(tmp_path)
    path = again.find("step-000000002")
    again.load(path, make(), 2)
    again.save(3, make(), {"second": True})
    again.wait()
    assert again.read(again.find()) == {"second": True}
    assert {path.name for path in tmp_path.iterdir()} == {
        "latest",
        "step-000000002",
        "step-000000003",
    }


def test_what_a_killed_save_left_is_removed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, make(), {"step": 1})
    folder.wait()
    partial = tmp_path / "step-000000002.partial"
    partial.mkdir()
    (partial / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert CheckpointFolder(tmp_path, first=False).find() == folder.find()
    assert partial.exists()  # another process removes it
    again = CheckpointFolder(tmp_path)
    assert not partial.exists()
    assert again.read(again.find()) == {"step": 1}


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign", "no state", "not json"])
def test_a_damaged_state_is_named_and_what_to_do(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, make(), {})
    folder.wait()
    path = folder.find()
    shard, state = next(path.glob("*.safetensors")), path / "state.json"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 10)
    elif damage == "missing":
        shard.unlink()
    elif damage == "foreign":
        record = json.loads(state.read_text())
        state.write_text(json.dumps(record | {"format": "another"}))
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text("{")
    with pytest.raises(InputError) as caught:
        folder.read(path)
    message = str(caught.value)
    assert str(shard if damage in ("cut", "missing") else state) in message
    assert "resume=step-000000001" in message
    assert f"remove {tmp_path}" in message


def test_other_tensors_are_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, make(), {})
    folder.wait()
    for tensors in ({"x": torch.zeros(2)}, {"w": torch.zeros(41, 3)}):
        with pytest.raises(InputError, match=r"Cannot resume from .*step-000000001"):
            folder.load(folder.find(), tensors, 1)
    with pytest.raises(InputError, match="no training state"):
        folder.find("step-000000007")


def test_a_run_goes_on_from_an_earlier_state_only_when_told(recipe):
    config = recipe(steps=2, checkpoint_every=1, schedule="constant")
    train_network(config)
    whole, _ = load_state(config.out)
    damaged = newest(config.out)
    shard = next(damaged.glob("*.safetensors"))
    os.truncate(shard, 1000)
    with pytest.raises(InputError, match="resume=step-000000001"):
        train_network(config)
    train_network(replace(config, resume="step-000000001"))
    again, state = load_state(config.out)
    assert state["step"] == 2
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    names = {path.name for path in (Path(config.out) / CHECKPOINTS).iterdir()}
    assert names == {"latest", "step-000000001", "step-000000002"}
    train_network(config)


@pytest.mark.slow
def test_a_disk_with_no_room_for_network_or_log(recipe, ranks):
    """In a process of its own, whose files may be no longer than a part of the state."""
    config = recipe(steps=1, ema=(0.0,))
    assert ranks.run(1, config).statuses == [0]
    largest = max(p.stat().st_size for p in newest(config.out).iterdir())
    (Path(config.out) / "network.safetensors").unlink()
    for limit, words in ((largest // 4, "network.safetensors"), (100, "log.jsonl")):
        statuses, messages = ranks.run(1, config, limit)
        assert statuses == [1]
        assert words in messages[0]
        assert "make room" in messages[0].lower()
    assert ranks.run(1, config).statuses == [0]
    assert (Path(config.out) / "network.safetensors").exists()
