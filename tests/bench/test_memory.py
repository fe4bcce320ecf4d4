"""What a training needs of memory, as it is counted."""

from __future__ import annotations

import json

from bench.networks import memory
from bench.networks.memory import kept, state
from mfmjt.model.lora import LoRA
from tests.support.peers import load_peft

TINY = {"hidden_dim": 32, "num_heads": 1, "depth": 3, "fused_depth": 2}


def test_blocks_that_are_computed_again_keep_less_of_every_clip():
    whole, inputs = (kept("nano", recompute, **TINY) for recompute in (False, True))
    assert 0 < inputs["sample_bytes"] < whole["sample_bytes"]
    assert 0 < inputs["fixed_bytes"] < whole["fixed_bytes"]


def test_all_weights_take_twenty_bytes_each():
    found = state("nano", **TINY)
    frozen = found["parameters"] - found["trained"]
    assert found["state_bytes"] == 20 * found["trained"] + 4 * frozen
    assert 0 < frozen < found["trained"]


def test_adapters_take_fewer():
    load_peft()
    assert state("nano", LoRA(rank=2), **TINY)["trained"] < state("nano", **TINY)["trained"] / 4


def test_it_writes_what_it_counts(tmp_path, capsys):
    load_peft()
    assert memory.main(["--out", str(tmp_path), "--network", "nano"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["environment", "state", "state", "kept", "kept"]
    assert capsys.readouterr().out.count("nano") == 4
