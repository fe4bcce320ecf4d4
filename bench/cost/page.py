"""The page of modelled costs: what the committed tables say, beside what a GPU has measured."""

from __future__ import annotations

from pathlib import Path

import pandas
from pandas import DataFrame

from bench.providers import OURS
from bench.rows import read

__all__ = ["measured", "write_costs"]

_CASES = ("small_16k B=256", "small_16k B=2")


def measured(results: Path) -> dict[tuple[str, str, str, str], float]:
    """Return what GPUs took, in microseconds, by op, case, dtype and mode.

    Args:
        results: The folder that has a folder of results for each machine.
    """
    return {
        (row["op"], row["case"], row["dtype"], row["mode"]): 1000 * row["ms_p50"]
        for path in sorted(results.glob("*/kernels.jsonl"))
        for row in read(path)
        if row["provider"] == OURS and row.get("malloc") == "cuda" and row.get("ms_p50")
    }


def write_costs(folder: Path) -> Path:
    """Write costs.md from the newest tables of a folder; return its path.

    The folders beside it are looked through for measurements.
    """
    costs, totals = (sorted(folder.glob(f"{kind}_triton_*.csv")) for kind in ("cost", "totals"))
    text = _ops(pandas.read_csv(costs[-1]), measured(folder.parent))
    if totals:
        text = _totals(pandas.read_csv(totals[-1])) + "\n" + text
    path = folder / "costs.md"
    path.write_text(text)
    return path


def _totals(table: DataFrame) -> str:
    lines = [
        "| modelled on sm_90 | launches | their time | with gaps | dearest |",
        "|---|---|---|---|---|",
    ]
    for name, rows in table.groupby("op", sort=False):
        whole, dearest = rows.iloc[0], rows.iloc[1]
        each = f"{int(dearest.launches)} x `{dearest.kernel}`, {dearest.total_us / 1000:.3g} ms"
        times = f"{whole.us / 1000:.4g} ms | {whole.total_us / 1000:.4g} ms"
        lines.append(f"| {name} | {int(whole.launches)} | {times} | {each} |")
    return "\n".join([*lines, ""])


def _ops(table: DataFrame, found: dict[tuple[str, str, str, str], float]) -> str:
    table = table[table["shape"].str.startswith(_CASES)]
    lines = [
        "| op | case | mode | launches | modelled, us | bound by | padding | measured / modelled |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, rows in table.groupby(["op", "shape", "dtype", "mode"], sort=False):
        op, case, _, mode = key
        us = float((rows["launches"] * rows["us"]).sum())
        bounds = ", ".join(dict.fromkeys(rows["bound"]))
        ratio = f"{found[key] / us:.2f}" if key in found else "not measured"
        count = int(rows["launches"].sum())
        idle = rows["padding"].iloc[0]
        padding = "" if pandas.isna(idle) else f"{idle:.2f}"
        first = f"| {op} | {case} | {mode} | {count} | {us:.4g} | {bounds} |"
        lines.append(f"{first} {padding} | {ratio} |")
    return "\n".join([*lines, ""])
