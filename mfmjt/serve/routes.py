"""The endpoints of the HTTP API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mfmjt.errors import InputError
from mfmjt.serve.guard import HEAD
from mfmjt.serve.jobs import Job
from mfmjt.serve.schema import Container, Fault, Health, JobState, Models
from mfmjt.serve.service import Service
from mfmjt.serve.settings import MAX_COUNT

__all__ = ["router"]

_TYPES = {
    "wav": "audio/wav",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "mkv": "video/x-matroska",
}

JobName = Annotated[str, PathParameter(max_length=64, description="Id of a job.")]
Number = Annotated[int, PathParameter(ge=0, le=3 * MAX_COUNT, description="Number of a sound.")]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _job(request: Request, name: str) -> Job:
    job = _service(request).jobs.get(name)
    if job is None:
        raise HTTPException(404, "There is no such job; results are kept for a while only.")
    return job


_FAULTS = {
    400: "The body cannot be read.",
    401: "The token is missing or wrong.",
    403: "The request comes from another origin's page.",
    404: "There is no such job.",
    408: "The body stopped coming.",
    409: "The job is not done, or the container cannot hold its video.",
    413: "The body is too large.",
    415: "The content type is neither a form nor JSON.",
    421: "The Host header names another server.",
    422: "The request, its video or a parameter cannot be used.",
    429: "The queue is full.",
}


def _faults(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses` of an endpoint for these statuses."""
    return {code: {"model": Fault, "description": _FAULTS[code]} for code in codes}


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
router = APIRouter(responses=_faults(401, 403, 421))


@router.post(
    "/v1/generate",
    status_code=202,
    responses={
        202: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **_faults(400, 408, 413, 415, 422),
        429: _faults(429)[429] | {"headers": {"Retry-After": {"schema": {"type": "integer"}}}},
    },
)
async def generate(request: Request, response: Response) -> JobState:
    """Make sound for a video (form) or for a prompt alone (JSON); the answer is a job."""
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


@router.get("/v1/jobs/{job}", responses=_faults(404, 422))
async def job_state(request: Request, job: JobName) -> JobState:
    """Return how far a job is, and what it made."""
    return _service(request).state(_job(request, job))


@router.delete("/v1/jobs/{job}", status_code=204, responses=_faults(404, 422))
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
        **_faults(404, 422),
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
            service.drop_unless_followed(found)

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
        **_faults(404, 409, 422),
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
    if kind in get_args(Container):
        if found.video is None:
            raise HTTPException(404, "The job has no video. Take the .wav.")
        async with found.muxing:
            if not path.exists():
                try:
                    notes = await service.sandbox.mux(found.folder, f"{number}.wav", path.name)
                except InputError as error:
                    raise HTTPException(409, str(error)) from error
                found.notes += [note for note in notes if note not in found.notes]
    if kind == "json":
        return Response(path.read_bytes(), media_type="application/json")
    name = f"mfmjt-{found.sounds[number]['seed']}-{number}.{kind}"
    return FileResponse(path, media_type=_TYPES[kind], filename=name)


@router.get("/healthz")
async def health(request: Request) -> Health:
    """Return whether the server works, and how busy it is."""
    return Health(status="ok", busy=_service(request).jobs.busy)


@router.get("/v1/models")
async def models(request: Request) -> Models:
    """Return the model, its defaults, and the limits of requests."""
    return Models(models=[_service(request).model])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Return metrics for Prometheus."""
    return Response(
        _service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
