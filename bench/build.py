"""What the compiled kernels cost an installation: seconds to build, bytes in the wheel, import.

python -m bench.build --out bench/results/zen4_2_cores
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mfmjt.files import atomic_path
from mfmjt.kernels import _native

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "mfmjt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# Milliseconds, in a process that has imported torch
IMPORT = (
    "import time, torch; t = time.perf_counter(); import mfmjt._C; "
    "print(1e3 * (time.perf_counter() - t))"
)


def build(folder: Path) -> tuple[float, Path]:
    """Compile the extension of a copy of the sources; seconds, and the file."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "pretrained")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env={**os.environ, "MFMJT_EXT": "1"}, check=True)
    seconds = time.perf_counter() - start
    (library,) = (folder / "mfmjt").glob("_C*.so")
    return seconds, library


def import_time(folder: Path, repeats: int) -> float:
    """Median milliseconds that importing the extension adds to `import torch`."""
    command = [sys.executable, "-c", IMPORT]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return statistics.median(
        float(subprocess.check_output(command, cwd=folder, env=environment)) for _ in range(repeats)
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, and write `build.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main())
