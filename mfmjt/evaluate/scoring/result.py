"""What `mfmjt score` found: as JSON, and as a table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mfmjt.errors import short
from mfmjt.evaluate.metrics import PUBLISHED, Figure, Metric
from mfmjt.evaluate.scoring.pairing import Problem, Protocol
from mfmjt.files import atomic_path

__all__ = ["Result"]


@dataclass
class Result:
    """Every figure of one set of generated sounds, and what it was made of.

    Attributes:
        protocol: `default` or `av-benchmark`.
        clips: Pairs of a generated and a real sound.
        seconds: Judged of each clip, from its beginning.
        figures: Numbers by key.
        interval: 95 % intervals of some of them, over clips.
        per_class: Class -> number of its clips, and the mean of some figures over them.
        per_clip: Id of a clip -> its length in seconds (`seconds`), and its own figures.
        left_out: Metric -> why it was not computed.
        problems: Items that are not scored.
        notes: One line each on what was done that one might not expect.
        files: Id of a clip -> generated and real file; "" for features out of a cache.
        weights: Network -> file, digest, license, and in what it differs from the published one.
        environment: What the figures were made with.
        own: Metrics beside those that are published, for the table.
    """

    protocol: Protocol
    clips: int
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    per_clip: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    own: tuple[Metric, ...] = ()

    def to_json(self) -> str:
        """Return one JSON object."""
        values = asdict(replace(self, own=()))
        del values["own"]
        values["problems"] = [problem._asdict() for problem in self.problems]
        return json.dumps(values, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON object to a file.

        Raises:
            RunError: The folder cannot be written.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json() + "\n")

    def columns(self) -> list[Figure]:
        """Return the figures of the table that were computed, in its order."""
        metrics = (*PUBLISHED, *self.own)
        return [f for m in metrics for f in m.figures if f.title and f.key in self.figures]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return name, value, interval, value of real sound and direction of each figure."""
        rows = []
        for figure in self.columns():
            real = self.figures.get(figure.real) if isinstance(figure.real, str) else figure.real
            low_high = self.interval.get(figure.key)
            rows.append(
                (
                    figure.title,
                    f"{self.figures[figure.key]:.{figure.digits}f}",
                    ""
                    if low_high is None
                    else " to ".join(f"{e:.{figure.digits}f}" for e in low_high),
                    "" if real is None else f"{real:.{figure.digits}f}",
                    figure.better,
                )
            )
        return rows

    def summary(self) -> list[str]:
        """Return what was scored, what was not and why, a line each."""
        lines = [
            f"{self.clips:,} pairs of clips, {self.seconds:g} s of each, protocol {self.protocol}."
        ]
        sides: dict[tuple[str, str], list[str]] = {}
        for side, name, why in self.problems:
            sides.setdefault((side, why), []).append(name)
        for (side, why), names in sides.items():
            shown = ", ".join(short(name, 40) for name in names[:3])
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            lines.append(f"Not scored, {side} ({len(names):,}): {shown}{more}: {why}.")
        lines += self.notes
        reasons: dict[str, list[str]] = {}
        for metric, why in self.left_out.items():
            reasons.setdefault(why, []).append(metric)
        lines += [f"Left out, {', '.join(m)}: {why}" for why, m in reasons.items()]
        return lines

    def table(self) -> str:
        """Return a Markdown table, a row per figure."""
        head = [
            "| metric | generated | 95 % interval | real | better |",
            "|---|---|---|---|---|",
        ]
        return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in self.rows())]) + "\n"
