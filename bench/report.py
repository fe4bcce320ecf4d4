"""Make plots and tables of a folder of results, and put the tables into the documents.

Writes into DIR: `table.md` (the cases to look at first), `details.md` (everything, with the reasons
of what could not run), a plot for each op, and one of attention against its length where that was
timed; where generation was timed, `generate.md` and a plot of it against the model's size and the
batch; where training steps were, `steps.md`. A time's distance above the diagonal of an op's plot
is its distance from the roofline, the larger of bytes over the copy bandwidth and FLOPs over the
matrix product's rate, both measured in the same run. A folder of modelled costs gets `costs.md`
alone. Documents that name one of these tables between `<!-- DIR/table.md -->` and `<!-- end -->`
get the new one. Needs pandas, and matplotlib for plots.

Examples:
  python -m bench report bench/results/zen4_2_cores
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas
from pandas import DataFrame, MultiIndex

from bench import ROOT, parser
from bench.cost.page import write_costs
from bench.plots import plot_generation, plot_ops
from bench.providers import OURS
from bench.rows import Row, name_of, read
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS
from mfmjt.errors import InputError
from mfmjt.testing import VALUE

__all__ = ["CASE", "frame", "generation", "load", "main", "write_tables"]

CASE = ["op", "case", "dtype", "mode"]
TIMED = ("latents", "waveform")
ACTIVATIONS = 18
"""Of each stage of BigVGAN: three residual blocks of six. One more follows the last stage."""


def main(argv: list[str] | None = None) -> int:
    """Run `python -m bench report`; return the exit status."""
    command = parser("report", __doc__)
    command.add_argument("dir", type=Path, help="folder of results")
    command.add_argument("--no-plots", action="store_true", help="tables only: no matplotlib")
    given = command.parse_args(argv)
    folder = given.dir
    if any(folder.glob("cost_*.csv")):  # modelled: no rows, no plots
        costs = [write_costs(folder)]
        print(*costs, *_fill_documents(costs), sep="\n")
        return 0
    ops, generated = frame(load(folder)), frame(generation(folder))
    tables = write_tables(folder, ops)
    for name, text in (("generate", _generated(folder, generated)), ("steps", _steps(folder))):
        if text:
            tables.append(folder / f"{name}.md")
            tables[-1].write_text(text)
    written = [*tables, *_fill_documents(tables)]
    if not given.no_plots:
        written += [*plot_ops(folder, ops), *plot_generation(folder, generated)]
    for path in written:
        print(path)
    return 0


def load(folder: Path) -> list[Row]:
    """Return the rows of a folder's kernels.jsonl, which a short run on a GPU may lack.

    Raises:
        InputError: Nothing was timed.
    """
    timed = ("kernels.jsonl", "generate.jsonl", "train_step.jsonl")
    if not any((folder / name).exists() for name in timed):
        raise InputError(
            f"{folder} has no kernels.jsonl: nothing was timed into it. Run `python -m bench ops "
            f"--out {folder}` or `python -m bench gpu --out {folder}`."
        )
    return read(folder / "kernels.jsonl")


def generation(folder: Path) -> list[Row]:
    """Return the timed rows of generate.jsonl, with the fields that rows of ops have."""
    return [
        row
        | {
            "op": "generate",
            "case": f"{row['what']} {row['network']} B={row['batch']}",
            "mode": VALUE,
            "malloc": "cuda" if row["device"] == "cuda" else "default",
        }
        for row in read(folder / "generate.jsonl")
        if row["what"] in TIMED
    ]


def frame(rows: list[Row]) -> DataFrame:
    """Return one row for each provider of a case, cases in the order in which they came.

    Columns beside those of the rows: `name`, the provider and its allocator; `time`, what it is
    judged by, a CPU's time or a GPU's, in ms; and `noise`, half the distance of the 20th and the
    80th percentile over the median.
    """
    columns = [*CASE, "provider", "malloc", "status", "reason", "headline", "model", "batch"]
    columns += ["length", "threads", "floor_ms", "what", "network", "clips_per_s"]
    columns += [f"{clock}_{p}" for clock in ("ms", "cpu_ms") for p in ("p20", "p50", "p80")]
    table = DataFrame(rows, columns=columns)
    table["name"] = [name_of(row) for row in rows]
    cuda = table["malloc"] == "cuda"
    p20, p50, p80 = (
        table[f"ms_{p}"].where(cuda, table[f"cpu_ms_{p}"]) for p in ("p20", "p50", "p80")
    )
    table["time"], table["noise"] = p50, (p80 - p20) / 2 / p50
    table = table.drop_duplicates([*CASE, "name"], keep="last")
    order = table.groupby(CASE, sort=False).ngroup()
    return table.iloc[order.argsort(kind="stable")]


def write_tables(folder: Path, table: DataFrame) -> list[Path]:
    """Write table.md and details.md of the ops; return their paths."""
    path = folder / "environment.json"
    about = _environment(json.loads(path.read_text())) if path.exists() else ""
    short, long = [about], [about, _checks(folder), _steps(folder)]
    # Older rows say by being compiled that they are of the first to look at.
    first = table["headline"].where(
        table["headline"].notna(), table["provider"].str[:7] == "compile"
    )
    first = first.groupby([table[key] for key in CASE]).transform("any")
    for op, every in table.groupby("op"):
        if first[every.index].any():
            short.append(_op_table(str(op), every[first[every.index]]))
        long.append(f"## {op}\n\n{_op_table(str(op), every)}\n{_reasons(every)}")
    paths = [folder / "table.md", folder / "details.md"]
    for path, parts in zip(paths, (short, long), strict=True):
        path.write_text("\n".join(part for part in parts if part))
    return paths


def _markdown(table: DataFrame) -> str:
    lines = [[*table.columns], ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _environment(stamp: Row) -> str:
    machine = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    parts = [machine, f"torch {stamp['torch']}"]
    if stamp.get("gpu"):
        parts += [f"CUDA {stamp['cuda']}", f"driver {stamp['driver']}", f"Triton {stamp['triton']}"]
    if ceilings := stamp.get("ceilings"):
        parts.append(f"copy {ceilings['copy_gbps']:.4g} GB/s")
        parts += [
            f"{dtype} product {1e3 * rate:.4g} GFLOP/s"
            for dtype, rate in ceilings["gemm_tflops"].items()
        ]
    dirty = ", changed" if stamp.get("dirty") else ""
    commit = f"commit {(stamp.get('commit') or 'unknown')[:10]}{dirty}, {stamp['utc'][:10]}"
    return "; ".join([*parts, commit]) + ".\n"


def _pivot(table: DataFrame, rows: list[str], base: str) -> DataFrame:
    """Return what everybody took as a multiple of `base`, or why not, one column for each name."""
    own = table[(table["name"] == base) & (table["status"] == "ok")].set_index(rows)["time"]
    table = table.join(own.rename("base"), on=rows)
    table["cell"] = list(map(_cell, *(table[k] for k in ("status", "time", "base", "provider"))))
    names = [name for name in table["name"].unique() if name != base]
    cells = table.pivot(index=rows, columns="name", values="cell")
    return cells.reindex(index=MultiIndex.from_frame(table[rows].drop_duplicates()), columns=names)


def _cell(status: str, time: float, base: float, provider: str) -> str:
    """Return one cell; bold where somebody is faster than we are."""
    if status != "ok":
        return status
    if pandas.isna(base):
        return f"{time:.4g} ms"
    ratio = f"{time / base:.2f}x"
    return f"**{ratio}**" if time / base < 0.995 and not provider.startswith(OURS) else ratio


def _op_table(op: str, table: DataFrame) -> str:
    """Return ours in ms, and everybody else as a multiple of it."""
    others = _pivot(table, CASE, OURS)
    own = table[table["name"] == OURS].set_index(CASE).reindex(others.index)
    good = own["status"] == "ok"
    unit = "ms" if (table["malloc"] == "cuda").any() else "CPU ms"
    of_roofline = (100 * own["floor_ms"] / own["ms_p50"]).map("{:.0f} %".format)
    columns = {
        f"{OURS}, {unit}": own["time"].map("{:.4g}".format).where(good, own["status"]),
        "of the roofline": of_roofline.where(good, ""),
        **others,
    }
    compiled = f"{OURS}_compile"
    if {"compile", compiled} <= {*others}:
        ratio = _pivot(table[table["name"].isin(["compile", compiled])], CASE, compiled)["compile"]
        known = (table["name"] == compiled) & (table["status"] == "ok")
        columns[f"compile / {compiled}"] = ratio[
            ratio.index.isin(table[known].set_index(CASE).index)
        ]
    text = DataFrame(columns, index=others.index).fillna("").reset_index().drop(columns="op")
    return _markdown(text.rename(columns={"case": op})) + _vocoders(table)


def _vocoders(table: DataFrame) -> str:
    """Return seconds of all activations of a vocoder on 8 s of sound, if every stage was timed."""
    lines = []
    table = table[(table["op"] == "snake") & (table["mode"] == VALUE)]
    seconds = table["time"] / 1e3 / table["threads"].where(table["malloc"] != "cuda", 1)
    table = table.assign(seconds=seconds, vocoder=table["case"].str.extract("bigvgan_(.*) ")[0])
    for (vocoder, dtype), every in table.groupby(["vocoder", "dtype"], sort=False):
        stages = len(BIGVGAN_CONFIGS[str(vocoder)].rates)
        if every["case"].nunique() != stages:
            continue
        longest_first = every[every["status"] == "ok"].sort_values(
            "length", ascending=False, kind="stable"
        )
        of_all = longest_first.groupby("name", sort=False)["seconds"].agg(["sum", "first", "size"])
        of_all = of_all[of_all["size"] == stages]
        totals = (ACTIVATIONS * of_all["sum"] + of_all["first"]).map("{:.3g} s".format)
        lines.append(
            f"\nAll activations of BigVGAN-{vocoder} on 8 s of sound, {dtype}: "
            f"{', '.join(totals.index + ' ' + totals)} (on a CPU, CPU seconds over threads).\n"
        )
    return "".join(lines)


def _reasons(table: DataFrame) -> str:
    """Return who could not run what, and why; the same reason once."""
    lines = []
    bad = table[table["status"] != "ok"].groupby(["name", "status", "reason"], sort=False)
    for (name, status, reason), where in bad:
        at = " ".join(where.iloc[0][CASE[1:]])
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines.append(f"* {name}, {status} ({at}{more}): {reason}\n")
    return "".join(lines)


def _checks(folder: Path) -> str:
    rows = read(folder / "check.jsonl")
    wrong = [row for row in rows if not row["ok"]]
    lines = [f"{len(rows) - len(wrong)} of {len(rows)} results are right on this device.\n"]
    lines += [f"* wrong: {r['op']} {r['case']} {r['dtype']} {r['kind']}\n" for r in wrong]
    return "".join(lines) if rows else ""


def _steps(folder: Path) -> str:
    """Return the table of training steps; empty if none were timed."""
    heads = {"network": "training step", "batch": "batch", "length": "latents", "ratio": "ratio"}
    heads |= {"provider": "provider", "ms_p50": "ms", "over_flow": "x flow"}
    heads |= {"peak_mib": "peak MiB", "eager_ms": "issued by Python, ms"}
    rows = [row for row in read(folder / "train_step.jsonl") if row["what"] == "timed"]
    table = DataFrame(rows, columns=[*heads, "status", "reason"]).astype(object)
    forms = {"ms_p50": "{:.4g}", "over_flow": "{:.3f}", "peak_mib": "{:.0f}", "eager_ms": "{:.4g}"}
    for field, form in forms.items():
        table[field] = table[field].map(form.format, na_action="ignore")
    why = table["status"] + ": " + table["reason"].astype(str)
    table["ms_p50"] = table["ms_p50"].where(table["status"] == "ok", why)
    if table["eager_ms"].isna().all():
        del heads["eager_ms"]
    return _markdown(table[[*heads]].fillna("").rename(columns=heads)) if rows else ""


def _generated(folder: Path, table: DataFrame) -> str:
    """Return the table of generation, and a sentence for each figure that has no peers."""
    rows = read(folder / "generate.jsonl")
    if not rows:
        return ""
    what = ["what", "network", "batch"]
    # What somebody waits for, not the CPU's time
    table = table.assign(time=table["ms_p50"]).drop_duplicates([*what, "name"], keep="last")
    others = _pivot(table, what, OURS).replace(r"\*", "", regex=True)
    own = table[(table["name"] == OURS) & (table["status"] == "ok")].set_index(what)
    columns = {
        f"{OURS}, ms": own["time"].map("{:.4g}".format),
        "clips/s": own["clips_per_s"].map("{:.4g}".format),
        **others,
    }
    text = DataFrame(columns, index=others.index).fillna("").reset_index()
    once = [row for row in rows if row["status"] == "ok" and row["what"] not in TIMED]
    lines = [_markdown(text.rename(columns={"what": "8 s of sound"})), *map(_once, once)]
    return "\n".join(lines)


def _once(row: Row) -> str:
    """Return a sentence for what has no peers."""
    if row["what"] == "launches":
        counts = ", ".join(f"{name} {count}" for name, count in row["launches"].items())
        return f"Kernels that one guided step of {row['network']} launches on a GPU: {counts}.\n"
    seconds = {k[:-2]: v for k, v in row.items() if k.endswith("_s") and isinstance(v, float)}
    parts = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    if row["what"] == "end_to_end":
        return f"{row['seconds']:g} s video with {row['network']}, end to end: {parts}.\n"
    return f"A new process to its first 8 s of sound: {parts}.\n"


def _fill_documents(tables: list[Path]) -> list[Path]:
    """Put the tables between the marks that name them; return the documents that changed."""
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
