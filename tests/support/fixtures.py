"""Fixtures of several folders.

What they need is imported where it is used: tests/kernels runs where PyTorch is all there is.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete model of random weights."""
    from tests.support.bundles import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 1.2 s."""
    from tests.support.clips import write_video

    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=30)


@pytest.fixture(scope="session")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list of merges that CLIP's tokenizer reads."""
    from tests.support.published import write_merges

    return write_merges(tmp_path_factory.mktemp("merges") / "bpe_simple_vocab_16e6.txt.gz")
