"""The report on one network at one number of steps: as JSON, and as a row of a table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mfmjt.devices import cpu_name
from mfmjt.errors import InputError
from mfmjt.evaluate.metrics import METRICS, Figure, Metric
from mfmjt.files import atomic_path

__all__ = ["Report", "environment", "read_reports", "table", "write_report"]


@dataclass
class Report:
    """Every figure of one network at one number of steps.

    Attributes:
        model: Name of the network.
        clips: Number of examples.
        split: They are from.
        seed: Chose the examples and the noise.
        steps, guidance, mode, instantaneous: How it was sampled; see `Sampling`.
        conditions: `both`, `video` or `text`.
        figures: Numbers of the metrics by key; None for those not asked for or not applicable.
        interval: 95 % bootstrap intervals of some of them, over examples.
        per_class: Class -> number of its examples, and some figures of them alone.
        seconds_per_clip: Wall time by stage.
        environment: What the figures were made with.
    """

    model: str
    clips: int
    split: str
    seed: int
    steps: int
    guidance: float
    mode: str
    conditions: str
    instantaneous: bool
    figures: dict[str, float | None] = field(default_factory=dict)
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_per_clip: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return the report as one flat dictionary, with the figures among the rest."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("figures"), **fields}

    def to_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(self.values(), allow_nan=False)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what figures are made with; the commit only in a checkout."""
    stamp: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            stamp["commit"] = found.stdout.strip()
    return stamp


def table(reports: Sequence[Report], metrics: Sequence[Metric] = METRICS) -> str:
    """Markdown table: a row per report, then the real audio and the codec as the bounds.

    Args:
        reports: Its rows.
        metrics: Those whose figures are its columns.
    """
    columns = [figure for metric in metrics for figure in metric.figures if figure.title]
    lines = [
        "| network | steps | " + " | ".join(c.title for c in columns) + " | s per clip |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for report in reports:
        seconds = sum(report.seconds_per_clip.get(stage, 0.0) for stage in ("generate", "decode"))
        cells = [_with_interval(report, column) for column in columns]
        lines.append(f"| {report.model} | {report.steps} | {' | '.join(cells)} | {seconds:.3f} |")
    if reports:
        lines.append(_bound("real audio", [_number(reports[0], c, c.real) for c in columns]))
    for report in reports:
        cells = [_number(report, c, c.codec) for c in columns]
        if any(cells):
            lines.append(_bound("codec alone (onsets against the original's, ±20 ms)", cells))
            break
    return "\n".join(lines) + "\n"


def _number(report: Report, column: Figure, key: str | float) -> str:
    value = report.figures.get(key) if isinstance(key, str) else key
    return "" if value is None else f"{value:.{column.digits}f}"


def _with_interval(report: Report, column: Figure) -> str:
    text = _number(report, column, column.key)
    if column.key in report.interval:
        low, high = report.interval[column.key]
        text += f" ({low:.{column.digits}f} to {high:.{column.digits}f})"
    return text


def _bound(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | |" + "".join(f" {cell} |" if cell else " |" for cell in (*cells, ""))


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as indented JSON.

    Raises:
        RunError: The folder cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report.values(), indent=1) + "\n")


def read_reports(folder: str | os.PathLike[str]) -> list[Report]:
    """Read the reports that `suite` wrote, by network and steps.

    Raises:
        InputError: There are none.
    """
    names = {field.name for field in dataclasses.fields(Report)}
    reports = []
    for path in sorted(Path(folder).glob("evaluate_*.json")):
        values = json.loads(path.read_text())
        values["interval"] = {k: tuple(v) for k, v in values["interval"].items()}
        figures = {key: values.pop(key) for key in list(values) if key not in names}
        reports.append(Report(**values, figures=figures))
    if not reports:
        raise InputError(f"No evaluate_*.json in {folder}. Make them with the evaluation suite.")
    return sorted(reports, key=lambda report: (report.instantaneous, report.steps))
