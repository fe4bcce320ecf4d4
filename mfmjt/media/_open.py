"""Opens files of video and sound, and finds what in them is to be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from mfmjt.errors import InputError, reason

_OPENING = {
    "protocol_whitelist": "file",  # no file makes FFmpeg open an address
    "m3u8_hold_counters": "0",  # or wait for one that it may not open
    "max_reload": "0",
}
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
        streams = video_streams(container)
        if not streams:
            kind = "only sound" if container.streams.audio else "no pictures"
            raise InputError(f"{path} has {kind}, no video stream. Give a file with video.")
        if streams[0].codec_context is None:
            raise InputError(f"{path} has video in a codec that is not known. Convert it to H.264.")
        streams[0].codec_context.thread_type = "AUTO"
        streams[0].codec_context.thread_count = _DECODER_THREADS
        yield container, streams[0]


def video_streams(container: Any) -> list[Any]:
    """Streams of moving pictures, the one that players show first."""
    # A cover image in a song's file is a video stream too.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    best = container.streams.best("video")
    return sorted(streams, key=lambda s: (s.codec_context is None, s is not best))


def others_note(path: Path, container: Any) -> tuple[str, ...]:
    """Return one line that says which of several video streams is used, none where there is one."""
    chosen, *others = video_streams(container)
    if not others:
        return ()
    left = ", ".join(described(stream) for stream in others[:5])
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return (
        f"{path} has {len(others) + 1} video streams. Used is the one that players show, "
        f"{described(chosen)}; left out: {left}{more}.",
    )


def described(stream: Any) -> str:
    """Return a stream in a few words, such as "#1 h264 1920x1080"."""
    context = stream.codec_context
    name = "of an unknown codec" if context is None else context.codec.canonical_name
    size = f" {context.width}x{context.height}" if stream.type == "video" and context else ""
    return f"#{stream.index} {name}{size}"


def sound_stream(container: Any) -> Any | None:
    """Return the sound track that players play, None if there is none."""
    return container.streams.best("audio") or next(iter(container.streams.audio), None)


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the stream's packets as decoders and other containers take them, one picture in each.

    Their number is the same every time that a file is read. FFmpeg's errors come through.
    """
    split = None
    if stream.codec_context.codec.canonical_name == "mpeg4" and not in_mov(container):
        # Two pictures in one packet, and an empty one after it: what only AVI knows.
        split = av.bitstream.BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # what flushes decoders, or says that nothing has changed
        for whole in [packet] if split is None else split.filter(packet):
            whole.stream = stream
            yield whole


def in_mov(container: Any) -> bool:
    """Return whether the file is of QuickTime's family (.mp4), which alone has edit lists."""
    return "mp4" in container.format.name.split(",")


def in_decoding_order(container: Any, stream: Any) -> bool:
    """Return whether the file knows times of decoding only, or none: AVI and bare streams."""
    return bool(stream.codec_context.codec.reorder and _tells_no_times(container))


def _tells_no_times(container: Any) -> bool:
    bare = container.format.flags & av.format.Flags.no_timestamps.value
    return bool(bare or container.format.name == "avi")


def step_of(stream: Any) -> Fraction:
    """Seconds from one picture to the next, on the whole."""
    # The average of a bare stream is FFmpeg's default; its guess is what the codec says.
    average = None if _tells_no_times(stream.container) else stream.average_rate
    rate = average or stream.guessed_rate or 25
    return 1 / Fraction(min(max(rate, 1), 1000))  # a damaged header can state any


def declared_duration(container: Any, stream: Any) -> Fraction | None:
    if stream.duration and stream.time_base:
        return Fraction(stream.duration * stream.time_base)
    if container.duration and not container.streams.audio:
        return Fraction(container.duration, av.time_base)
    return None
