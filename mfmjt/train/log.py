"""What a training writes down: `log.jsonl`, and TensorBoard where it is installed and wanted."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mfmjt.errors import RunError
from mfmjt.files import atomic_path

__all__ = ["TrainingLog"]


class TrainingLog:
    """`log.jsonl`, and TensorBoard where it is installed and wanted.

    Records after the step a run resumes from are dropped, so that the file is one curve.

    Args:
        out: Folder of both.
        step: Steps done before.
        tensorboard: Write TensorBoard files.
        first: Whether this process writes at all.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool, first: bool = True) -> None:
        path = out / "log.jsonl" if first else Path(os.devnull)
        if first:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            # A killed run may have cut its last line short.
            whole = [line for line in lines if step and line.endswith("\n")]
            with self._written(path), atomic_path(path) as temporary:
                temporary.write_text("".join(x for x in whole if json.loads(x)["step"] <= step))
        self.path = path
        self.file = path.open("ab", buffering=0)  # a record is in the file when it is written
        self.board: Any = None
        if tensorboard and first:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
            except ImportError:
                pass
        self._reset()
        self.recent = math.nan

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.clips, self.since = 0, time.monotonic()

    def note(self, record: dict[str, Any]) -> None:
        """Write a record as it is.

        Raises:
            RunError: The disk is full.
        """
        with self._written(self.path):
            self.file.write(f"{json.dumps(record)}\n".encode())

    @staticmethod
    @contextmanager
    def _written(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Cannot write {path}: {error.strerror}. Make room, and the same command goes on "
                "from the last state."
            ) from error

    def collect(self, figures: dict[str, float], rows: int, good: bool) -> None:
        """Take up a step's figures; those of skipped steps would spoil the means."""
        self.clips += rows
        for key, value in figures.items() if good else ():
            if not math.isnan(value):  # an error of which the batch had no rows
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.counts[key] = self.counts.get(key, 0) + 1
        if good:
            loss = figures["loss"]
            self.recent = loss if math.isnan(self.recent) else self.recent * 0.95 + 0.05 * loss

    def clips_per_s(self) -> float:
        """Clips trained a second since the last record."""
        return self.clips / max(1e-9, time.monotonic() - self.since)

    def flush(self, step: int, lr: float, skipped: int, seconds: float) -> None:
        """Write the means since the last record."""
        values = {k: v / self.counts[k] for k, v in self.sums.items()}
        values |= {"lr": lr, "skipped": skipped}
        values |= {"clips_per_s": round(self.clips_per_s(), 2), "seconds": round(seconds, 2)}
        self.scalars("train", step, values)
        self._reset()

    def scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one record of figures."""
        self.note({"step": step, "kind": kind} | values)
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)

    def audio(self, name: str, step: int, waveform: Tensor, rate: int) -> None:
        """Hand a waveform (S,) to TensorBoard."""
        if self.board is not None:
            self.board.add_audio(name, waveform[None].clamp(-1, 1), step, rate)
