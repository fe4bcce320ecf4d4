from __future__ import annotations

from collections.abc import Iterator

import pytest

from mfmjt.train.config import NetworkTraining
from tests.train.ranks import Ranks

TINY = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


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
