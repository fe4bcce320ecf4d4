from __future__ import annotations

from pathlib import Path

import pytest

from tests.clips import write_video
from tests.model_folder import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete model of random weights."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 1.2 s."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=30)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
