"""Figures of the evaluation, as small SVG files. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mfmjt.codec.mel import mel_power
from mfmjt.data import foley
from mfmjt.errors import InputError, reason
from mfmjt.evaluate.onsets import detect_onsets
from mfmjt.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mfmjt.evaluate.experiment import Examples, Report

__all__ = ["plot_gallery", "plot_learning_curves", "plot_steps"]

# Distinct for every kind of colour vision, and by lightness in print (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
GALLERY = (0, 4, 7, 10)  # in a set that begins with the first class: wood, drum, pendulum, bell
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # Text stays text: smaller files, and it can be searched and read aloud.
    "svg.fonttype": "none",
    "svg.hashsalt": "mfmjt",
}


@contextmanager
def _figure(
    path: str | os.PathLike[str], rows: int, columns: int, size: tuple[float, float]
) -> Iterator[tuple[Any, np.ndarray]]:
    """Axes (rows, columns) of a figure that is written to `path` at the end."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "Plots need matplotlib, which is not installed. Install mfmjt with its extra: "
            'pip install "mfmjt[plot]".'
        ) from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False)
        with atomic_path(path) as temporary:
            # Without a date, equal data give equal files.
            figure.savefig(temporary, format="svg", metadata={"Date": None}, dpi=100)


def plot_steps(reports: Sequence[Report], path: str | os.PathLike[str]) -> None:
    """Onset F1, class accuracy and Fréchet distance against steps, a line per network.

    Dashed lines are what real audio gets; the dotted one is F1 against another clip's events.

    Args:
        reports: Of several networks and numbers of steps.
        path: SVG file to write.

    Raises:
        InputError: No reports, or matplotlib is missing.
    """
    if not reports:
        raise InputError("There are no reports to plot. Run the evaluation first.")
    panels = (
        ("onset_f1", "onset F1 at ±50 ms", "onset_f1_real"),
        ("class_accuracy", "class accuracy", "class_accuracy_real"),
        ("frechet", "Fréchet distance (lower is better)", "frechet_real"),
    )
    names = list(dict.fromkeys(report.model for report in reports))
    with _figure(path, 1, len(panels), (9.6, 3.2)) as (figure, axes):
        for axis, (key, title, bound) in zip(axes[0], panels, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                rows = sorted((r for r in reports if r.model == name), key=lambda r: r.steps)
                steps = [r.steps for r in rows]
                axis.plot(steps, [getattr(r, key) for r in rows], "o-", color=colour, label=name)
                intervals = [r.interval[key] for r in rows if key in r.interval]
                if len(intervals) == len(rows):
                    low, high = zip(*intervals, strict=True)
                    axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            real = getattr(reports[0], bound)
            axis.axhline(real, color="black", linestyle="--", linewidth=1, label="real audio")
            if key == "onset_f1":
                chance = float(np.mean([r.onset_f1_shuffled for r in reports]))
                axis.axhline(chance, color="gray", linestyle=":", label="another clip's events")
            ticks = sorted({r.steps for r in reports})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel("steps")
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            if key != "frechet":
                axis.set_ylim(top=1.05)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _decibels(wave: Tensor) -> np.ndarray:
    """Log-mel spectrogram (bands, frames) in dB under its own maximum, not below -60.

    In steps of 4 dB and 40 ms, which the eye does not miss and the size of the file does.
    """
    power = mel_power(wave[None].float(), foley.SAMPLE_RATE, 1024, 640, 48)[0].T
    level = 10 * torch.log10(power / power.max().clamp(min=1e-10) + 1e-6)
    return (level / 4).round().mul(4).numpy()


def plot_gallery(
    clips: Examples,
    generated: Tensor,
    path: str | os.PathLike[str],
    rows: Sequence[int] | None = None,
) -> None:
    """Spectrograms of real and generated sound, with events above and detected onsets below.

    Args:
        clips: The examples that the sound was generated for.
        generated: Waveforms (n, S) in the order of the examples.
        path: SVG file to write.
        rows: Which of the examples to show; by default four that sound unlike each other.

    Raises:
        InputError: No such example, or matplotlib is missing.
    """
    if rows is None:
        rows = [row for row in GALLERY if row < len(clips)]
    if not rows or max(rows) >= len(clips) or min(rows) < 0:
        raise InputError(f"There are {len(clips)} clips, not {list(rows)}. Give other rows.")
    duration = clips.audio.shape[1] / foley.SAMPLE_RATE
    with _figure(path, len(rows), 2, (9.6, 1.5 * len(rows) + 0.8)) as (_, axes):
        for line, row in zip(axes, rows, strict=True):
            name = foley.CLASSES[int(clips.labels[row])].replace("_", " ")
            events = clips.events[row]
            for axis, wave, kind in (
                (line[0], clips.audio[row], "real"),
                (line[1], generated[row], "generated"),
            ):
                axis.imshow(
                    _decibels(wave),
                    origin="lower",
                    aspect="auto",
                    extent=(0, duration, 0, 1),
                    cmap="magma",
                    interpolation="none",
                    vmin=-60,
                    vmax=0,
                )
                if len(events):
                    _mark(axis, events, 1.05, "v", COLOURS[0])
                    _mark(axis, detect_onsets(wave), -0.05, "^", COLOURS[1])
                axis.set_yticks([])
                axis.grid(False)
                axis.set_title(f"{name}, {kind}", pad=7)
                axis.tick_params(labelbottom=False)
        for axis in axes[-1]:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("s   (▾ events in the video above, ▴ onsets detected below)")


def _mark(axis: Any, times: np.ndarray, height: float, marker: str, colour: str) -> None:
    if len(times):  # the extent of an empty line that is not clipped is infinite
        heights = np.full(len(times), height)
        axis.plot(times, heights, marker, color=colour, markersize=3, clip_on=False)


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no training log: {reason(error)}. Give a JSON lines file."
        ) from error
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def plot_learning_curves(
    logs: Mapping[str, str | os.PathLike[str]],
    path: str | os.PathLike[str],
    keys: Sequence[str] = ("loss",),
    smooth: float = 0.02,
) -> None:
    """Logged quantities against steps, a panel per quantity and a line per log.

    Args:
        logs: JSON lines files with a `step` in each line, by the name to give their line.
        path: SVG file to write.
        keys: Quantities to show; lines of a log without one are passed over.
        smooth: Width of the running mean, as a share of the log's length.

    Raises:
        InputError: An unreadable log, no log with a quantity, or matplotlib is missing.
    """
    series = {name: _read_log(Path(log)) for name, log in logs.items()}
    for key in keys:
        if not any(key in line for lines in series.values() for line in lines):
            raise InputError(f"No log holds {key!r}, so it cannot be plotted. Give another key.")
    with _figure(path, 1, len(keys), (3.6 * len(keys) + 1.0, 2.9)) as (_, axes):
        for axis, key in zip(axes[0], keys, strict=True):
            for (name, lines), colour in zip(series.items(), COLOURS, strict=False):
                rows = [(line["step"], line[key]) for line in lines if key in line]
                if not rows:
                    continue
                steps, values = np.array(rows, dtype=np.float64).T
                width = max(1, round(smooth * len(values)))
                kernel = np.full(width, 1 / width)
                # At most 400 points: more are not seen, and weigh.
                stride = max(1, len(values) // 400)
                mean = np.convolve(values, kernel, "valid")[::stride]
                axis.plot(steps[width - 1 :][::stride], mean, color=colour, label=name)
            axis.set_xlabel("step")
            axis.set_title(key.replace("_", " "))
        axes[0, 0].legend(fontsize=8)
