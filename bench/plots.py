"""Plots of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.providers import OURS, REFERENCE
from bench.rows import Row, name_of
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.testing import MODES

__all__ = ["plot_generation", "plot_ops"]


def plot_ops(folder: Path, rows: list[Row]) -> list[Path]:
    """Draw every op against the roofline, and attention against its length; return the files."""
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


def plot_generation(folder: Path, rows: list[Row]) -> list[Path]:
    """Draw one clip's time by the network's size, and clips a second by the batch; return it."""
    rows = [r for r in rows if r["what"] == "latents" and r["status"] == "ok"]
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
