"""Plots of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

from bench.providers import OURS, REFERENCE
from mfmjt.model import MFMJT
from mfmjt.plotting import figure
from mfmjt.testing import MODES

__all__ = ["plot_generation", "plot_ops"]


def plot_ops(folder: Path, table: DataFrame) -> list[Path]:
    """Draw every op against the roofline, and attention against its length; return the files."""
    good = table[table["status"] == "ok"]
    dtype = "bfloat16" if (good["malloc"] == "cuda").any() else "float32"
    good = good[good["dtype"] == dtype]
    paths = []
    for op, rows in good.groupby("op"):
        labels = (f"{op}, ", "roofline, ms", f"time of one call, ms ({dtype})")
        paths.append(_panels(folder / f"{op}.svg", rows, "floor_ms", labels, "none"))
    peers = good[(good["model"] == "peers") & good["case"].str.contains("d=64")]
    peers = peers[peers["length"] < 8192]
    if len(peers):
        labels = ("", "tokens", f"B=2, H=12, d=64: ms ({dtype})")
        paths.append(_panels(folder / "attention_length.svg", peers, "length", labels, "-"))
    return paths


def _panels(path: Path, rows: DataFrame, x: str, labels: tuple[str, str, str], line: str) -> Path:
    """Draw times and the roofline over `x`, a panel for each mode; return the file."""
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    names = sorted(rows["name"].unique(), key=lambda n: (n != OURS, n != REFERENCE, n))
    title, across, up = labels
    with figure(path, (3.4 * len(modes), 3.6)) as drawn:
        axes = drawn.subplots(1, len(modes), squeeze=False, sharex=True, sharey=True)[0]
        for axis, mode in zip(axes, modes, strict=True):
            here = rows[rows["mode"] == mode].sort_values(x)
            axis.plot(here[x], here["floor_ms"], "k--", linewidth=1, label="roofline")
            for i, name in enumerate(names):
                points, ours = here[here["name"] == name], name == OURS
                look = {"color": f"C{i % 10}", "marker": "os^vD<>PX*ph"[i % 12], "linestyle": line}
                look |= {"linewidth": 1 + ours, "markersize": 4 + ours, "zorder": 2 + ours}
                axis.plot(points[x], points["ms_p50"], label=name, **look)
            axis.set(xscale="log", yscale="log", title=title + mode, xlabel=across)
            axis.xaxis.set_minor_formatter("")  # digits of minor ticks would overlap
        axes[0].set_ylabel(up)
        _legend(drawn, axes)
    return path


def _legend(drawn: Any, axes: Any) -> None:
    """Draw one legend below all panels."""
    pairs = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes)
    handles = {label: handle for pair in pairs for handle, label in pair}
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)


def plot_generation(folder: Path, table: DataFrame) -> list[Path]:
    """Draw one clip's time by the network's size, and clips a second by the batch; return it."""
    good = table[(table["status"] == "ok") & (table["what"] == "latents")]
    if not len(good):
        return []
    path, names = folder / "generate.svg", sorted(good["name"].unique())
    with figure(path, (6.8, 3.6)) as drawn:
        one, many = axes = drawn.subplots(1, 2)
        for i, name in enumerate(sorted(names, key=lambda name: name != OURS)):
            look = {"color": f"C{i % 10}", "marker": "os^vD<>"[i % 7], "label": name}
            mine = good[good["name"] == name]
            single = mine[mine["batch"] == 1]
            sizes = single["network"].map(_parameters) / 1e6
            order = sizes.argsort()
            one.plot(sizes.iloc[order], single["ms_p50"].iloc[order], **look)
            for network, rows in mine.sort_values("batch").groupby("network"):
                if len(rows) > 1:
                    line = "-" if str(network).startswith("small") else ":"
                    many.plot(rows["batch"], rows["clips_per_s"], linestyle=line, **look)
        one.set(title="latents of one clip", xlabel="parameters, millions", ylabel="ms")
        many.set(title="many clips (dotted: nano)", xlabel="batch", ylabel="clips a second")
        for axis in axes:
            axis.set(xscale="log", yscale="log")
        _legend(drawn, axes)
    return [path]


def _parameters(network: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MFMJT.from_config(network).parameters())
