"""What a piece knows and may do: where its rows go, how long it has, and how it ends.

A piece may end in ways that it cannot report: the interpreter crashes, a kernel never returns, the
GPU's context is lost. So it leaves a note of what it is at before it tries it, and its parent makes
a row of the note. PyTorch is imported where a GPU is asked about only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import LOST, file_name
from bench.rows import Row, Rows, commit, failure
from mfmjt.files import atomic_path

if TYPE_CHECKING:
    import torch

__all__ = ["Job"]


@dataclass
class Job:
    """One piece of a run.

    Attributes:
        piece: Its name.
        out: Folder of the results, which is small.
        work: Folder of everything else.
        device: Where to compute: "cpu", "cuda" or "cuda:1".
        smoke: Everything tiny, to see that it runs.
        deadline: `time.monotonic()` at which to stop.
        stand_in: Nothing is computed, so that calls are of interest and times are not.
        facts: What the parent is told at the end.
    """

    piece: str
    out: Path
    work: Path
    device: str
    smoke: bool
    deadline: float
    stand_in: bool = False
    facts: Row = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Return whether a GPU computes."""
        return self.device.startswith("cuda")

    @property
    def torch_device(self) -> torch.device:
        """Return the device as PyTorch's."""
        import torch

        return torch.device(self.device)

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def rows(self, of: tuple[str, tuple[str, ...]]) -> Rows:
        """Return the rows of a file of results, to which all pieces append."""
        name, key = of
        return Rows(self.out / f"{name}.jsonl", key, {"commit": commit()})

    def has_time(self, rows: Rows, about: Row, seconds: float = 8.0) -> bool:
        """Return whether there are `seconds` left; else the facts say what was not reached."""
        if self.left() > seconds or self.smoke:
            return True
        self.facts["not_reached"] = self.facts.get("not_reached", 0) + 1
        self.facts.setdefault("first_not_reached", {k: about.get(k) for k in rows.key})
        return False

    @contextlib.contextmanager
    def trying(self, rows: Rows, about: Row) -> Iterator[None]:
        """Make a row of `about` if what is inside fails, or is this process's end.

        A GPU reports late. So the block ends with a wait for it, and nothing is blamed on what
        comes after. What leaves the process tainted, such as a failed capture, is its end too.
        """
        self.note(rows, about)
        try:
            yield
            self.synchronize()
        except Exception as error:
            reason = failure(error)
            traceback.print_exc()
            self.note(rows, {**about, "reason": reason})
            try:
                self.synchronize()
            except Exception as lost:  # whatever came next would be blamed
                self.leave(failure(lost))
            where = traceback.format_exc().splitlines()[-6:]
            if not rows.has(**about):
                rows.add({**about, "status": "failed", "reason": reason, "at": where})
            if getattr(error, "taints", False):
                self.note()
                self.leave(reason)
        self.note()

    def note(self, rows: Rows | None = None, about: Row | None = None) -> None:
        """Leave word of what is tried now, in the form of the row that it would be."""
        note: Row = {"facts": self.facts}
        if rows is not None:
            note |= {"file": rows.path.name, "row": {**(about or {}), **rows.about}}
        with atomic_path(self.work / f"{file_name(self.piece)}.note") as part:
            part.write_text(json.dumps(note))

    def synchronize(self) -> None:
        """Wait for the GPU.

        Raises:
            RuntimeError: It failed at something.
        """
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def free(self) -> None:
        """Hand back the memory of what is over."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()

    def leave(self, reason: str) -> None:
        """End the process at once; a new one goes on behind what the note names."""
        print(f"Leaving {self.piece}: {reason}", flush=True)
        os._exit(LOST)
