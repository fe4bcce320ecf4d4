"""Compile, without a GPU, every Triton kernel that the GPU's command launches there.

A GPU that is lent for minutes is no place to compile for minutes. The pieces of `python -m bench
gpu` run here up to each launch, on a driver that launches nothing (bench/gpu/stand_in.py), so
that Triton's cache has for sm_90 what they launch: the checks, generation, training steps, the
headline cases of ops and the training of nano; launchers too. Then it is packed, and the command
that takes it is printed. It fits one version of Triton and of Python, and kernels as they are at
this commit; what does not fit is compiled there. Needs gcc, and some twenty minutes of two cores.

Examples:
  python -m bench precompile --out kernels.tar.xz             a venv with the GPU machine's versions
  python -m bench precompile --out kernels.tar.xz --python ../venv/bin/python
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import ROOT, parser
from bench.gpu import file_name
from bench.gpu.drive import CACHE, stages
from bench.ops import named, named_ops
from bench.rows import Row, commit, output_of
from mfmjt.errors import RunError
from mfmjt.files import atomic_path

__all__ = ["PARTS", "build_driver", "main", "pieces", "run_pieces"]

PARTS = ("check", "memcheck", "latency", "step", "kernels", "train")
"""What is compiled for: what comes first on a GPU."""
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.2"}
"""Those of the GPU machine."""


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench precompile`; return the exit status."""
    command = parser("precompile", __doc__)
    command.add_argument("--out", type=Path, default="kernels.tar.xz", help="[kernels.tar.xz]")
    command.add_argument("--python", default="python3.12", help="the GPU's Python [python3.12]")
    for name, version in VERSIONS.items():
        command.add_argument(f"--{name}", default=version, help=f"its version there [{version}]")
    command.add_argument("--work", type=Path, help="for a venv and logs [a temporary folder]")
    command.add_argument("--part", help=f"only these of {','.join(PARTS)} [all]")
    command.add_argument("--ops", help="only these, separated by commas")
    command.add_argument("--workers", type=int, help="processes [all cores]")
    given = command.parse_args(argv)
    ops, parts = named_ops(given.ops), named(given.part, PARTS, "part")
    work = Path(given.work or tempfile.mkdtemp(prefix="mfmjt_precompile_")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = _python(given.python, {name: getattr(given, name) for name in VERSIONS}, work)
    shutil.rmtree(CACHE, ignore_errors=True)
    workers = given.workers or len(os.sched_getaffinity(0))
    rows = run_pieces(python, pieces(parts, ops), ops, work, workers)
    with atomic_path(given.out) as part, tarfile.open(part, "w:xz") as file:
        file.add(CACHE, CACHE.name)
    compiled, seconds = (sum(row[key] for row in rows) for key in ("compiled", "compile_s"))
    size = given.out.stat().st_size / 1e6
    print(f"{compiled} kernels compiled in {seconds:.0f} s of a core; {given.out}: {size:.1f} MB.")
    print(f"It fits commit {commit()}, torch {given.torch} and Triton {given.triton}.")
    print(f"On the GPU: python -m bench gpu --out OUT --cache {given.out}")
    return 0


def pieces(parts: Sequence[str], ops: Sequence[str]) -> list[str]:
    """Return the names of the pieces of these parts, the long ones first."""
    found = [piece.name for stage in stages(parts, ops, "cpu") for piece in stage]
    return sorted(
        found, key=lambda name: ("attention" not in name, name not in ("step", "latency"))
    )


def build_driver(python: str, folder: Path) -> Path:
    """Compile the stand-in for libcuda with the headers that Triton brings; return its folder.

    Raises:
        RunError: There is no gcc.
    """
    triton = output_of(python, "-c", "import triton; print(triton.__path__[0])", seconds=120)
    include = f"{triton}/backends/nvidia/include"
    folder.mkdir(parents=True, exist_ok=True)
    source = ROOT / "bench" / "gpu" / "stand_in.c"
    command = ["gcc", "-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    command += [str(source), "-o", str(folder / "libcuda.so.1")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise RunError(f"Cannot run gcc: {error.strerror}. Install it.") from error
    except subprocess.CalledProcessError as error:
        raise RunError(f"Cannot compile {source.name}: {error.stderr.strip()[:300]}.") from error
    return folder


def run_pieces(
    python: str,
    names: Sequence[str],
    ops: Sequence[str],
    work: Path,
    workers: int,
    smoke: bool = False,
    cache: Path = CACHE,
) -> list[Row]:
    """Run pieces against the stand-in, some at a time.

    Args:
        python: The interpreter whose Triton compiles.
        names: Names of pieces.
        ops: Of pieces that have several.
        work: Folder of logs.
        workers: How many at a time.
        smoke: Everything tiny.
        cache: Triton's.

    Returns:
        What each reports: kernels, how many of them were compiled, launches.

    Raises:
        RunError: A piece failed, or a launch was refused.
    """
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_LIBCUDA_PATH": str(build_driver(python, work / "driver")),
    }
    options = ["--ops", ",".join(ops), *(["--smoke"] if smoke else [])]

    def one(name: str) -> Row:
        log = work / f"{file_name(name)}.log"
        command = [python, "-m", "bench.gpu.stand_in", *options, *name.split()]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, env=env)
        lines = done.stdout.splitlines()
        log.write_text(log.read_text() + done.stdout)
        if done.returncode or not lines:
            raise RunError(f"{name} failed: {(lines or ['no report'])[-1][:300]}. See {log}.")
        row: Row = json.loads(lines[-1])
        facts = ", ".join(f"{row[k]} {k}" for k in ("kernels", "compiled", "launches", "seconds"))
        print(f"{name}: {facts}", flush=True)
        return row

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, names))


def _python(python: str, versions: dict[str, str], work: Path) -> str:
    """Return `python` if it has these versions, or that of a new venv that has.

    Raises:
        RunError: It cannot be made.
    """
    asked = "import torch, triton, numpy; print(*(m.__version__ for m in (torch, triton, numpy)))"
    found = output_of("env", python, "-c", asked, seconds=120) or ""
    if [version.partition("+")[0] for version in found.split()] == list(versions.values()):
        return python
    venv = work / "venv"
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    print(f"{python} has not {' '.join(wanted)}: making {venv}.", flush=True)
    try:
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
        subprocess.run([venv / "bin/pip", "install", "-q", *wanted, "safetensors"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunError(f"Cannot make a venv: {error}. Give --python with one.") from error
    return str(venv / "bin/python")
