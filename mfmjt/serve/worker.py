"""One thread that makes the sounds of all jobs, those of one shape together."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mfmjt.errors import MfmjtError, RunError
from mfmjt.pipeline import Audio, Pipeline, Request, generate_together
from mfmjt.serve.drawing import drawing
from mfmjt.serve.jobs import Job
from mfmjt.serve.sandbox import FRAMES, load_frames

__all__ = ["Worker", "asked_for"]

_log = logging.getLogger("mfmjt.serve")


class _Unwanted(Exception):
    """Every job in the batch was cancelled."""


class Worker(threading.Thread):
    """Takes jobs in order and reports their progress to the event loop.

    Args:
        pipeline: Makes the sounds.
        max_sounds: Sounds in a batch at most.
        loop: Event loop whose thread owns the jobs.
        done: Called in that thread with the jobs of each batch and the seconds it took.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        max_sounds: int,
        loop: asyncio.AbstractEventLoop,
        done: Callable[[list[Job], float], None],
    ) -> None:
        super().__init__(name="mfmjt-worker", daemon=True)
        self._pipeline, self._max_sounds, self._loop, self._done = pipeline, max_sounds, loop, done
        self._waiting: collections.deque[Job] = collections.deque()
        self._condition = threading.Condition()
        self._closed = False
        self._working: list[Job] = []

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._condition:
            self._waiting.append(job)
            self._condition.notify()

    def close(self) -> None:
        """End the thread; running jobs are dropped at their next step."""
        with self._condition:
            self._closed = True
            for job in (*self._waiting, *self._working):
                job.cancelled.set()
            self._condition.notify()
        self.join()

    def run(self) -> None:
        """Work until `close`."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                self._working = jobs = self._next()
            if jobs:
                self._work(jobs)
            with self._condition:
                self._working = []

    def _next(self) -> list[Job]:
        """Take the first jobs of the queue, as many as make a batch."""
        jobs: list[Job] = []
        sounds = 0
        while self._waiting:
            job = self._waiting[0]
            size = job.asked["count"] * max(1, len(job.asked["guidance_mode"] or ()))
            if jobs and sounds + size > self._max_sounds:
                break
            self._waiting.popleft()
            if not job.cancelled.is_set():
                jobs.append(job)
                sounds += size
        return jobs

    def _work(self, jobs: list[Job]) -> None:
        begin = time.perf_counter()
        waited = {job.id: begin - job.queued for job in jobs}
        ready: list[tuple[Job, Request]] = []
        for job in jobs:
            try:
                ready.append((job, _request(job)))
            except RunError as error:
                self._tell(job, status="failed", error=str(error))

        def report(stage: str, fraction: float) -> None:
            if all(job.cancelled.is_set() for job, _ in ready):
                raise _Unwanted
            for job, _ in ready:
                self._tell(job, status="running", stage=stage, progress=fraction)

        try:
            report("encode", 0.0)
            answers = generate_together(
                self._pipeline, [request for _, request in ready], report, self._max_sounds
            )
            for (job, _), answer in zip(ready, answers, strict=True):
                if isinstance(answer, MfmjtError):
                    self._tell(job, status="failed", error=str(answer))
                elif not job.cancelled.is_set():
                    self._finish(job, answer, waited[job.id])
        except _Unwanted:
            return
        except Exception as error:
            _log.exception("A batch of %d jobs failed", len(ready))
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            for job, _ in ready:
                self._tell(job, status="failed", error=f"Making the sound failed ({reason}).")
        finally:
            self._call(self._done, jobs, time.perf_counter() - begin)

    def _finish(self, job: Job, made: list[Audio], waited: float) -> None:
        self._tell(job, stage="write", progress=0.0)
        begin = time.perf_counter()
        modes = job.asked["guidance_mode"] or [self._pipeline.sampling.mode]
        sounds: list[dict[str, Any]] = []
        try:
            for number, sound in enumerate(made):
                sound.save(job.folder / f"{number}.wav")
                drawn = drawing(sound.waveform[0], sound.sample_rate)
                (job.folder / f"{number}.json").write_text(json.dumps(drawn))
                sounds.append(
                    {
                        "number": number,
                        "seed": sound.seed,
                        "guidance_mode": modes[number // job.asked["count"]],
                        "duration": sound.duration,
                        "sample_rate": sound.sample_rate,
                        "onsets": len(drawn["onsets"]),
                    }
                )
        except (OSError, RunError) as error:
            self._tell(job, status="failed", error=f"The sound was not written: {error}")
            return
        finally:
            if job.cancelled.is_set():  # its folder was removed, perhaps while this wrote to it
                shutil.rmtree(job.folder, ignore_errors=True)
        for name in FRAMES:
            (job.folder / name).unlink(missing_ok=True)
        timings = {"wait": waited}
        for sound in {id(sound.timings): sound for sound in made}.values():
            for stage, seconds in sound.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        timings["write"] = time.perf_counter() - begin
        self._tell(
            job,
            status="done",
            stage="done",
            progress=1.0,
            sounds=sounds,
            timings=job.timings | timings,
            notes=[_plain(note, job.folder) for note in made[0].notes],
        )

    def _tell(self, job: Job, **changes: Any) -> None:
        self._call(lambda: job.tell(**changes))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _plain(note: str, folder: Path) -> str:
    return note.replace(f"{folder}/", "")


def _request(job: Job) -> Request:
    if job.video is None:
        return asked_for(job.asked)
    return replace(asked_for(job.asked), video=load_frames(job.folder, job.video), duration=None)


def asked_for(asked: dict[str, Any]) -> Request:
    """Return the pipeline's request for the fields of one that the server got, without a video."""
    modes = tuple(asked["guidance_mode"] or ())
    given = {name: value for name, value in asked.items() if name != "guidance_mode"}
    return Request(modes=modes, **given)
