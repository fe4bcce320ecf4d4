"""The compiled extension: one for all PyTorch and Python versions, small, left out on demand."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mfmjt.kernels import _native

ROOT = Path(__file__).parents[1]
LIMIT = 2**20  # bytes that the compiled kernels may add to the wheel
built = pytest.mark.skipif(
    "missing" in _native.status(), reason=_native.status().get("missing", "")
)


def library() -> Path:
    (path,) = (ROOT / "mfmjt").glob("_C*.so")
    return path


@built
def test_the_extension_is_small(tmp_path: Path) -> None:
    packed = tmp_path / "packed.whl"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(library(), "mfmjt/_C.abi3.so")
    assert packed.stat().st_size <= LIMIT


def tool(name: str) -> str:
    """Find a command of this environment, or skip the test."""
    command = shutil.which(name, path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip(f"{name} is not installed")
    return command


@built
def test_one_build_serves_every_pytorch_and_python() -> None:
    command = [tool("torch-abi-audit"), "--check", "both", str(library())]
    audit = subprocess.run(command, capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "STABLE" in audit.stdout
    assert "abi3-ok" in audit.stdout


@built
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel knows Linux")
def test_one_wheel_serves_every_linux_and_needs_no_library_but_pytorch(tmp_path: Path) -> None:
    """The wheel is made of the extension that is built, not compiled once more."""
    audit = tool("auditwheel")
    for name in ("mfmjt", "csrc"):
        left_out = shutil.ignore_patterns("*.so", "pretrained", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    compiled = tmp_path / "lib" / "mfmjt" / "_C.abi3.so"
    compiled.parent.mkdir(parents=True)
    shutil.copyfile(library(), compiled)  # newer than its sources
    make = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib", "bdist_wheel"]
    environment = {**os.environ, "CXX": "false", "MFMJT_EXT": "1"}  # a compiler would fail
    subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    shown = json.loads(subprocess.check_output([audit, "show", "--json", str(wheel)]))
    assert shown["sym_tag"].startswith("manylinux_2_")
    assert not shown["unsupported_isa"]
    assert set(shown["external_libs"]) <= {"libc10.so", "libtorch.so", "libtorch_cpu.so"}


@pytest.mark.parametrize(
    ("setting", "compiler", "reason"),
    [("0", "c++", "MFMJT_EXT=0"), (None, "no-such-compiler", "no C++ compiler")],
)
def test_why_there_is_no_extension(monkeypatch, tmp_path, setting, compiler, reason):
    monkeypatch.setenv("MFMJT_EXT", setting or "")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", str(tmp_path) if setting is None else os.environ["PATH"])
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="looked_at")
    assert reason in setup["why_not"]()


def test_an_extension_that_is_insisted_on_is_not_left_out_quietly(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "MFMJT_EXT": "1", "PATH": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot be built: no C++ compiler" in done.stderr


def test_without_the_extension_ops_run_in_pytorch_and_the_report_says_so(tmp_path):
    """A checkout without the compiled file, as MFMJT_EXT=0 leaves it."""
    shutil.copytree(
        ROOT / "mfmjt", tmp_path / "mfmjt", ignore=shutil.ignore_patterns("*.so", "pretrained")
    )
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f'{f}']\n"
        "import torch, mfmjt.kernels as k, mfmjt.info as i; x = torch.ones(1, 2, 4)\n"
        "assert k.swiglu(x, x).shape == x.shape\n"
        "print(i.report())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not built" in done.stdout
    ops = done.stdout.partition("Ops  ")[2]
    assert "C++" not in ops
    assert "PyTorch" in ops
