"""Figures of the evaluation, as small SVG files. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.metrics import METRICS, Metric
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.evaluate.report import Report
from mfmjt.plotting import COLORS, figure, plot_spectrograms

__all__ = ["GALLERY", "plot_gallery", "plot_steps"]

GALLERY = (0, 4, 7, 10)  # in a set that begins with the first class: wood, drum, pendulum, bell


def plot_steps(
    reports: Sequence[Report],
    path: str | os.PathLike[str],
    metrics: Sequence[Metric] = METRICS,
) -> None:
    """Draw figures against steps, a line per network and a panel per figure that has a bound.

    Dashed lines are what real audio gets; bands are 95 % intervals.

    Args:
        reports: Of several networks and numbers of steps.
        path: SVG file to write.
        metrics: Those whose figures are drawn.

    Raises:
        InputError: No reports, or matplotlib is missing.
    """
    if not reports:
        raise InputError("There are no reports to plot. Run the evaluation first.")
    held = {key for r in reports for key, value in r.figures.items() if value is not None}
    panels = [f for m in metrics for f in m.figures if f.title and f.real and f.key in held]
    names = list(dict.fromkeys(report.model for report in reports))
    ticks = sorted({report.steps for report in reports})
    with figure(path, (2.6 * len(panels) + 0.4, 3.2)) as drawn:
        axes = drawn.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            key, title, real = panel.key, panel.title, panel.real
            for name, color in zip(names, COLORS, strict=False):
                rows = [r for r in reports if r.model == name and r.figures.get(key) is not None]
                rows.sort(key=lambda report: report.steps)
                steps = [row.steps for row in rows]
                axis.plot(steps, [r.figures[key] for r in rows], "o-", color=color, label=name)
                if rows and all(key in row.interval for row in rows):
                    low, high = zip(*(row.interval[key] for row in rows), strict=True)
                    axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            bound = reports[0].figures.get(real) if isinstance(real, str) else real
            if bound is not None:
                axis.axhline(bound, color="black", linestyle="--", linewidth=1, label="real audio")
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel("steps")
            axis.set_title(title)
            axis.set_ylim(0, 1.05 * axis.dataLim.ymax)
            axis.grid(visible=True, alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def plot_gallery(examples: Examples, generated: Tensor, path: str | os.PathLike[str]) -> None:
    """Draw real and generated sound of up to four examples that sound unlike each other.

    Events are marked above the spectrograms, and onsets detected in each below.

    Args:
        examples: What the sound was generated for.
        generated: Waveforms (n, S), in their order.
        path: SVG file to write.

    Raises:
        InputError: matplotlib is missing.
    """
    labels = examples.classes or examples.captions
    rows, times = [], []
    for i in (i for i in GALLERY if i < len(examples)):
        pair = (examples.audio[i], generated[i])
        events = np.empty(0) if examples.events is None else examples.events[i]
        detected = pair if len(events) else ()
        rows.append((labels[i].replace("_", " "), pair))
        times.append((events, [detect_onsets(wave, examples.sample_rate) for wave in detected]))
    # Coarse: the eye does not miss what the size of the file does.
    look = {"hop": 0.04, "bands": 48, "step": 4.0}
    plot_spectrograms(path, rows, ("real", "generated"), examples.sample_rate, times, **look)
