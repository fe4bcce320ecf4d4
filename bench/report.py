"""Make plots and tables of a folder of results, and put the tables into the documents.

Writes into DIR: `table.md` (the cases to look at first), `details.md` (everything, with the reasons
of what could not run), a plot for each op, and one of attention against its length where that was
timed; where generation was timed, `generate.md` and a plot of it against the model's size and the
batch. A time's distance above the diagonal of an op's plot is its distance from the roofline, the
larger of bytes over the copy bandwidth and FLOPs over the matrix product's rate, both measured in
the same run. Documents that name one of these tables between `<!-- DIR/table.md -->` and
`<!-- end -->` get the new one.

Examples:
  python -m bench report bench/results/zen4_2_cores
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import MODES, VALUE
from bench.model import bench_generate
from bench.providers import OURS, REFERENCE
from bench.rows import Rows
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.errors import InputError
from mfmjt.model import MFMJT

__all__ = ["add_arguments", "generation", "metric", "name_of", "run", "write_tables"]

ROOT = Path(__file__).parent.parent
ACTIVATIONS = 18
"""Of each stage of BigVGAN: three residual blocks of six. One more follows the last stage."""

Row = dict[str, Any]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench report`."""
    command.add_argument("dir", type=Path, help="folder of results")
    command.add_argument("--no-plots", action="store_true", help="tables only: no matplotlib")


def run(given: argparse.Namespace) -> int:
    """Run `python -m bench report`; return the exit status."""
    rows = load(given.dir)
    tables = [*write_tables(given.dir, rows), *write_generation(given.dir)]
    changed = _fill_documents(given.dir, tables)
    plots = [] if given.no_plots else [*_plot(given.dir, rows), *_plot_generation(given.dir)]
    for path in (*tables, *changed, *plots):
        print(path)
    return 0


def load(folder: Path) -> list[Row]:
    """The rows of a folder's kernels.jsonl.

    Raises:
        InputError: There is none.
    """
    path = folder / "kernels.jsonl"
    if not path.exists():
        raise InputError(
            f"{folder} has no kernels.jsonl: nothing was timed into it. Run `python -m bench cpu "
            f"--out {folder}` or `python -m bench gpu --out {folder}`."
        )
    return Rows(path).rows


def name_of(row: Row) -> str:
    """A provider's name in a table, with its allocator where that is not the default."""
    raised = ", raised malloc" if row["malloc"] == "raised" else ""
    return f"{row['provider']}{raised}"


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
    long = [_environment(stamp), _checks(folder), _networks(folder)]
    long += [f"## {op}\n\n{_op_table(op, every[op])}\n{_reasons(every[op])}" for op in ops]
    paths = []
    for name, parts in (("table.md", short), ("details.md", long)):
        path = folder / name
        path.write_text("\n".join(part for part in parts if part))
        paths.append(path)
    return paths


def _is_headline(group: list[Row]) -> bool:
    """torch.compile was asked for there."""
    return any(row["provider"].startswith("compile") for row in group)


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


def _networks(folder: Path) -> str:
    path = folder / "train_step.jsonl"
    if not path.exists():
        return ""
    head = ["training step", "batch", "latents", "ratio", "provider", "ms", "x flow", "peak MiB"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in (row for row in Rows(path).rows if row["what"] == "timed"):
        about = [str(row[k]) for k in ("network", "batch", "length", "ratio", "provider")]
        if row["status"] == "ok":
            over, peak = row["over_flow"], row["peak_mib"]
            times = [
                f"{row['ms_p50']:.4g}",
                "" if over is None else f"{over:.3f}",
                "" if peak is None else f"{peak:.0f}",
            ]
        else:
            times = [f"{row['status']}: {row['reason']}", "", ""]
        lines.append(_line(about + times))
    return "\n".join(lines) + "\n"


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
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
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


# plots


def _plot(folder: Path, rows: list[Row]) -> list[Path]:
    good = [row for row in rows if row["status"] == "ok"]
    dtype = "bfloat16" if any(row["malloc"] == "cuda" for row in good) else "float32"
    good = [row for row in good if row["dtype"] == dtype]
    paths = []
    for op in sorted({row["op"] for row in good}):
        of_op = [row for row in good if row["op"] == op]
        modes = [mode for mode in MODES if any(row["mode"] == mode for row in of_op)]
        paths.append(_roofline(folder / f"{op}.svg", op, dtype, modes, of_op))
    peers = [row for row in good if row["model"] == "peers"]
    if peers:
        paths.append(_lengths(folder / "attention_length.svg", dtype, peers))
    return paths


def _figure(panels: int, shared: bool = True) -> tuple[Any, Any, list[Any]]:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "matplotlib is not installed: plots need it. Install mfmjt[plot], or give --no-plots."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text and nothing is random, so that the same results are the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})
    figure, axes = pyplot.subplots(
        1, panels, figsize=(3.4 * panels, 3.6), squeeze=False, sharex=shared, sharey=shared
    )
    return pyplot, figure, list(axes[0])


def _finish(pyplot: Any, figure: Any, axes: list[Any], path: Path) -> Path:
    handles, labels = axes[0].get_legend_handles_labels()
    for axis in axes[1:]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(
        handles, labels, loc="upper center", ncols=5, frameon=False, bbox_to_anchor=(0.5, 0.02)
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _draw(axis: Any, rows: list[Row], x: str, line: str) -> None:
    names = sorted({name_of(row) for row in rows}, key=lambda n: (n != OURS, n != REFERENCE, n))
    for index, name in enumerate(names):
        points = sorted((row[x], row["ms_p50"]) for row in rows if name_of(row) == name)
        style = {
            "marker": "os^vD<>PX*ph"[index % 12],
            "markersize": 5 if name == OURS else 4,
            "color": f"C{index % 10}",
            "linestyle": line,
            "linewidth": 2.0 if name == OURS else 1.0,
            "zorder": 3 if name == OURS else 2,
        }
        axis.plot(*zip(*points, strict=True), label=name, **style)


def _roofline(path: Path, op: str, dtype: str, modes: list[str], rows: list[Row]) -> Path:
    """Time against roofline time, a panel for each mode."""
    pyplot, figure, axes = _figure(len(modes))
    for axis, mode in zip(axes, modes, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        floors = sorted(row["floor_ms"] for row in here)
        axis.plot(
            [floors[0], floors[-1]],
            [floors[0], floors[-1]],
            color="black",
            linestyle="--",
            linewidth=1,
            label="roofline",
        )
        _draw(axis, here, "floor_ms", "none")
        axis.set(xscale="log", yscale="log", title=f"{op}, {mode}", xlabel="roofline, ms")
        axis.xaxis.set_minor_formatter("")  # digits of minor ticks would overlap
    axes[0].set_ylabel(f"time of one call, ms ({dtype})")
    return _finish(pyplot, figure, axes, path)


def _lengths(path: Path, dtype: str, rows: list[Row]) -> Path:
    """Attention against its length on the peers' shapes of 64 channels."""
    rows = [row for row in rows if "d=64" in row["case"] and row["length"] < 8192]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    pyplot, figure, axes = _figure(len(modes))
    for axis, mode in zip(axes, modes, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        floor = sorted({(row["length"], row["floor_ms"]) for row in here})
        axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", label="roofline")
        _draw(axis, here, "length", "-")
        axis.set(xscale="log", yscale="log", title=mode, xlabel="tokens")
    axes[0].set_ylabel(f"B=2, H=12, d=64: ms ({dtype})")
    return _finish(pyplot, figure, axes, path)


def _plot_generation(folder: Path) -> list[Path]:
    """Time of one clip against the network's size, and clips a second against the batch."""
    rows = [r for r in _generation(folder) if r["what"] == "latents" and r["status"] == "ok"]
    if not rows:
        return []
    sizes = {name: _parameters(name) for name in {row["network"] for row in rows}}
    pyplot, figure, axes = _figure(2, shared=False)
    names = sorted({row["provider"] for row in rows}, key=lambda name: (name != OURS, name))
    for index, name in enumerate(names):
        style = {"color": f"C{index % 10}", "marker": "os^vD<>"[index % 7], "label": name}
        single = [r for r in rows if r["provider"] == name and r["batch"] == 1]
        points = sorted((sizes[row["network"]] / 1e6, row["ms_p50"]) for row in single)
        axes[0].plot(*zip(*points, strict=True), **style) if points else None
        for network in sorted(sizes):
            of_network = [r for r in rows if r["provider"] == name and r["network"] == network]
            points = sorted((r["batch"], r["clips_per_s"]) for r in of_network)
            if len(points) > 1:
                line = "-" if network.startswith("small") else ":"
                axes[1].plot(*zip(*points, strict=True), **style | {"linestyle": line})
    axes[0].set(xscale="log", yscale="log", title="latents of one clip")
    axes[0].set(xlabel="parameters, millions", ylabel="ms")
    axes[1].set(xscale="log", yscale="log", title="many clips (dotted: nano)")
    axes[1].set(xlabel="batch", ylabel="clips a second")
    return [_finish(pyplot, figure, axes, folder / "generate.svg")]


def _parameters(network: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MFMJT.from_config(network).parameters())
