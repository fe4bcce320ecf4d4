from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.features.procedural import write_store
from tests.support.bundles import CODEC


@pytest.fixture(scope="session")
def codec() -> NanoCodec:
    """Untrained, and small."""
    torch.manual_seed(0)
    return NanoCodec(CODEC).eval()


@pytest.fixture(scope="session")
def encoders() -> NanoEncoders:
    torch.manual_seed(1)
    return NanoEncoders().eval()


@pytest.fixture(scope="session")
def store(codec, encoders, tmp_path_factory) -> Path:
    """A store of 4 training clips."""
    return write_store(tmp_path_factory.mktemp("store"), {"train": 4}, codec, encoders, workers=0)
