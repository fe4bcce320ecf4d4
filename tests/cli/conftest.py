from __future__ import annotations

from pathlib import Path

import pytest

from mfmjt.pipeline import Pipeline


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> Pipeline:
    """What the command makes its sounds with."""
    return Pipeline.from_pretrained(model_folder, device="cpu")
