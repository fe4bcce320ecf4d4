"""`mfmjt extract` from the outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mfmjt import cli
from mfmjt.features.store import FeatureStore
from tests.extract.conftest import rejects, write_table
from tests.support.stores import files

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["extract", *map(str, arguments)])


@pytest.fixture
def table(videos, clips, tmp_path) -> Path:
    rows = [(name, clips[0].caption, split) for name, split in (("a", "train"), ("b", "val"))]
    return write_table(tmp_path / "t.csv", ("file", "text", "split"), [*rows, ("z", "no", "val")])


def test_it_makes_and_verifies_a_store(videos, table, tmp_path):
    out = tmp_path / "out"
    names = ("--column", "path=file", "--column", "caption=text")
    common = (table, "--out", out, "--media", videos, *names, "--seconds", 0.96, "--device", "cpu")
    done = run(*common, "--verify")
    assert done.exit_code == 0, done.output
    assert f"{out / 'train'}: 1 clips." in done.output
    assert f"{out / 'validation'}: 1 clips, 1 skipped: " in done.output
    assert "4 files of" in done.output
    assert len(FeatureStore(out, "validation")) == 1
    assert rejects(out / "validation").keys() == {"z"}
    before = files(out)
    assert run(*common, "--split", "train").exit_code == 0
    assert files(out) == before

    path = out / "train" / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    broken = run("--out", out, "--verify")
    assert broken.exit_code == 1
    assert "is damaged" in broken.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Nothing to do"),
        (("none.csv",), "no table none.csv"),
        (("t.csv", "--column", "path"), "OURS=THEIRS"),
        (("t.csv", "--arithmetic", "int8"), "float32, bfloat16, float16"),
        (("t.csv", "--pieces", "2"), "1 where they have pictures"),
        (("t.csv", "--device", "cuda:77"), "cannot be used"),
        (("--verify", "--out", "nowhere"), "no finished store"),
    ],
)
def test_misuse_ends_with_status_2(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_one_process_verifies(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("--verify")
    assert done.exit_code == 2
    assert "one process" in done.output


def test_processes_of_torchrun_share_it(videos, table, tmp_path):
    """Two processes of one group, and one alone, make the same."""
    out = [tmp_path / name for name in ("two", "one")]
    names = ("--column", "path=file", "--column", "caption=text", "--seconds", "0.96")
    common = ("extract", str(table), "--media", str(videos), "--device", "cpu", *names)

    def start(out: Path, **env: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mfmjt.cli", *common, "--out", str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)

    both = [start(out[0], RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert run(*common[1:], "--out", out[1]).exit_code == 0
    assert files(out[0]) == files(out[1])
