from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfmjt.codec import NanoCodec, NanoCodecConfig
from mfmjt.encoders import NanoEncoders
from mfmjt.features.procedural import write_store

SMALL = NanoCodecConfig(
    encoder_dim=16, encoder_depth=2, decoder_dims=(32, 24, 16), decoder_depths=(1, 1, 1)
)


@pytest.fixture(scope="session")
def codec() -> NanoCodec:
    """Untrained, and small."""
    torch.manual_seed(0)
    return NanoCodec(SMALL).eval()


@pytest.fixture(scope="session")
def encoders() -> NanoEncoders:
    torch.manual_seed(1)
    return NanoEncoders().eval()


@pytest.fixture(scope="session")
def store(codec, encoders, tmp_path_factory) -> Path:
    """A store of 4 training clips."""
    return write_store(tmp_path_factory.mktemp("store"), {"train": 4}, codec, encoders, workers=0)
