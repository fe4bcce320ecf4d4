"""The HTTP API and the page, over one pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import math
import mimetypes
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mfmjt.encoders import MMAudioEncoders
from mfmjt.errors import InputError
from mfmjt.pipeline import Pipeline
from mfmjt.serve.engine import Engine
from mfmjt.serve.examples import EXAMPLES, Examples
from mfmjt.serve.jobs import Job, Jobs, Run
from mfmjt.serve.metrics import Metrics
from mfmjt.serve.reader import Reader
from mfmjt.serve.schema import (
    Container,
    Fault,
    Health,
    JobState,
    Model,
    Models,
    Sound,
    asked_schema,
)
from mfmjt.serve.settings import MAX_COUNT, MAX_STEPS, Settings
from mfmjt.serve.shield import HEAD, Shield
from mfmjt.serve.upload import read_request

__all__ = ["create_app"]

T = TypeVar("T")
PAGE = Path(__file__).with_name("page")
_CONTAINERS: tuple[Container, ...] = get_args(Container)
_TYPES = {
    "wav": "audio/wav",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "mkv": "video/x-matroska",
}
_SWEEP = 5.0  # seconds between two looks for what has expired

JobName = Annotated[str, PathParameter(max_length=64, description="Id of a job.")]
Number = Annotated[int, PathParameter(ge=0, le=3 * MAX_COUNT, description="Number of a sound.")]


class Service:
    """One run: the pipeline, its thread, the jobs and their folders.

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
        encoders = pipeline.encoders
        self.reader = Reader(
            settings.workers,
            settings.read_seconds,
            settings.memory,
            {
                "rates": (encoders.video_fps, encoders.sync_fps),
                "size": encoders.frame_size,
                "mmaudio": isinstance(encoders, MMAudioEncoders),
            },
        )
        self.engine = Engine(pipeline, settings.batch, asyncio.get_running_loop(), self._worked)
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
        self._pace = 1.0  # seconds a job takes, lately

    async def start(self) -> None:
        """Start the thread and the clean-up."""
        self.engine.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """End all work and remove all files."""
        self._sweeper.cancel()
        await asyncio.to_thread(self.engine.close)
        self.jobs.close()
        await asyncio.to_thread(self.run.close)

    async def accept(self, request: Request) -> Job:
        """A job for a request, once its upload is read.

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
            found: dict[str, Any] | None = None
            if has_video:
                reading = self.reader.read(folder, asked.duration, self.settings.max_duration)
                try:
                    found = await _unless_gone(request, reading)
                except InputError as error:
                    raise HTTPException(422, f"video: {error}") from error
            job = self.jobs.enter(folder, asked.model_dump(), found)
        job.timings = {"receive": received - begin}
        if found is not None:
            job.timings["video"] = time.perf_counter() - received
        self.engine.submit(job)
        return job

    def state(self, job: Job) -> JobState:
        """What is told of a job."""
        held = () if job.video is None else job.video["containers"]
        return JobState(
            id=job.id,
            status=job.status,
            stage=job.stage,
            progress=job.progress,
            ahead=0 if job.status != "queued" else self.jobs.ahead(job),
            error=job.error,
            video=job.video is not None,
            containers=[kind for kind in _CONTAINERS if f".{kind}" in held],
            sounds=[Sound(**sound) for sound in job.sounds],
            timings=job.timings,
            notes=job.notes,
        )

    def left(self, job: Job) -> None:
        """Drop a job whose last listener went away, unless one comes back in time."""

        def drop() -> None:
            if job.listeners == 0:
                self.jobs.cancel(job, "Nobody followed the job any more.")

        if job.listeners == 0 and not job.over:
            asyncio.get_running_loop().call_later(self.settings.grace, drop)

    def _worked(self, jobs: list[Job], seconds: float) -> None:
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
    """The result of `work`, which is cancelled when the client goes away before."""

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


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _job(request: Request, name: str) -> Job:
    job = _service(request).jobs.get(name)
    if job is None:
        raise HTTPException(404, "There is no such job; results are kept for a while only.")
    return job


def _faults(**reasons: str) -> dict[int | str, dict[str, Any]]:
    return {
        int(code.removeprefix("_")): {"model": Fault, "description": reason}
        for code, reason in reasons.items()
    }


_EVENT = {
    "type": "object",
    "properties": {
        "event": {"const": "state"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/JobState"},
        },
    },
    "required": ["event", "data"],
}
_COMMON = _faults(
    _401="The token is missing or wrong.",
    _403="The request comes from another origin's page.",
    _421="The Host header names another server.",
)
_NO_JOB = _faults(_404="There is no such job.", _422="A parameter is not what it should be.")
router = APIRouter(responses=_COMMON)


@router.post(
    "/v1/generate",
    status_code=202,
    response_model=JobState,
    responses={
        202: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **_faults(
            _400="The body cannot be read.",
            _408="The body stopped coming.",
            _413="The body is too large.",
            _415="The content type is neither a form nor JSON.",
            _422="The request or its video cannot be used.",
        ),
        429: {
            "model": Fault,
            "description": "The queue is full.",
            "headers": {"Retry-After": {"schema": {"type": "integer"}}},
        },
    },
)
async def generate(request: Request, response: Response) -> JobState:
    """Make sound for a video (form) or for a prompt alone (JSON); answers with a job."""
    service = _service(request)
    status = 202
    try:
        job = await service.accept(request)
    except HTTPException as error:
        status = error.status_code
        raise
    except ClientDisconnect as error:
        status = 499
        raise HTTPException(499, "The client went away.") from error
    finally:
        service.metrics.requests.labels(str(status)).inc()
    response.headers["Location"] = f"{service.settings.root}/v1/jobs/{job.id}"
    return service.state(job)


@router.get("/v1/jobs/{job}", response_model=JobState, responses=_NO_JOB)
async def job_state(request: Request, job: JobName) -> JobState:
    """How far a job is, and what it made."""
    return _service(request).state(_job(request, job))


@router.delete("/v1/jobs/{job}", status_code=204, responses=_NO_JOB)
async def remove_job(request: Request, job: JobName) -> None:
    """End a job and remove its files."""
    _service(request).jobs.remove(_job(request, job))


@router.get(
    "/v1/jobs/{job}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The job's state after each change, until it is over. A job whose last "
            "stream is closed before that is dropped.",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **_NO_JOB,
    },
)
async def job_events(request: Request, job: JobName) -> StreamingResponse:
    """Follow a job: server-sent events, each the state as JSON."""
    service, found = _service(request), _job(request, job)

    async def events() -> AsyncIterator[str]:
        if request.scope[HEAD]:
            return  # nobody listens
        found.listeners += 1
        told = ""
        try:
            async for _ in found.changes():
                if await request.is_disconnected():
                    return
                state = service.state(found).model_dump_json()
                # A comment keeps what is between from closing a silent connection.
                yield f"event: state\ndata: {state}\n\n" if state != told else ":\n\n"
                told = state
        finally:
            found.listeners -= 1
            service.left(found)

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


@router.get(
    "/v1/jobs/{job}/sounds/{number}.{kind}",
    response_class=Response,
    responses={
        200: {
            "content": {
                "application/json": {"schema": {"type": "object"}},
                **{name: {"schema": {"type": "string"}} for name in _TYPES.values()},
            }
        },
        **_NO_JOB,
        **_faults(_409="The job is not done, or the container cannot hold its video."),
    },
)
async def sound(
    request: Request, job: JobName, number: Number, kind: Literal["wav", Container, "json"]
) -> Response:
    """Return a sound as a file, alone (wav) or under its video, or numbers to draw (json)."""
    service, found = _service(request), _job(request, job)
    if found.status != "done":
        raise HTTPException(409, f"The job is {found.status}: there is no sound yet.")
    if number >= len(found.sounds):
        raise HTTPException(404, f"The job has {len(found.sounds)} sounds, counted from 0.")
    path = found.folder / f"{number}.{kind}"
    if kind in _CONTAINERS:
        if found.video is None:
            raise HTTPException(404, "The job has no video. Take the .wav.")
        async with found.muxing:
            if not path.exists():
                try:
                    notes = await service.reader.mux(found.folder, f"{number}.wav", path.name)
                except InputError as error:
                    raise HTTPException(409, str(error)) from error
                found.notes += [note for note in notes if note not in found.notes]
    if kind == "json":
        return Response(path.read_bytes(), media_type="application/json")
    name = f"mfmjt-{found.sounds[number]['seed']}-{number}.{kind}"
    return FileResponse(path, media_type=_TYPES[kind], filename=name)


@router.get("/healthz", response_model=Health)
async def health(request: Request) -> Health:
    """That the server works."""
    return Health(status="ok", busy=_service(request).jobs.busy)


@router.get("/v1/models", response_model=Models)
async def models(request: Request) -> Models:
    """The model, its defaults, and the limits of requests."""
    return Models(models=[_service(request).model])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(
        _service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def create_app(pipeline: Pipeline, name: str, settings: Settings) -> FastAPI:
    """The application that a server such as uvicorn runs.

    Args:
        pipeline: Makes the sounds; nobody else may use it meanwhile.
        name: What the model is called.
        settings: Limits and addresses.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(pipeline, name, settings)
        await service.start()
        app.state.service = service
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="mfmjt",
        version="1",
        description="Sound for video and text.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(router)
    _add_page(app, settings.root)
    _add_faults(app)
    app.add_middleware(Shield, settings=settings)
    published = app.openapi

    def openapi() -> dict[str, Any]:
        schema = published()
        schema["paths"]["/v1/generate"]["post"]["requestBody"] = {
            "required": True,
            "content": {
                kind: {"schema": asked_schema(settings, video, form)}
                for kind, video, form in (
                    ("application/json", False, False),
                    ("application/x-www-form-urlencoded", False, True),
                    ("multipart/form-data", True, True),
                )
            },
        }
        if settings.token is not None:
            schema["components"]["securitySchemes"] = {
                "token": {"type": "http", "scheme": "bearer"}
            }
            schema["security"] = [{"token": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_page(app: FastAPI, root: str) -> None:
    """Return the page's files, read once: no path of a request is ever opened.

    Their addresses are relative, so that the page works under any path. Where its own path is shown
    without a slash at the end they would lead elsewhere: `root` stands before them for that.
    """
    files = {
        path.name: (path.read_bytes(), mimetypes.guess_type(path.name)[0] or "text/plain")
        for path in PAGE.iterdir()
        if path.is_file()
    }
    if root:
        content, kind = files["index.html"]
        files["index.html"] = content.replace(b'="page/', f'="{root}/page/'.encode()), kind

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return page(name)

    @app.get("/examples/{name}.mp4", include_in_schema=False)
    async def example(request: Request, name: str) -> Response:
        if name not in EXAMPLES:
            raise HTTPException(404, "There is no such example.")
        path = await asyncio.to_thread(_service(request).examples.path, name)
        return FileResponse(path, media_type="video/mp4")

    def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "There is no such page.")
        content, kind = files[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _add_faults(app: FastAPI) -> None:
    """Every error is a `Fault`."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misspelt(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": f"{place}: {first['msg']}."}, 422)
