"""How far work is, on standard error: a bar on a terminal, elsewhere plain lines or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["Progress", "ProgressBar", "stage_bar"]

Progress = Callable[[str, float], None]
"""Called with a stage's name and how much of it is done, from 0 to 1."""
PLAIN_INTERVAL_S = 15.0
BAR_INTERVAL_S = 0.1


class ProgressBar:
    """Show how far a long job is, what it measures, and when it ends; use as a context manager.

    On a terminal it is a bar, elsewhere a line now and then.

    Args:
        title: What is being done, a word or two.
        total: Number of units (steps, clips) that finish the job.
        start: Units already done before, by an earlier run; they do not count in the rate.
        unit: Name of one unit in the plural.
        quiet: Show nothing: another process does.
    """

    def __init__(
        self, title: str, total: int, start: int = 0, unit: str = "steps", quiet: bool = False
    ) -> None:
        self.title, self.total, self.start, self.unit = title, total, start, unit
        self.quiet, self.done, self.note, self.fraction = quiet, start, "", 0.0
        self.began = self.shown = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> ProgressBar:
        self.bar = None if self.quiet else _rich_bar()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self.bar is not None:
            self.bar.stop()

    def due(self) -> bool:
        """Return whether `update` would change the display now; ask before computing its note."""
        interval = PLAIN_INTERVAL_S if self.bar is None else BAR_INTERVAL_S
        return time.monotonic() - self.shown >= interval

    def update(self, done: int, note: str = "", fraction: float = 0.0) -> None:
        """Move to `done` units.

        Args:
            done: Units done so far, those before this run included.
            note: What to print beside the bar, such as `loss 0.71`.
            fraction: Share of the whole job, where units alone do not say it (a time budget).
        """
        self.done, self.note, self.fraction = done, note, fraction
        if self.due():
            self._show()

    def message(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            sys.stderr.write(f"{text}\n")

    def _show(self) -> None:
        self.shown = time.monotonic()
        elapsed, new = self.shown - self.began, self.done - self.start
        share = max(self.done / max(1, self.total), self.fraction if self.done else 0.0)
        left = "-"
        if new > 0:
            so_far = elapsed * self.done / new  # s, earlier runs included
            left = str(timedelta(seconds=round(so_far * (1 / share - 1))))
        text = (
            f"{self.done}/{self.total} ({share:.0%}) {self.note + ' ' if self.note else ''}"
            f"{new / max(1e-9, elapsed):.3g} {self.unit}/s, {left} left"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=share * self.total, note=text)
        elif not self.quiet:
            sys.stderr.write(f"{self.title} {text}\n")
            sys.stderr.flush()


@contextmanager
def stage_bar(titles: Mapping[str, str] | None = None) -> Iterator[Progress]:
    """Show the stages of a call: a bar on a terminal, which vanishes at the end; else nothing.

    Args:
        titles: What the bar says at each stage, in order; None says the names of the stages.

    Yields:
        The `progress` of the call.
    """
    bar = _rich_bar(transient=True)
    if bar is None:
        yield lambda stage, fraction: None
        return
    titles = titles or {}
    order = list(titles)
    with bar:
        task = bar.add_task("", total=len(order) or 1, note="")

        def report(stage: str, fraction: float) -> None:
            before = order.index(stage) if order else 0
            bar.update(task, description=titles.get(stage, stage), completed=before + fraction)

        yield report


def _rich_bar(transient: bool = False) -> Any:
    """Return a bar of rich; None where standard error is no terminal, or rich is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=transient,
    )
