"""What a copy of a video takes over beside its pictures: how they are shown, tags, chapters."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av

from mfmjt.media._open import in_mov, video_streams

__all__ = [
    "HIDING",
    "VIDEO_SUFFIXES",
    "add_pictures",
    "container_options",
    "containers_for",
    "copy_tags",
    "hide_from",
    "hiding",
    "holds",
    "left_out",
]

# Suffix -> (FFmpeg's name of the container, the encoder of the sound track).
VIDEO_SUFFIXES = {
    ".mp4": ("mp4", "aac"),
    ".m4v": ("mp4", "aac"),
    ".mov": ("mov", "aac"),
    ".mkv": ("matroska", "aac"),
    ".webm": ("webm", "libopus"),
}
HIDING = (".mp4", ".m4v", ".mov")
"""Suffixes of files whose edit list can hide pictures before the first and after the last one."""
_UNOFFICIAL = {"strict": "unofficial"}  # boxes for Dolby Vision and spherical video are
# Of a file, not of what is in it.
_OF_THE_FILE = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}
_STATISTICS = ("_STATISTICS", "BPS", "DURATION", "NUMBER_OF_")  # of mkvmerge, untrue once cut


def containers_for(stream: Any) -> tuple[str, ...]:
    """Return the suffixes of `VIDEO_SUFFIXES` whose container holds a video stream's packets.

    Each was tried: the header of such a file is written to memory.

    Args:
        stream: A video stream of an open PyAV container.
    """
    return tuple(suffix for suffix in VIDEO_SUFFIXES if holds(stream, suffix))


def holds(stream: Any, suffix: str) -> bool:
    """Return whether the container of a suffix takes a video stream's packets as they are."""
    try:
        with av.open(io.BytesIO(), "w", format=VIDEO_SUFFIXES[suffix][0]) as target:
            target.add_stream_from_template(stream, opaque=True)
            target.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def hiding(stream: Any) -> str:
    """Those of `HIDING` that hold the stream, as a choice in words; empty if none does."""
    return " or ".join(suffix for suffix in containers_for(stream) if suffix in HIDING)


def container_options(source: Any, suffix: str) -> dict[str, str]:
    """Options of the container that a video of `source` is copied to."""
    options = dict(_UNOFFICIAL)
    if suffix in HIDING:
        options["movflags"] = "faststart"  # the index comes first: plays while it loads
        if any(key.lower().startswith("com.") for key in source.metadata):
            options["movflags"] += "+use_metadata_tags"  # place and maker, as phones write them
    return options


def add_pictures(target: Any, source: Any, stream: Any, suffix: str) -> Any:
    """Add a stream to `target` that takes the packets of `stream` and looks like it."""
    pictures = target.add_stream_from_template(stream, opaque=True)
    context = stream.codec_context
    if context.codec.canonical_name == "mpeg4" and not in_mov(source):
        # Its header, too, says that pictures are packed in AVI's way.
        av.bitstream.BitStreamFilterContext("mpeg4_unpack_bframes", stream, pictures)
    pictures.codec_context.codec_tag = _tag(source, stream, suffix)
    if stream.sample_aspect_ratio:
        pictures.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    for key, value in stream.metadata.items():
        if not key.startswith(_STATISTICS):
            pictures.metadata[key] = value
    pictures.disposition = stream.disposition | av.stream.Disposition.default
    return pictures


def _tag(source: Any, stream: Any, suffix: str) -> str:
    """Return the four letters that name the codec in the copy; zeros leave them to FFmpeg."""
    if suffix in HIDING:
        tag = stream.codec_context.codec_tag
        if in_mov(source) and _takes(stream, suffix, tag):
            return tag
        if stream.codec_context.codec.canonical_name == "hevc":
            return "hvc1"  # Apple's players refuse the other one
    return "\0\0\0\0"


def _takes(stream: Any, suffix: str, tag: str) -> bool:
    """Return whether a file with this tag can be written, and read again as what it is."""
    codec = stream.codec_context.codec.canonical_name
    memory = io.BytesIO()
    packet = av.Packet(bytes(64))
    packet.pts = packet.dts = 0
    packet.is_keyframe = True
    try:
        container = "mov" if suffix == ".mov" else "mp4"
        with av.open(memory, "w", format=container, options=_UNOFFICIAL) as target:
            packet.stream = target.add_stream_from_template(stream, opaque=True)
            packet.stream.codec_context.codec_tag = tag
            target.mux(packet)
        memory.seek(0)
        with av.open(memory) as again:
            (written,) = again.streams.video
            context = written.codec_context
            return context.codec_tag == tag and context.codec.canonical_name == codec
    except (av.error.FFmpegError, ValueError, AttributeError):
        return False


def copy_tags(source: Any, target: Any, zero: Fraction, end: Fraction) -> None:
    """Copy the file's tags, and chapters as far as they are in [zero, zero + end] seconds."""
    for key, value in source.metadata.items():
        if key.lower() not in _OF_THE_FILE:
            target.metadata[key] = value
    chapters = []
    for chapter in source.chapters():
        base = chapter["time_base"]
        begins = max(Fraction(0), chapter["start"] * base - zero)
        ends = min(end, chapter["end"] * base - zero)
        if begins < ends:
            chapter |= {"start": round(begins / base), "end": round(ends / base)}
            chapters.append(chapter)
    if chapters:
        target.set_chapters(chapters)


def left_out(path: Path, source: Any, stream: Any, suffix: str) -> tuple[str, ...]:
    """Lines on what of a file, its sound and other moving pictures apart, a copy has not."""
    notes = []
    kinds: dict[str, int] = {}
    used = {s.index for s in (*source.streams.audio, *video_streams(source))}
    for other in source.streams:
        # Titles of chapters come as a track that is not read; a time code is a tag, too.
        nothing = other.discard == av.stream.Discard.all or "timecode" in other.metadata
        if other.index not in used and not (other.type == "data" and nothing):
            kind = {"video": "cover image", "attachment": "attachment"}.get(other.type)
            kind = kind or f"{other.type} track"
            kinds[kind] = kinds.get(kind, 0) + 1
    if kinds:
        what = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in kinds.items())
        notes.append(f"Not copied from {path}: {what}.")
    shape = stream.sample_aspect_ratio
    if suffix not in HIDING and shape and shape != (stream.codec_context.sample_aspect_ratio or 1):
        others = hiding(stream)
        notes.append(
            f"The pixels of {path} are not square, which only its container says, and a {suffix} "
            f"cannot: the copy is shown in another shape.{others and f' Choose {others}.'}"
        )
    return tuple(notes)


def hide_from(path: Path, time: Fraction) -> None:
    """Let the edit list of the first track of an .mp4 or .mov end at `time` seconds, in place."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        movie = _inside(file, (0, end), b"moov")
        header, _ = _inside(file, movie, b"mvhd")
        edits, _ = _inside(file, _inside(file, _inside(file, movie, b"trak"), b"edts"), b"elst")
        file.seek(header)
        long = file.read(1) == b"\1"
        file.seek(header + (20 if long else 12))
        (scale,) = struct.unpack(">I", file.read(4))
        file.seek(edits)
        long = file.read(1) == b"\1"
        (count,) = struct.unpack(">I", file.read(7)[3:])
        # The last entry is of the pictures; one before it says that they begin later.
        file.seek(edits + 8 + (count - 1) * (20 if long else 12))
        file.write(struct.pack(">Q" if long else ">I", int(time * scale)))


def _inside(file: BinaryIO, place: tuple[int, int], name: bytes) -> tuple[int, int]:
    """Return where the content of the first box of a name is, among those at `place`."""
    at, end = place
    while at < end:
        file.seek(at)
        size, found = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            header = 16
        if found == name:
            return at + header, at + size
        at += max(size, 8)
    raise OSError(f"there is no {name.decode()} in it")
