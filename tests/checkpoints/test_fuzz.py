"""Damaged files of weights through every loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 590  # for all of them, on a machine that does much else


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_files_are_used_or_refused(tmp_path: Path, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.loaders", str(tmp_path), str(count)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(found["ends"].values()) > count * found["kinds"]
    assert set(found["ends"]) == {"used", "refused"}  # else the damage is too weak or too strong
    assert found["slowest"] < 30  # seconds, alone under one
