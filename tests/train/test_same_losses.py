"""Every training is what it was, to the last bit: losses of twenty steps, and what is exported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mfmjt.features.format import write_part
from mfmjt.model import MFMJT, to_mmaudio_state_dict
from mfmjt.train.stages import run
from tests.support.bundles import TINY_CODEC, TINY_ENCODERS
from tests.support.peers import load_peft
from tests.train.conftest import TINY
from tests.train.states import records

NETWORK = {
    "codec": None, "encoders": None, "overrides": TINY, "threads": 1, "steps": 20, "batch": 4,
    "window": 20, "full_every": 5, "full_batch": 2, "ratio": 0.5, "warmup": 4, "lr": 3e-3,
    "log_every": 1, "checkpoint_every": 20, "validate_every": 0, "preview_every": 0,
    "tensorboard": False,
}  # fmt: skip
NETWORKS = {
    "mean velocity": {
        "ema": [0.9, 0.99], "validate_every": 10, "accumulate": 2, "one_step": 0.25,
        "flow_steps": 5,
    },
    "bfloat16": {"dtype": "bfloat16", "schedule": "linear", "checkpointing": True},
    "guided": {"target": "alpha_flow", "omega": 0.5, "kappa": 0.25, "clip": 0.0, "p": 0.0},
    "adapters": {"model": "auto", "overrides": {}, "lora": {"rank": 2, "alpha": 4}},
}  # fmt: skip
CLIPS = 4


@pytest.fixture
def check(tmp_path, digests):
    """check(name, stage, settings) trains, and compares with what the same training gave."""

    def same(name: str, stage: str, settings: dict[str, Any]) -> None:
        recipe, out = tmp_path / "recipe.json", tmp_path / "out"
        recipe.write_text(json.dumps({stage: settings | {"out": str(out)}}))
        run(stage, str(recipe))
        losses = [record["loss"] for record in records(out, "train")]
        assert len(losses) == 20
        figures = [value for record in records(out, "validation") for value in record.items()]
        (file,) = out.glob(f"{stage}.safetensors")
        digests.check(
            name,
            torch.tensor(losses, dtype=torch.float64),
            repr([(key, value) for key, value in figures if key != "kind"]),
            *(value for _, value in sorted(load_file(file).items())),
        )

    return same


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Random features."""
    folder, draw = tmp_path_factory.mktemp("random"), torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        (folder / split).mkdir()
        shapes = {"mean": (250, 20), "logvar": (250, 20), "video": (64, 128), "sync": (200, 128)}
        features = {
            name: torch.randn(CLIPS, *shape, generator=draw).half()
            for name, shape in shapes.items()
        }
        write_part(folder / split / "000000.safetensors", features, {})
        index = {
            "captions": [f"clip {i}" for i in range(CLIPS)], "shards": ["000000.safetensors"],
            "latent_mean": [0.1] * 20, "latent_std": [1.2] * 20,
        }  # fmt: skip
        (folder / split / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network(name, check, store, tmp_path) -> None:
    settings = NETWORK | {"store": str(store)} | NETWORKS[name]
    if "lora" in settings:
        load_peft()
        torch.manual_seed(0)
        net = MFMJT.from_config("nano", **TINY)
        for p in net.parameters():  # a fresh network gives zero
            torch.nn.init.normal_(p, std=0.05)
        settings["init_from"] = str(tmp_path / "mmaudio.pth")
        torch.save(to_mmaudio_state_dict(net), settings["init_from"])
    check(f"network, {name}", "network", settings)


@pytest.mark.parametrize("changes", [{}, {"train_encoder": False, "mel": 1.0, "bf16": True}])
def test_the_codec(changes, check, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    draw = np.random.default_rng(0)
    for split, count in (("train", CLIPS), ("validation", 1)):  # as if they were rendered
        sounds = draw.integers(-9000, 9000, size=(count, 128000), dtype=np.int16)
        np.save(tmp_path / "out" / f"{split}_{count}.npy", sounds)
    settings = {
        "steps": 20, "batch": 2, "seconds": 0.256, "lr": 3e-3, "warmup": 4, "clips": CLIPS,
        "validation_clips": 1, "threads": 1, "log_every": 1, "save_every": 10, "bf16": False,
        "model": asdict(TINY_CODEC),
    }  # fmt: skip
    name = "decoder" if changes else "codec"
    check(name, "codec", settings | changes)


def test_the_encoders(check, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    draw = np.random.default_rng(0)
    for split, count in (("train", CLIPS), ("validation", 1)):
        frames = draw.integers(256, size=(count, 200, 64, 64, 3), dtype=np.uint8)
        np.save(tmp_path / "out" / f"{split}_{count}.npy", frames)
    settings = {
        "steps": 20, "windows": 2, "window": 16, "batch": CLIPS, "pictures": 2, "lr": 3e-3,
        "warmup": 4, "clips": CLIPS, "validation_clips": 1, "threads": 1, "log_every": 1,
        "save_every": 20, "bf16": False, "model": asdict(TINY_ENCODERS),
    }  # fmt: skip
    check("encoders", "encoders", settings)


def test_the_classifier(check) -> None:
    training = {
        "clips": 6, "validation_clips": 3, "steps": 20, "batch": 4, "duration": 0.5,
        "shortest": 0.2, "log_every": 1,
    }  # fmt: skip
    check("classifier", "classifier", {"training": training})
