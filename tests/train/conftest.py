from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.features.procedural import write_store
from mfmjt.train.recipe import NetworkTraining
from tests.train.ranks import Ranks

TINY = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}


class Ends(NamedTuple):
    codec: NanoCodec
    encoders: NanoEncoders
    codec_path: Path
    encoders_path: Path


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ends(tmp_path_factory) -> Ends:
    """Untrained codec and encoders, in memory and on disk."""
    folder = tmp_path_factory.mktemp("ends")
    torch.manual_seed(0)
    codec, encoders = NanoCodec().eval(), NanoEncoders().eval()
    paths = folder / "codec.safetensors", folder / "encoders.safetensors"
    codec.save(paths[0])
    encoders.save(paths[1])
    return Ends(codec, encoders, *paths)


@pytest.fixture(scope="session")
def store(ends, tmp_path_factory) -> Path:
    """A store of 4 training and 2 validation clips, as the stage `features` makes it."""
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder, {"train": 4, "validation": 2}, ends.codec, ends.encoders, workers=0)


@pytest.fixture
def recipe(ends, store, tmp_path):
    """recipe(**changes) is a training of a tiny network on `store`."""

    def make(**changes) -> NetworkTraining:
        settings = {
            "out": str(tmp_path / "out"),
            "store": str(store),
            "codec": str(ends.codec_path),
            "encoders": str(ends.encoders_path),
            "overrides": TINY,
            "threads": 1,
            "steps": 6,
            "batch": 4,
            "window": 20,
            "full_every": 3,
            "full_batch": 2,
            "ratio": 0.5,
            "warmup": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 0,
            "preview_every": 0,
            "tensorboard": False,
        }
        return NetworkTraining(**(settings | changes))

    return make
