"""Measure what the compiled kernels cost an installation: seconds, bytes in the wheel, import.

Examples:
  python -m bench build --out bench/results/zen4_2_cores
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT, parser
from bench.rows import write_json
from mfmjt.kernels import _native

# Milliseconds, in a process that has imported torch
IMPORT = (
    "import time, torch; t = time.perf_counter(); import mfmjt._C; "
    "print(1e3 * (time.perf_counter() - t))"
)


def build(folder: Path) -> tuple[float, Path]:
    """Compile the extension of a copy of the sources; return the seconds, and the file."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "pretrained")
    for name in ("csrc", "mfmjt"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env={**os.environ, "MFMJT_EXT": "1"}, check=True)
    seconds = time.perf_counter() - start
    (library,) = (folder / "mfmjt").glob("_C*.so")
    return seconds, library


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write `build.json`."""
    usage = parser("build", __doc__, out="")
    usage.add_argument("--repeats", type=int, default=7, help="imports that are timed [7]")
    options = usage.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds, library = build(folder)
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", IMPORT]
        imports = [
            float(subprocess.check_output(command, cwd=folder, env=environment))
            for _ in range(options.repeats)
        ]
        packed = folder / "packed.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(library, library.name)
        result = {
            "compiler": _native.status().get("compiler", ""),
            "cores": os.cpu_count(),
            "build_seconds": round(seconds, 1),
            "library_bytes": library.stat().st_size,
            "library_bytes_in_wheel": packed.stat().st_size,
            "import_ms": round(statistics.median(imports), 2),
        }
    write_json(options.out / "build.json", result)
    return 0
