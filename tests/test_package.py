"""What a wheel holds: the code, the weights, the recipes, the licence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mfmjt", source / "mfmjt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('out')"],
        cwd=source,
        env={**os.environ, "MFMJT_EXT": "0"},
        capture_output=True,
        check=True,
    )
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mfmjt").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert names >= shipped
    assert any(name.endswith("licenses/LICENSE") for name in names)
    extra = {name for name in names - shipped if ".dist-info/" not in name}
    assert all(name.endswith(".so") for name in extra), extra
