"""Measure what the compiled kernels cost an installation: seconds, bytes in the wheel, import.

Examples:
  python -m bench build --out bench/results/zen4_2_cores
"""

from __future__ import annotations

import json
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

from bench import parser
from mfmjt.files import atomic_path
from mfmjt.kernels import _native

ROOT = Path(__file__).parents[1]
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


def import_time(folder: Path, repeats: int) -> float:
    """Return the median milliseconds that the extension adds to `import torch`."""
    command = [sys.executable, "-c", IMPORT]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return statistics.median(
        float(subprocess.check_output(command, cwd=folder, env=environment)) for _ in range(repeats)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write `build.json`."""
    usage = parser("build", __doc__)
    usage.add_argument("--out", type=Path, required=True, help="folder of the results")
    usage.add_argument("--repeats", type=int, default=7, help="imports that are timed [7]")
    options = usage.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds, library = build(folder)
        packed = folder / "packed.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(library, library.name)
        result = {
            "compiler": _native.status().get("compiler", ""),
            "cores": os.cpu_count(),
            "build_seconds": round(seconds, 1),
            "library_bytes": library.stat().st_size,
            "library_bytes_in_wheel": packed.stat().st_size,
            "import_ms": round(import_time(folder, options.repeats), 2),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out / "build.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0
