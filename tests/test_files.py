from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from mfmjt.errors import RunError
from mfmjt.files import atomic_path, check_writable


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
    with contextlib.suppress(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:
        temporary.unlink()  # as safetensors does
        temporary.touch(0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("name", ["no/a", "file/a"])
def test_what_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="Choose a folder that exists"):
        check_writable(tmp_path / name)
    with pytest.raises(RunError, match="Choose a folder that exists"), atomic_path(tmp_path / name):
        pass
    check_writable(tmp_path / ("n" * 255))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
