"""State of a running server: the pipeline, its thread, the jobs and their folders."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar, get_args

from fastapi import Request
from starlette.exceptions import HTTPException

from mfmjt.errors import InputError
from mfmjt.pipeline import Pipeline
from mfmjt.serve.body import read_request
from mfmjt.serve.examples import Examples
from mfmjt.serve.jobs import Job, Jobs, Run
from mfmjt.serve.metrics import Metrics
from mfmjt.serve.sandbox import Sandbox
from mfmjt.serve.schema import Container, JobState, Model, Sound
from mfmjt.serve.settings import MAX_COUNT, MAX_STEPS, Settings
from mfmjt.serve.worker import Worker, asked_for

__all__ = ["Service"]

T = TypeVar("T")
_SWEEP = 5.0  # seconds between two looks for what has expired


class Service:
    """One run of a server; `accept` takes a request from its body to the queue.

    Args:
        pipeline: Makes the sounds.
        name: What the model is called.
        settings: Limits.
    """

    def __init__(self, pipeline: Pipeline, name: str, settings: Settings) -> None:
        self.settings = settings
        self.run = Run(settings.folder)
        self.jobs = Jobs(settings, self.run)
        self.metrics = Metrics(lambda: self.jobs.busy, lambda: len(self.jobs))
        self.examples = Examples(self.run.folder)
        self.sandbox = Sandbox(
            settings.workers,
            settings.read_seconds,
            settings.memory,
            pipeline.encoders.frame_specs,
        )
        self.worker = Worker(pipeline, settings.batch, asyncio.get_running_loop(), self._count)
        self.model = Model(
            name=name,
            device=str(pipeline.device),
            sample_rate=pipeline.codec.sample_rate,
            steps=pipeline.sampling.steps,
            guidance=pipeline.sampling.guidance,
            guidance_mode=pipeline.sampling.mode,
            max_duration=settings.max_duration,
            max_upload=settings.max_upload,
            max_count=MAX_COUNT,
            max_steps=MAX_STEPS,
        )
        self._own = pipeline.sampling
        self._pace = 1.0  # seconds a job takes, lately

    async def start(self) -> None:
        """Start the thread and the clean-up."""
        self.worker.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """End all work and remove all files."""
        self._sweeper.cancel()
        await asyncio.to_thread(self.worker.close)
        self.jobs.close()
        await asyncio.to_thread(self.run.close)

    async def accept(self, request: Request) -> Job:
        """Read a request and its upload, and queue a job for it.

        Raises:
            HTTPException: It cannot be taken.
        """
        if self.jobs.busy >= self.settings.queue:
            wait = max(1, math.ceil(self.settings.queue * self._pace / 2))
            raise HTTPException(
                429,
                f"{self.jobs.busy} requests are waiting. Come again in {wait} s.",
                {"Retry-After": str(wait)},
            )
        begin = time.perf_counter()
        async with self.jobs.entering() as folder:
            asked, has_video = await read_request(request, folder, self.settings)
            received = time.perf_counter()
            try:
                replace(asked_for(asked.model_dump()), video=has_video or None).samplings(self._own)
            except InputError as error:
                raise HTTPException(422, str(error)) from error
            found: dict[str, Any] | None = None
            if has_video:
                reading = self.sandbox.read(folder, asked.duration, self.settings.max_duration)
                try:
                    found = await _unless_gone(request, reading)
                except InputError as error:
                    raise HTTPException(422, f"video: {error}") from error
            job = self.jobs.enter(folder, asked.model_dump(), found)
        job.timings = {"receive": received - begin}
        if found is not None:
            job.timings["video"] = time.perf_counter() - received
        self.worker.submit(job)
        return job

    def state(self, job: Job) -> JobState:
        """Return a job as the API shows it."""
        held = () if job.video is None else job.video["containers"]
        return JobState(
            id=job.id,
            status=job.status,
            stage=job.stage,
            progress=job.progress,
            ahead=0 if job.status != "queued" else self.jobs.ahead(job),
            error=job.error,
            video=job.video is not None,
            containers=[kind for kind in get_args(Container) if f".{kind}" in held],
            sounds=[Sound(**sound) for sound in job.sounds],
            timings=job.timings,
            notes=job.notes,
        )

    def drop_unless_followed(self, job: Job) -> None:
        """Cancel a job whose last listener went away, unless one comes back in time."""

        def drop() -> None:
            if job.listeners == 0:
                self.jobs.cancel(job, "Nobody followed the job any more.")

        if job.listeners == 0 and not job.over:
            asyncio.get_running_loop().call_later(self.settings.grace, drop)

    def _count(self, jobs: list[Job], seconds: float) -> None:
        self.metrics.batch.observe(len(jobs))
        self._pace += 0.3 * (seconds / max(1, len(jobs)) - self._pace)
        for job in jobs:
            self.metrics.jobs.labels(job.status).inc()
            self.metrics.sounds.inc(sum(sound["duration"] for sound in job.sounds))
            for stage, spent in job.timings.items():
                self.metrics.stages.labels(stage).observe(spent)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            self.jobs.expire()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which is cancelled if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise HTTPException(499, "The client went away.")
        return await doing
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)
