"""A run in lines: what to read first when it comes home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.rows import read
from mfmjt.files import atomic_path

__all__ = ["lines", "write", "wrong"]

Row = dict[str, Any]


def write(out: Path) -> None:
    """Write summary.txt from the rows that are there."""
    with atomic_path(out / "summary.txt") as part:
        part.write_text("\n".join(lines(out)) + "\n")


def wrong(out: Path) -> int:
    """Return how many results are not right."""
    checks = sum(row.get("ok") is False for row in read(out / "check.jsonl"))
    files = ("generate", "train_step", "kernels")
    rows = [row for name in files for row in read(out / f"{name}.jsonl")]
    return checks + sum(row.get("status") == "wrong" for row in rows)


def lines(out: Path) -> list[str]:
    """Return one line for each figure, and what went wrong at the end."""
    found = [_environment(out / "environment.json")]
    checks = read(out / "check.jsonl")
    for op in dict.fromkeys(row["op"] for row in checks):
        mine = [row for row in checks if row["op"] == op]
        bad = [row for row in mine if not row["ok"]]
        found.append(f"check {op}: {len(mine) - len(bad)} right, {len(bad)} not")
        found += [f"    {_about(row, 'case', 'dtype', 'kind')}: {_why(row)}" for row in bad[:4]]
    for row in read(out / "generate.jsonl"):
        about = _about(row, "what", "network", "batch", "provider")
        found.append(f"{about}: {_generated(row)}")
    for row in read(out / "train_step.jsonl"):
        about = _about(row, "network", "batch", "ratio", "provider")
        found.append(f"step {about}: {_stepped(row)}")
    for row in read(out / "kernels.jsonl"):
        about = _about(row, "op", "case", "dtype", "mode", "provider")
        share = f"{100 * row['floor_ms'] / row['ms_p50']:.0f} %" if "ms_p50" in row else ""
        found.append(
            f"{about}: {row['ms_p50']} ms, {share} of the roofline"
            if share
            else f"{about}: {_why(row)}"
        )
    found += [f"train {_numbers(row)}" for row in read(out / "train.jsonl") if "step" not in row]
    found.append("")
    pieces = read(out / "pieces.jsonl")
    for row in pieces:
        compiled = f", {row['compiled']} kernels compiled" if row.get("compiled") else ""
        missing = f", {row['not_reached']} not reached" if row.get("not_reached") else ""
        took = f" {row['seconds']} s" if "seconds" in row else ""
        found.append(f"{row['at']:6} s {row['piece']}: {row['status']}{took}{compiled}{missing}")
    for row in (row for row in pieces if "log" in row):
        found += ["", f"{row['piece']} {row['status']} at {row.get('at_row', '?')}"]
        found += [f"    {line}" for line in row["log"]]
    return found


def _environment(path: Path) -> str:
    if not path.exists():
        return "no environment.json"
    stamp = json.loads(path.read_text())
    names = ("gpu", "cpu", "cores", "clocks", "torch", "triton", "triton_key", "commit")
    return ", ".join(f"{k} {stamp[k]}" for k in (*names, "ceilings") if stamp.get(k))


def _about(row: Row, *names: str) -> str:
    return " ".join(str(row[name]) for name in names if name in row)


def _why(row: Row) -> str:
    if "reason" in row:
        return f"{row.get('status', '')} {row['reason'][:200]}".strip()
    return _numbers({k: row[k] for k in ("error", "reference", "scale") if k in row})


def _numbers(row: Row) -> str:
    return " ".join(f"{k}={v}" for k, v in row.items() if k != "commit")


def _generated(row: Row) -> str:
    if "ms_p50" not in row:
        return _why(row) if "reason" in row else str(row.get("launches", row.get("status")))
    alone = f", a replay {row['graph_ms']} ms" if row.get("graph_ms") else ""
    return f"{row['status']} {row['ms_p50']} ms{alone}, host {row['cpu_ms_p50']} ms"


def _stepped(row: Row) -> str:
    if "ms_p50" not in row:
        return _why(row)
    eager = ""
    if "eager_ms" in row:
        eager = f", eager {row['eager_ms']} ms (host {row['eager_host_ms']})"
    peak = f", peak {row['peak_mib'] / 1024:.1f} GiB" if row.get("peak_mib") else ""
    of = f", {100 * row['of_gemm']:.0f} % of a product" if row.get("of_gemm") else ""
    why = f" {row['reason']}" if "reason" in row else ""
    return f"{row['status']} {row['ms_p50']} ms, x flow {row['over_flow']}{eager}{peak}{of}{why}"
