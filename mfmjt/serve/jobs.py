"""Jobs and their folders, and when they are removed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mfmjt.serve.settings import Settings

__all__ = ["ENDED", "Job", "Jobs", "Run"]

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
_PREFIX = "mfmjt-serve-"
_LOCK = "lock"


class Run:
    """The folder of one run of the server, removed at its end.

    A lock marks it as in use. Folders of runs that could not remove them, as after a loss of power,
    are removed by the next run.
    """

    def __init__(self, parent: Path | None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@dataclass
class Job:
    """One request on its way; changed by the event loop's thread only.

    Attributes:
        id: Name that cannot be guessed.
        folder: Its files.
        asked: Fields of the request (`schema.Asked`).
        video: What the sandbox found in the upload, None without one.
        status: Queued, running, or how it ended.
        stage: Current stage.
        progress: Share of the stage that is done, 0 to 1.
        error: Why it failed.
        sounds: One entry for each sound (`schema.Sound`).
        timings: Seconds of each stage.
        notes: What was odd about the input.
        cancelled: Set when nobody wants the result any more.
        listeners: Streams of events that are open.
    """

    id: str
    folder: Path
    asked: dict[str, Any]
    video: dict[str, Any] | None
    status: Status = "queued"
    stage: str = "wait"
    progress: float = 0.0
    error: str | None = None
    sounds: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    queued: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    listeners: int = 0
    muxing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        """Return whether it has ended."""
        return self.status in ENDED

    def tell(self, **changes: Any) -> None:
        """Change attributes and wake listeners; an ended job stays as it is."""
        if self.over:
            return
        for name, value in changes.items():
            setattr(self, name, value)
        if self.over:
            self.ended = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[None]:
        """Yield at once, then after each change, until the job is over; silence yields too."""
        while True:
            changed = self._changed
            yield
            if self.over:
                return
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), 10.0)


class Jobs:
    """All jobs of a run: a bounded number of them, each for a bounded time."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._jobs: dict[str, Job] = {}
        self._entering = 0

    @property
    def busy(self) -> int:
        """Number of requests that are being read, waiting or running."""
        return self._entering + sum(not job.over for job in self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, name: str) -> Job | None:
        """Return the job of this id, None if there is none any more."""
        self.expire()
        return self._jobs.get(name)

    @contextlib.asynccontextmanager
    async def entering(self) -> AsyncIterator[Path]:
        """Yield a folder for a request that is being read; removed unless `enter` takes it."""
        self.expire()
        self._entering += 1
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self._run.folder))
        try:
            yield folder
        finally:
            self._entering -= 1
            if not any(job.folder == folder for job in self._jobs.values()):
                shutil.rmtree(folder, ignore_errors=True)

    def enter(self, folder: Path, asked: dict[str, Any], video: dict[str, Any] | None) -> Job:
        """Make a job of a request that was read."""
        job = Job(secrets.token_urlsafe(16), folder, asked, video)
        self._jobs[job.id] = job
        return job

    def ahead(self, job: Job) -> int:
        """Count the jobs that came before it and have not ended."""
        before = (other for other in self._jobs.values() if other.queued < job.queued)
        return sum(not other.over for other in before)

    def remove(self, job: Job) -> None:
        """Remove a job and its files; if it is running, it ends at its next step."""
        job.cancelled.set()
        job.tell(status="cancelled", error="The job was removed.")
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)

    def cancel(self, job: Job, why: str) -> None:
        """End a job that nobody waits for; its state can still be requested."""
        if not job.over:
            job.cancelled.set()
            job.tell(status="cancelled", error=why)
            shutil.rmtree(job.folder, ignore_errors=True)

    def expire(self) -> None:
        """Remove jobs that ended too long ago, and the oldest where there are too many."""
        now = time.monotonic()
        finished = [job for job in self._jobs.values() if job.ended is not None]
        finished.sort(key=lambda job: job.ended or 0.0)
        excess = len(finished) - self._settings.kept
        for place, job in enumerate(finished):
            if place < excess or now - (job.ended or now) > self._settings.keep:
                self.remove(job)

    def close(self) -> None:
        """Remove all jobs."""
        for job in list(self._jobs.values()):
            self.remove(job)
