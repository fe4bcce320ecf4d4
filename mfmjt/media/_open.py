"""Opens files of video and sound, and finds what in them is to be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from mfmjt.errors import InputError, reason

_OPENING = {"protocol_whitelist": "file"}  # no file makes FFmpeg open an address
_DECODER_THREADS = 4  # each holds a frame: enough for 4K in real time, small in memory


@contextlib.contextmanager
def open_container(path: Path, what: str, formats: str | None) -> Iterator[Any]:
    if not path.exists():
        raise InputError(f"There is no file {path}. Check the name.")
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give {what}.")
    options = {} if formats is None else {"format_whitelist": formats}
    try:
        # "file:" keeps a name such as "a:b.mp4" from being read as a protocol.
        container = av.open(f"file:{path}", metadata_errors="ignore", options=_OPENING | options)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened as {what.removesuffix(' file')}: {reason(error)}. "
            "Give a file that plays, such as an .mp4."
        ) from error
    with container:
        yield container


@contextlib.contextmanager
def open_video(path: Path, formats: str | None = None) -> Iterator[tuple[Any, Any]]:
    with open_container(path, "a video file", formats) as container:
        # A cover image in a song's file is a video stream too.
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            kind = "only sound" if container.streams.audio else "no pictures"
            raise InputError(f"{path} has {kind}, no video stream. Give a file with video.")
        if streams[0].codec_context is None:
            raise InputError(f"{path} has video in a codec that is not known. Convert it to H.264.")
        streams[0].codec_context.thread_type = "AUTO"
        streams[0].codec_context.thread_count = _DECODER_THREADS
        yield container, streams[0]


def declared_duration(container: Any, stream: Any) -> Fraction | None:
    if stream.duration and stream.time_base:
        return Fraction(stream.duration * stream.time_base)
    if container.duration and not container.streams.audio:
        return Fraction(container.duration, av.time_base)
    return None


def first_picture(container: Any, otherwise: Fraction) -> Fraction:
    """When a video's pictures begin, in seconds; sound alone begins with itself."""
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover and stream.start_time is not None:
            return Fraction(stream.start_time * stream.time_base)
    return otherwise
