"""Rows of results, in files that outlive whatever happens to the process that writes them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import ROOT
from mfmjt.files import atomic_path

if TYPE_CHECKING:
    from bench.clock import Timing

__all__ = ["CHECK", "GENERATE", "KERNELS", "KEY", "STEP", "TRAIN", "Row", "Rows", "commit"]
__all__ += ["dtype_name", "failure", "name_of", "output_of", "read", "short", "write_json"]

Row = dict[str, Any]

KEY = ("op", "case", "dtype", "mode", "provider", "malloc", "threads")
"""What identifies a row of `kernels.jsonl`."""
CHECK, KERNELS = ("check", ("op", "case", "dtype", "mode")), ("kernels", KEY)
GENERATE = ("generate", ("what", "network", "provider", "batch", "dtype", "device", "threads"))
STEP = ("train_step", ("what", "network", "batch", "length", "ratio", "provider"))
TRAIN = ("train", ("run", "step"))
"""Files of rows, and what identifies a row of each."""


def short(value: Any) -> Any:
    """Return a number with five digits, also those of a list or of a row; all else as it is."""
    if isinstance(value, Mapping):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def dtype_name(dtype: Any) -> str:
    """Return `float32` and so on of a PyTorch dtype."""
    return str(dtype).removeprefix("torch.")


def name_of(row: Row) -> str:
    """Return a provider's name in a table, with its allocator where that is not the default."""
    raised = ", raised malloc" if row["malloc"] == "raised" else ""
    return f"{row['provider']}{raised}"


def failure(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


def output_of(*command: str, seconds: float = 20.0) -> str | None:
    """Return what a command prints, run in the source tree; None where it fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Return COMMIT of the environment, for where there is no .git, or git's answer."""
    return os.environ.get("COMMIT") or output_of("git", "rev-parse", "HEAD")


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Print figures, and write them as a file."""
    text = json.dumps(figures, indent=1)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(text + "\n")


def read(path: Path) -> list[Row]:
    """Return the rows of a file, but a line that was cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Rows:
    """Rows of results in a JSON-lines file; a row that is there already is not made again.

    Several processes may append to a file: a row is one write.

    Args:
        path: The file; rows are appended.
        key: The fields that identify a row.
        about: Fields of every row that is added.
    """

    def __init__(
        self, path: Path, key: tuple[str, ...] = KEY, about: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.key, self.about = path, key, dict(about or {})
        self.rows = read(path)
        self._known = {self._of(row) for row in self.rows}

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in self.key)

    def has(self, **fields: Any) -> bool:
        """Return whether some row has these values in the identifying fields."""
        return self._of(fields) in self._known

    def add(self, fields: Mapping[str, Any], timing: Timing | None = None) -> Row:
        """Append a row, its numbers rounded to five digits; return it."""
        row = short({**fields, **self.about, **(asdict(timing) if timing else {})})
        line = json.dumps(row) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # whoever wrote it was killed
                line = "\n" + line
            os.write(file, line.encode())
        finally:
            os.close(file)
        self.rows.append(row)
        self._known.add(self._of(row))
        return row
