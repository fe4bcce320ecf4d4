"""Request bodies: bounded in size and time; a video goes to disk before anything opens it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mfmjt.serve.schema import Asked
from mfmjt.serve.settings import Settings

__all__ = ["UPLOAD", "read_request"]

UPLOAD = "upload"
_PROMPTS = {"prompt", "negative_prompt"}
_FIELDS = _PROMPTS | {"steps", "guidance", "guidance_mode", "seed", "count", "duration"}
_TEXT = 64 * 1024  # bytes of JSON, and of a form beside its video
_BLOCK = 2**20


async def read_request(request: Request, folder: Path, settings: Settings) -> tuple[Asked, bool]:
    """Read a request; a video becomes the file `upload` in `folder`.

    Returns:
        What is asked, and whether there is a video.

    Raises:
        HTTPException: The body is too large, too slow or not what it should be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        asked, has_video = await _form(request, folder, settings)
    elif kind == "application/x-www-form-urlencoded":
        asked, has_video = _from_fields(_query(await _text(request, settings))), False
    elif kind in ("application/json", "text/json") or kind.endswith("+json"):
        asked, has_video = _asked(_json(await _text(request, settings))), False
    else:
        raise HTTPException(
            415,
            f"The content type is {kind or 'missing'}. Send multipart/form-data with a video, or "
            "application/json with a prompt.",
        )
    if not has_video and not (asked.prompt and asked.prompt.strip()):
        raise HTTPException(
            422, "prompt: there is no file named video, so say what is to be heard."
        )
    return _bounded(asked, settings), has_video


class _Form(MultiPartParser):
    """Reads parts by their names alone: `video` is the file, and the other fields are text.

    Clients tell a file by `filename`, by `filename*` alone or not at all, and some give text one.
    """

    def on_headers_finished(self) -> None:
        part = self._current_part
        told = part.content_disposition or b""
        _, options = parse_options_header(told)
        name = options.get(b"name", b"").decode("latin-1")
        if name == "video":
            named = options.get(b"filename") or b"filename*" in told.lower()
            told = b'form-data; name="video"; filename="%s"' % (b"video" if named else b"")
        elif name in _FIELDS:
            told = b'form-data; name="%s"' % name.encode()
        part.content_disposition = told
        super().on_headers_finished()


async def _form(request: Request, folder: Path, settings: Settings) -> tuple[Asked, bool]:
    body = _body(request, settings.max_upload + _TEXT, settings)
    # The parser keeps what is large in a file without a name, which cannot outlive it.
    parser = _Form(
        request.headers, body, max_files=1, max_fields=len(_FIELDS) + 2, max_part_size=_TEXT
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, UnicodeError, ValueError) as error:
        reason = str(getattr(error, "message", error)).rstrip(".") or type(error).__name__
        raise HTTPException(400, f"The form cannot be read: {reason}.") from error
    try:
        items = form.multi_items()
        asked = _from_fields([item for item in items if item[0] != "video"])
        video = form.get("video")
        # A browser sends a file without a name and without content where none was chosen.
        has_video = isinstance(video, UploadFile) and bool(video.filename or video.size)
        if has_video:
            assert isinstance(video, UploadFile)
            await _keep(video, folder / UPLOAD)
        return asked, has_video
    finally:
        await form.close()


async def _text(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    async for block in _body(request, _TEXT, settings):
        body += block
    return bytes(body)


def _query(body: bytes) -> list[tuple[str, str]]:
    if body.lstrip().startswith(b"{"):
        raise HTTPException(
            415,
            "The body looks like JSON, and its content type says that it is a form. Send it as "
            "application/json.",
        )
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise HTTPException(400, f"The form cannot be read: {str(error)[:100]}.") from error


def _json(body: bytes) -> Any:
    try:  # bytes: a mark of their order may come first
        return json.loads(body, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is no JSON: {str(error)[:100]}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("a name is there twice")
    return given


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


async def _body(request: Request, limit: int, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Yield the body in blocks, until it is too large or its sender falls silent."""
    declared = request.headers.get("content-length", "")
    large = HTTPException(
        413,
        f"The request is larger than {limit // 2**20} MB."
        if limit >= 2**20
        else f"The request is larger than {limit // 1024} kB.",
        # What the sender still has to say is not waited for.
        {"Connection": "close"},
    )
    if declared.isdigit() and int(declared) > limit:
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
        if size > limit:
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


def _from_fields(items: list[tuple[str, Any]]) -> Asked:
    """Parse a form's fields; those that are empty count as missing."""
    given: dict[str, list[str]] = {}
    for name, text in items:
        if name not in _FIELDS or not isinstance(text, str):
            instead = "" if isinstance(text, str) else " That of the file is video."
            raise HTTPException(422, f"{name[:40]}: there is no such field.{instead}")
        if text.strip():
            given.setdefault(name, []).append(text)
    return _asked({name: _value(name, texts) for name, texts in given.items()})


def _value(name: str, texts: list[str]) -> Any:
    """Convert a field's text to the value that JSON would have."""
    if name == "guidance_mode":
        return texts
    if len(texts) > 1:
        raise HTTPException(422, f"{name}: the field is there twice.")
    (text,) = texts
    if name in _PROMPTS:
        return text.removeprefix("\ufeff")  # with which some editors begin a file
    try:
        number = float(text)
        if not math.isfinite(number) or "_" in text:
            raise ValueError
        return number
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
