"""A progress display that needs nothing: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress", "duration"]

PLAIN_INTERVAL_S = 15.0
BAR_INTERVAL_S = 0.1


def duration(seconds: float) -> str:
    """Write `seconds` as `1:02:03` or `2:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Show how far a long job is, what it measures, and when it ends; use as a context manager.

    Args:
        title: What is being done, a word or two.
        total: Number of units (steps, clips) that finish the job.
        start: Units already done before, by an earlier run; they do not count in the rate.
        unit: Name of one unit in the plural.
        quiet: Show nothing: another process does.
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        unit: str = "steps",
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet
        self.title, self.total, self.start, self.unit = title, total, start, unit
        self.done = start
        self.began = self.shown = time.monotonic()
        self.note = ""
        self.fraction: float | None = None
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self.quiet:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TaskProgressColumn, TextColumn
                from rich.progress import Progress as RichProgress
            except ImportError:
                return self
            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=self.total, completed=self.start, note=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show(self.note)
        if self.bar is not None:
            self.bar.stop()

    def due(self) -> bool:
        """Whether the display would change now; ask before computing anything dear for `update`."""
        interval = BAR_INTERVAL_S if self.bar is not None else PLAIN_INTERVAL_S
        return time.monotonic() - self.shown >= interval

    def update(self, done: int, note: str = "", fraction: float | None = None) -> None:
        """Move to `done` units; `note` stands beside the bar, such as `loss 0.71`.

        Args:
            done: Units done so far, those before this run included.
            note: What to print beside the bar.
            fraction: Share of the whole job, where units alone do not say it (a time budget).
        """
        self.done, self.note, self.fraction = done, note, fraction
        if self.due():
            self._show(note)

    def message(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            sys.stderr.write(f"{text}\n")

    def _show(self, note: str) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.began
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        share = self.done / max(1, self.total)
        if self.fraction is not None and self.fraction > share > 0:
            left *= (1 - self.fraction) / max(1e-9, 1 - share) * share / self.fraction
            share = self.fraction
        eta = duration(left) if left != float("inf") else "-"
        text = f"{note + ' ' if note else ''}{rate:.3g} {self.unit}/s, {eta} left"
        if self.bar is not None:
            completed = share * self.total
            self.bar.update(self.task, completed=completed, note=f"{self.done}/{self.total} {text}")
        elif not self.quiet:
            sys.stderr.write(f"{self.title} {self.done}/{self.total} ({share:.0%}) {text}\n")
            sys.stderr.flush()
