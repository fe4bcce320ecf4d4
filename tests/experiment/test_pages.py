"""Pages of experiments have the figures of their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mfmjt.experiment.page import ABOUT, write_page

ROOT = Path(__file__).parents[2]
RESULTS = sorted(p.parent for p in (ROOT / "bench/results/experiments").glob(f"*/{ABOUT}"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_a_page_is_made_of_its_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.relative_to(ROOT))
    page = tmp_path / "docs" / "experiments" / f"{folder.name}.md"
    page.parent.mkdir(parents=True)
    written = write_page(tmp_path / folder.relative_to(ROOT), page).read_text()
    assert written == (ROOT / "docs" / "experiments" / page.name).read_text()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1_000_000
