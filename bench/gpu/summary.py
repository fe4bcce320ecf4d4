"""A run in lines: what to read first when it comes home."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.rows import Row, read
from mfmjt.files import atomic_path

__all__ = ["lines", "write", "wrong"]

FIGURES = {
    "generate": (
        ("what", "network", "batch", "provider"),
        ("ms_p50", "graph_ms", "cpu_ms_p50", "launches", "reason"),
    ),
    "train_step": (
        ("network", "batch", "ratio", "provider"),
        ("ms_p50", "over_flow", "eager_ms", "eager_host_ms", "peak_mib", "of_gemm", "reason"),
    ),
    "kernels": (
        ("op", "case", "dtype", "mode", "provider"),
        ("ms_p50", "of_roofline", "reason"),
    ),
    "train": (("run",), ("steps", "steps_per_s", "seconds", "finished", "peak_gib", "reason")),
}
"""What a line has of a row of each file: values, and beside the status names with their values."""
MACHINE = ("gpu", "cpu", "cores", "clocks", "torch", "triton", "triton_key", "commit", "ceilings")


def write(out: Path) -> None:
    """Write summary.txt from the rows that are there."""
    with atomic_path(out / "summary.txt") as part:
        part.write_text("\n".join(lines(out)) + "\n")


def wrong(out: Path) -> int:
    """Return how many results are not right."""
    rows = [row for name in ("check", *FIGURES) for row in read(out / f"{name}.jsonl")]
    return sum(row.get("ok") is False or row.get("status") == "wrong" for row in rows)


def lines(out: Path) -> list[str]:
    """Return one line for each figure, and what went wrong at the end."""
    path = out / "environment.json"
    stamp = json.loads(path.read_text()) if path.exists() else {}
    text = [_named(stamp, MACHINE) or "no environment.json"]
    checks = read(out / "check.jsonl")
    for op in dict.fromkeys(row["op"] for row in checks):
        bad = [row for row in checks if row["op"] == op and not row["ok"]]
        good = sum(row["op"] == op and row["ok"] for row in checks)
        text.append(f"check {op}: {good} right, {len(bad)} not")
        of, why = ("case", "dtype", "kind"), ("status", "reason", "error", "reference", "scale")
        text += [f"    {_values(row, of)}: {_named(row, why)}" for row in bad[:4]]
    for name, (about, figures) in FIGURES.items():
        for row in (row for row in read(out / f"{name}.jsonl") if "status" in row):
            text.append(f"{name} {_values(row, about)}: {row['status']} {_named(row, figures)}")
    pieces = read(out / "pieces.jsonl")
    for row in pieces:
        facts = _named(row, ("seconds", "compiled", "not_reached"))
        text.append(f"{row['at']:6} s {row['piece']}: {row['status']} {facts}")
    for row in (row for row in pieces if "log" in row):
        text += ["", f"{row['piece']} {row['status']} at {row.get('at_row', '?')}"]
        text += [f"    {line}" for line in row["log"]]
    return text


def _values(row: Row, names: Sequence[str]) -> str:
    return " ".join(str(row[name]) for name in names if name in row)


def _named(row: Row, names: Sequence[str]) -> str:
    return " ".join(f"{name}={str(row[name])[:200]}" for name in names if row.get(name))
