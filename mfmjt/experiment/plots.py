"""Plots of rows: a panel for each measure, a line for each value of a key, bands of intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfmjt.experiment.base import Row
from mfmjt.experiment.measures import MEASURES, cell, value
from mfmjt.plotting import COLORS, figure

__all__ = ["lines"]


def lines(
    path: Path,
    rows: Sequence[Row],
    x: str,
    by: str,
    label: str,
    where: Mapping[str, Any] | None = None,
    keys: Sequence[str] = ("onset_f1", "class_accuracy", "cosine", "inception", "frechet"),
    log: bool = False,
) -> None:
    """Draw figures against `x`, with the intervals over seeds and clips as bands.

    Args:
        path: SVG file to write.
        rows: Of all cells.
        x: Key of the horizontal axis; rows without it are left out.
        by: Key that has one value for each line.
        label: Of the horizontal axis.
        where: Values that the rows must have.
        keys: Measures, a panel each.
        log: Whether the axis is logarithmic.
    """
    rows = [r for r in rows if x in r and all(r[k] == v for k, v in (where or {}).items())]
    measures = [m for m in MEASURES if m.key in keys]
    names = list(dict.fromkeys(row[by] for row in rows))
    ticks = sorted({row[x] for row in rows})
    with figure(path, (2.4 * len(measures) + 0.4, 3.2)) as drawn:
        axes = drawn.subplots(1, len(measures), squeeze=False)[0]
        for axis, measured in zip(axes, measures, strict=True):
            for i, name in enumerate(names):
                own = [row for row in rows if row[by] == name]
                at = sorted({row[x] for row in own})
                values = [value(cell(own, {x: place}), measured) for place in at]
                color, style = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else ":"
                axis.plot(at, [v.mean for v in values], f"o{style}", color=color, label=str(name))
                low, high = [v.low for v in values], [v.high for v in values]
                axis.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
            if log:
                axis.set_xscale("log")
                axis.set_xticks([], minor=True)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xlabel(label)
            axis.set_title(measured.title)
            axis.grid(visible=True, alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
