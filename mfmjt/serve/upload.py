"""Bodies of requests: bounded, and on disk before anything looks at them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mfmjt.serve.schema import Asked
from mfmjt.serve.settings import Settings

__all__ = ["UPLOAD", "read_request"]

UPLOAD = "upload"
_FIELDS = {"prompt", "steps", "guidance", "guidance_mode", "seed", "count", "duration"}
_TEXT = 64 * 1024  # bytes of JSON, and of a form beside its video
_BLOCK = 2**20


async def read_request(request: Request, folder: Path, settings: Settings) -> tuple[Asked, bool]:
    """What is asked, and whether there is a video, which is then the file `upload` in `folder`.

    Raises:
        HTTPException: The body is too large, too slow or not what it should be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        asked = _asked(await _json(request, settings))
        if not (asked.prompt and asked.prompt.strip()):
            raise HTTPException(422, "prompt: there is no video, so say what is to be heard.")
        return _bounded(asked, settings), False
    if kind != "multipart/form-data":
        raise HTTPException(
            415,
            f"The content type is {kind or 'missing'}. Send multipart/form-data with a video, or "
            "application/json with a prompt.",
        )
    body = _body(request, settings.max_upload + _TEXT, settings)
    # The parser keeps what is large in a file without a name, which cannot outlive it.
    parser = MultiPartParser(
        request.headers, body, max_files=1, max_fields=len(_FIELDS) + 2, max_part_size=_TEXT
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, UnicodeError, ValueError) as error:
        reason = str(getattr(error, "message", error)).rstrip(".") or type(error).__name__
        raise HTTPException(400, f"The form cannot be read: {reason}.") from error
    try:
        video = form.get("video")
        given: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name == "video":
                continue
            if name not in _FIELDS or not isinstance(value, str):
                raise HTTPException(422, f"{name[:40]}: there is no such field.")
            given.setdefault(name, []).append(value)
        asked = _asked({name: _number(name, values) for name, values in given.items()})
        if isinstance(video, UploadFile):
            await _keep(video, folder / UPLOAD)
        elif asked.prompt is None or not asked.prompt.strip() or video is not None:
            raise HTTPException(422, "video: the form has no file of this name.")
        return _bounded(asked, settings), isinstance(video, UploadFile)
    finally:
        await form.close()


async def _json(request: Request, settings: Settings) -> Any:
    body = bytearray()
    async for block in _body(request, _TEXT, settings):
        body += block
    try:
        return json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is no JSON: {str(error)[:100]}.") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


async def _body(request: Request, most: int, settings: Settings) -> AsyncGenerator[bytes, None]:
    """The body in blocks, until it is too large or its sender falls silent."""
    declared = request.headers.get("content-length", "")
    large = HTTPException(
        413,
        f"The request is larger than {most // 2**20} MB."
        if most >= 2**20
        else f"The request is larger than {most // 1024} kB.",
        # What the sender still has to say is not waited for.
        {"Connection": "close"},
    )
    if declared.isdigit() and int(declared) > most:
        raise large
    size = 0
    stream = request.stream().__aiter__()
    while True:
        try:
            block = await asyncio.wait_for(anext(stream), settings.body_seconds)
        except StopAsyncIteration:
            return
        except (TimeoutError, asyncio.TimeoutError):
            raise HTTPException(
                408,
                f"Nothing more of the request came for {settings.body_seconds:g} s.",
                {"Connection": "close"},
            ) from None
        size += len(block)
        if size > most:
            raise large
        yield block


def _asked(given: Any) -> Asked:
    try:
        asked = Asked.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"]) or "body"
        raise HTTPException(422, f"{place}: {first['msg']}.") from error
    modes = asked.guidance_mode or []
    if len(set(modes)) < len(modes):
        raise HTTPException(422, "guidance_mode: a way of guidance is there twice.")
    return asked


def _bounded(asked: Asked, settings: Settings) -> Asked:
    if asked.duration is not None and asked.duration > settings.max_duration:
        raise HTTPException(
            422,
            f"duration: this server makes at most {settings.max_duration:g} s of sound.",
        )
    return asked


def _number(name: str, values: list[str]) -> Any:
    """A form's text as what JSON would have said."""
    if name == "guidance_mode":
        return values
    if len(values) > 1:
        raise HTTPException(422, f"{name}: the field is there twice.")
    (text,) = values
    if name == "prompt":
        return text
    try:
        if name in ("guidance", "duration"):
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
        if not text.strip().lstrip("+-").isdecimal() or len(text) > 32:
            raise ValueError
        return int(text)
    except ValueError:
        raise HTTPException(422, f"{name}: {text[:20]!r} is no such number.") from None


async def _keep(video: UploadFile, path: Path) -> None:
    def copy() -> int:
        size = 0
        with path.open("xb") as file:
            while block := video.file.read(_BLOCK):
                size += file.write(block)
        return size

    if await asyncio.to_thread(copy) == 0:
        raise HTTPException(422, "video: the file is empty.")
