"""Kernels for a GPU that is not there, as pieces would launch them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import __main__
from bench.gpu import drive
from bench.gpu.precompile import PARTS, build_driver, pieces, run_pieces
from mfmjt.errors import RunError

ROOT = Path(__file__).parents[2]
needs = pytest.mark.skipif(
    shutil.which("gcc") is None or importlib.util.find_spec("triton") is None,
    reason="no gcc or no Triton",
)


def test_everything_that_comes_first_is_compiled_for():
    names = pieces(PARTS, ("adaln", "joint_attention"))
    assert set(names) == {
        *(f"check {op}" for op in ("adaln", "joint_attention", "network")),
        *("memcheck adaln", "memcheck joint_attention", "latency", "step"),
        *("kernels adaln", "kernels joint_attention", "train graph"),
    }
    assert pieces(("check",), ("adaln",)) == ["check adaln", "check network"]


def test_a_cache_is_unpacked_to_where_it_was_made(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    (made / "kernel").write_text("cubin")
    with tarfile.open(tmp_path / "kernels.tar.xz", "w:xz") as file:
        file.add(made, "there")
    monkeypatch.setattr(drive, "CACHE", tmp_path / "there")
    drive.unpack(tmp_path / "kernels.tar.xz")
    assert (tmp_path / "there" / "kernel").read_text() == "cubin"
    with pytest.raises(RunError, match="Cannot unpack"):
        drive.unpack(made / "kernel")


def test_an_unknown_part_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "precompile", "--part", "speed"])
    assert __main__.main() == 2
    assert "no part speed" in capsys.readouterr().err


@needs
@pytest.mark.parametrize(
    "names",
    [["kernels swiglu"], pytest.param(["check swiglu", "latency"], marks=pytest.mark.slow)],
    ids=" and ".join,
)
def test_what_is_compiled_is_what_is_launched(tmp_path, names):
    """A cache that a second run finds everything in, launchers and all."""
    given = (sys.executable, names, ("swiglu",), tmp_path, 1)
    options = {"smoke": True, "cache": tmp_path / "cache"}
    compiled, again = run_pieces(*given, **options), run_pieces(*given, **options)
    kernels = [row["kernels"] for row in compiled]
    assert min(kernels) > 0
    assert kernels == [row["kernels"] for row in again]
    assert sum(row["compiled"] for row in compiled) <= sum(kernels)
    assert all(row["compiled"] > 0 for row in compiled)
    assert all(row["launches"] >= row["kernels"] and not row["refused"] for row in compiled)
    assert [row["compiled"] for row in again] == [0] * len(names)


@needs
@pytest.mark.slow
def test_a_block_of_too_many_registers_is_refused(tmp_path):
    """Threads that a block may have follow from the machine code; Triton asks for them."""
    folder = build_driver(sys.executable, tmp_path)
    (tmp_path / "greedy.py").write_text(GREEDY)  # Triton reads a kernel's source from its file
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_LIBCUDA_PATH": str(folder)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "greedy.py"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


GREEDY = """
import os, torch
from bench.gpu.stand_in import installed
from mfmjt.kernels.triton import jit, tl

@jit
def greedy_kernel(x, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + i)
    tl.store(x + i, tile / tl.sum(tile))  # the whole tile is alive until its sum is known

x = torch.empty(256, 256)
with installed(os.environ["TRITON_LIBCUDA_PATH"]) as library:
    greedy_kernel[(3,)](x, N=128, num_warps=16)
    assert (library.stand_in_launches(), library.stand_in_refused()) == (1, 0)
    try:
        greedy_kernel[(1, 65536)](x, N=128, num_warps=16)
        raise SystemExit("a grid beyond the limits was launched")
    except RuntimeError:
        pass
    assert library.stand_in_refused() == 1
    assert b"65536" in library.stand_in_reason()
    try:
        greedy_kernel[(3,)](x, N=256, num_warps=16, maxnreg=200)
        raise SystemExit("a block of too many registers was launched")
    except Exception as error:
        assert "threads" in str(error) or "register" in str(error), error
"""
