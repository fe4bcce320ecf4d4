"""Make plots and tables of a folder of results, and put the tables into the documents.

Writes into DIR: `table.md` (the cases to look at first), `details.md` (everything, with the reasons
of what could not run), a plot for each op, and one of attention against its length where that was
timed; where generation was timed, `generate.md` and a plot of it against the model's size and the
batch; where training steps were, `steps.md`. A time's distance above the diagonal of an op's plot
is its distance from the roofline, the larger of bytes over the copy bandwidth and FLOPs over the
matrix product's rate, both measured in the same run. Documents that name one of these tables
between `<!-- DIR/table.md -->` and `<!-- end -->` get the new one.

Examples:
  python -m bench report bench/results/zen4_2_cores
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import parser
from bench.model import bench_generate
from bench.plots import name_of, plot_generation, plot_ops
from bench.providers import OURS
from bench.rows import Rows, read
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.errors import InputError
from mfmjt.testing import VALUE

__all__ = ["generation", "main", "metric", "write_tables"]

ROOT = Path(__file__).parent.parent
ACTIVATIONS = 18
"""Of each stage of BigVGAN: three residual blocks of six. One more follows the last stage."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench report`; return the exit status."""
    command = parser("report", __doc__)
    command.add_argument("dir", type=Path, help="folder of results")
    command.add_argument("--no-plots", action="store_true", help="tables only: no matplotlib")
    given = command.parse_args(argv)
    rows = load(given.dir)
    tables = [*write_tables(given.dir, rows), *write_generation(given.dir)]
    tables += write_steps(given.dir)
    changed = _fill_documents(given.dir, tables)
    plots = (
        []
        if given.no_plots
        else [*plot_ops(given.dir, rows), *plot_generation(given.dir, _generation(given.dir))]
    )
    for path in (*tables, *changed, *plots):
        print(path)
    return 0


def load(folder: Path) -> list[Row]:
    """Return the rows of a folder's kernels.jsonl, which a short run on a GPU may lack.

    Raises:
        InputError: Nothing was timed.
    """
    path = folder / "kernels.jsonl"
    timed = ("kernels.jsonl", "generate.jsonl", "train_step.jsonl")
    if not any((folder / name).exists() for name in timed):
        raise InputError(
            f"{folder} has no kernels.jsonl: nothing was timed into it. Run `python -m bench cpu "
            f"--out {folder}` or `python -m bench gpu --out {folder}`."
        )
    return Rows(path).rows


def metric(row: Row) -> str:
    """What a row is judged by: CPU time on a CPU, else the device's time."""
    return "ms_p50" if row["malloc"] == "cuda" else "cpu_ms_p50"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by (op, case, dtype, mode), in the order in which they were made."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["dtype"], row["mode"])
        groups.setdefault(key, []).append(row)
    return groups


# tables


def write_tables(folder: Path, rows: list[Row]) -> list[Path]:
    """Write table.md and details.md; return their paths."""
    stamp_path = folder / "environment.json"
    stamp = json.loads(stamp_path.read_text()) if stamp_path.exists() else {}
    groups = _groups(rows)
    ops = sorted({key[0] for key in groups})
    first = {
        op: {key: group for key, group in groups.items() if key[0] == op and _is_headline(group)}
        for op in ops
    }
    short = [_environment(stamp), *(_op_table(op, first[op]) for op in ops if first[op])]
    every = {op: {k: g for k, g in groups.items() if k[0] == op} for op in ops}
    long = [_environment(stamp), _checks(folder), _steps(folder)]
    long += [f"## {op}\n\n{_op_table(op, every[op])}\n{_reasons(every[op])}" for op in ops]
    paths = []
    for name, parts in (("table.md", short), ("details.md", long)):
        path = folder / name
        path.write_text("\n".join(part for part in parts if part))
        paths.append(path)
    return paths


def _is_headline(group: list[Row]) -> bool:
    """Of the first cases to look at, which older rows say by being compiled."""
    return any(row.get("headline", row["provider"].startswith("compile")) for row in group)


def _environment(stamp: Row) -> str:
    if not stamp:
        return ""
    machine = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    parts = [machine, f"torch {stamp['torch']}"]
    if stamp.get("gpu"):
        parts += [f"CUDA {stamp['cuda']}", f"driver {stamp['driver']}", f"Triton {stamp['triton']}"]
    ceilings = stamp.get("ceilings")
    if ceilings:
        parts.append(f"copy {ceilings['copy_gbps']:.4g} GB/s")
        parts += [
            f"{dtype} product {1e3 * rate:.4g} GFLOP/s"
            for dtype, rate in ceilings["gemm_tflops"].items()
        ]
    dirty = ", changed" if stamp.get("dirty") else ""
    commit = f"commit {(stamp.get('commit') or 'unknown')[:10]}{dirty}, {stamp['utc'][:10]}"
    return "; ".join([*parts, commit]) + ".\n"


def _op_table(op: str, groups: dict[tuple[str, ...], list[Row]]) -> str:
    """Ours in ms, and everybody else as a multiple of it; bold where they are faster."""
    names: list[str] = []
    for group in groups.values():
        names += [n for n in map(name_of, group) if n not in names and n != OURS]
    unit = "ms" if any(r["malloc"] == "cuda" for g in groups.values() for r in g) else "CPU ms"
    head = [f"{op}", "dtype", "mode", f"{OURS}, {unit}", "of the roofline", *names]
    compiled = "compile", f"{OURS}_compile"
    if {*compiled} <= {*names}:
        head.append(f"compile / {OURS}_compile")
    lines = [_line(head), _line(["---"] * len(head))]
    for (_, case, dtype, mode), group in groups.items():
        by = {name_of(row): row for row in group}
        own = by.get(OURS)
        ours = own[metric(own)] if own and own["status"] == "ok" else None
        share = f"{100 * own['floor_ms'] / own['ms_p50']:.0f} %" if own and ours else ""
        cells = [_cell(by.get(name), ours) for name in names]
        if len(head) > 5 + len(names):
            theirs, own_compiled = map(by.get, compiled)
            good = own_compiled if own_compiled and own_compiled["status"] == "ok" else None
            cells.append(_cell(theirs, good[metric(good)]) if good else "")
        about = f"{ours:.4g}" if ours else (own["status"] if own else "")
        lines.append(_line([case, dtype, mode, about, share, *cells]))
    return "\n".join(lines) + "\n" + _vocoders(groups)


def _vocoders(groups: dict[tuple[str, ...], list[Row]]) -> str:
    """Seconds of all activations of a vocoder on 8 s of sound, if every stage was timed."""
    lines = []
    for name, config in BIGVGAN_CONFIGS.items():
        values = {
            key: group
            for key, group in groups.items()
            if key[0] == "snake" and key[1].startswith(f"bigvgan_{name} ") and key[3] == VALUE
        }
        for dtype in dict.fromkeys(key[2] for key in values):
            stages = [group for key, group in values.items() if key[2] == dtype]
            if len(stages) != len(config.rates):
                continue
            stages.sort(key=lambda group: -group[0]["length"])
            times: dict[str, list[float]] = {}
            for row in (row for group in stages for row in group if row["status"] == "ok"):
                threads = 1 if row["malloc"] == "cuda" else row["threads"]
                times.setdefault(name_of(row), []).append(row[metric(row)] / 1e3 / threads)
            totals = [
                f"{provider} {ACTIVATIONS * sum(each) + each[0]:.3g} s"
                for provider, each in times.items()
                if len(each) == len(stages)
            ]
            lines.append(
                f"\nAll activations of BigVGAN-{name} on 8 s of sound, {dtype}: "
                f"{', '.join(totals)} (on a CPU, CPU seconds over threads).\n"
            )
    return "".join(lines)


def _cell(row: Row | None, ours: float | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    time = row[metric(row)]
    if not ours:
        return f"{time:.4g} ms"
    ratio = f"{time / ours:.2f}x"
    return f"**{ratio}**" if time / ours < 0.995 and not row["provider"].startswith(OURS) else ratio


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reasons(groups: dict[tuple[str, ...], list[Row]]) -> str:
    """Who could not run what, and why; the same reason once."""
    why: dict[tuple[str, str, str], list[str]] = {}
    for (_, case, dtype, mode), group in groups.items():
        for row in group:
            if row["status"] != "ok":
                key = (name_of(row), row["status"], row["reason"])
                why.setdefault(key, []).append(f"{case} {dtype} {mode}")
    lines = []
    for (name, status, reason), where in why.items():
        at = where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"
        lines.append(f"* {name}, {status} ({at}): {reason}")
    return "\n".join(lines) + ("\n" if lines else "")


def _checks(folder: Path) -> str:
    path = folder / "check.jsonl"
    if not path.exists():
        return ""
    rows = Rows(path).rows
    wrong = [row for row in rows if not row["ok"]]
    lines = [f"{len(rows) - len(wrong)} of {len(rows)} results are right on this device.\n"]
    lines += [f"* wrong: {r['op']} {r['case']} {r['dtype']} {r['kind']}\n" for r in wrong]
    return "".join(lines)


def write_steps(folder: Path) -> list[Path]:
    """Write steps.md, if training steps were timed; return its path."""
    text, path = _steps(folder), folder / "steps.md"
    if not text:
        return []
    path.write_text(text)
    return [path]


def _steps(folder: Path) -> str:
    path = folder / "train_step.jsonl"
    if not path.exists():
        return ""
    head = ["training step", "batch", "latents", "ratio", "provider", "ms", "x flow", "peak MiB"]
    rows = [row for row in read(path) if row["what"] == "timed"]
    eager = any("eager_ms" in row for row in rows)
    head += ["issued by Python, ms"] if eager else []
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        about = [str(row[k]) for k in ("network", "batch", "length", "ratio", "provider")]
        cells = [f"{row['ms_p50']:.4g}" if "ms_p50" in row else ""]
        if row["status"] != "ok":
            cells[0] = f"{row['status']}: {row['reason']}"
        cells += [_figure(row.get("over_flow"), ".3f"), _figure(row.get("peak_mib"), ".0f")]
        cells += [_figure(row.get("eager_ms"), ".4g")] if eager else []
        lines.append(_line(about + cells))
    return "\n".join(lines) + "\n"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _generation(folder: Path) -> list[Row]:
    path = folder / "generate.jsonl"
    return Rows(path, bench_generate.KEY).rows if path.exists() else []


def generation(folder: Path) -> list[Row]:
    """Timed rows of generate.jsonl, with the fields that rows of ops have."""
    return [
        row
        | {
            "op": "generate",
            "case": f"{row['what']} {row['network']} B={row['batch']}",
            "mode": VALUE,
            "malloc": "cuda" if row["device"] == "cuda" else "default",
        }
        for row in _generation(folder)
        if row["what"] in ("latents", "waveform")
    ]


def write_generation(folder: Path) -> list[Path]:
    """Write generate.md, if generation was timed; return its path."""
    rows = _generation(folder)
    timed = [row for row in rows if row["what"] in ("latents", "waveform")]
    if not rows:
        return []
    names = list(dict.fromkeys(row["provider"] for row in timed if row["provider"] != OURS))
    head = ["8 s of sound", "network", "batch", f"{OURS}, ms", "clips/s", *names]
    lines = [_line(head), _line(["---"] * len(head))]
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in timed:
        key = (row["what"], row["network"], row["batch"])
        groups.setdefault(key, {})[row["provider"]] = row
    for (what, network, batch), by in groups.items():
        own = by.get(OURS)
        ours = own["ms_p50"] if own and own["status"] == "ok" else None
        cells = [_ratio(by.get(name), ours) for name in names]
        about = [f"{ours:.4g}", f"{own['clips_per_s']:.4g}"] if own and ours else ["", ""]
        lines.append(_line([what, network, str(batch), *about, *cells]))
    text = "\n".join(lines) + "\n"
    for row in (row for row in rows if row["status"] == "ok" and row not in timed):
        text += f"\n{_once(row)}\n"
    path = folder / "generate.md"
    path.write_text(text)
    return [path]


def _ratio(row: Row | None, ours: float | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    return f"{row['ms_p50'] / ours:.2f}x" if ours else f"{row['ms_p50']:.4g} ms"


def _once(row: Row) -> str:
    """A sentence for what has no peers."""
    if row["what"] == "launches":
        counts = ", ".join(f"{name} {count}" for name, count in row["launches"].items())
        return f"Kernels that one guided step of {row['network']} launches on a GPU: {counts}."
    parts = ", ".join(
        f"{name.removesuffix('_s')} {value:.3g} s"
        for name, value in row.items()
        if name.endswith("_s") and isinstance(value, float)
    )
    if row["what"] == "end_to_end":
        return f"{row['seconds']:g} s video with {row['network']}, end to end: {parts}."
    return f"A new process to its first {bench_generate.SECONDS} s of sound: {parts}."


def _fill_documents(folder: Path, tables: list[Path]) -> list[Path]:
    """Put the tables between the marks that name them."""
    changed = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = before = path.read_text()
        for table in tables:
            if not table.resolve().is_relative_to(ROOT):
                continue
            mark = f"<!-- {table.resolve().relative_to(ROOT)} -->\n"
            pattern = re.escape(mark) + r".*?(?=<!-- end -->)"
            whole = (mark + table.read_text()).replace("\\", r"\\")
            text = re.sub(pattern, whole, text, flags=re.DOTALL)
        if text != before:
            path.write_text(text)
            changed.append(path)
    return changed
