"""What would be read of a video and copied of it, found without making any sound."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from mfmjt.errors import InputError
from mfmjt.media._copy import HIDING, VIDEO_SUFFIXES, containers_for, left_out
from mfmjt.media._decode import Decoder
from mfmjt.media._open import declared_duration, described, open_video, sound_stream, video_streams
from mfmjt.media._times import Times, copied_times
from mfmjt.media.hdr import find_hdr
from mfmjt.media.pictures import TURNS, Pictures, as_source, display
from mfmjt.media.video import VideoStream
from mfmjt.media.write import check_output, unheld

__all__ = ["Report", "check", "destinations"]

_UNEVEN = Fraction(2, 1000)  # seconds: Matroska rounds to milliseconds


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        path: The video.
        container: FFmpeg's name of its format, or what else the pictures are.
        stream: Number of the stream of pictures that is read, None if there are no streams.
        codec: Of the pictures.
        width: Pixels across, as shown (after rotation).
        height: Pixels down, as shown.
        rotation: Degrees, counterclockwise, that players turn the pictures by.
        mirrored: Whether they then mirror them, left to right.
        range: SDR, HDR (PQ) or HDR (HLG).
        frames: How many pictures are shown.
        fps: Pictures per second on the whole.
        variable: Whether the pictures follow one another at different distances.
        duration: Seconds that they are shown.
        start: What the file's clock says at the first one, in seconds; it becomes 0.
        others: Streams of moving pictures that are not read.
        sound: The sound track that is replaced, None if there is none.
        containers: Suffixes of the video files that can be written.
        encoded: Whether the pictures are encoded for them, since none holds them as they are.
        notes: One line each on what is odd, and what a copy leaves out.
    """

    path: str
    container: str
    stream: int | None
    codec: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    range: str
    frames: int
    fps: float
    variable: bool
    duration: float
    start: float
    others: tuple[str, ...]
    sound: str | None
    containers: tuple[str, ...]
    encoded: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return what `mfmjt check` prints: one line for each thing to know."""
        turned = f", turned by {self.rotation} degrees" if self.rotation else ""
        turned += ", mirrored" if self.mirrored else ""
        pace = "at a variable rate, on the whole " if self.variable else ""
        rows = {
            "Pictures": f"{self.codec}, {self.width}x{self.height}{turned}, {self.range}",
            "Time": f"{self.duration:.2f} s, {self.frames} pictures {pace}{self.fps:.5g} a second"
            + (f"; the file's clock begins at {self.start:.3f} s" if self.start else ""),
            "File": f"{self.container}, stream #{self.stream}"
            + (f"; not read: {', '.join(self.others)}" if self.others else ""),
            "Sound": "none" if self.sound is None else f"{self.sound}, would be replaced",
            "Can go to": (" ".join(self.containers) or "no video file")
            + (", encoded once" if self.encoded else ""),
        }
        if self.stream is None:
            del rows["File"]
        lines = [f"{self.path}", *(f"  {name:<10}{text}" for name, text in rows.items())]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def check(
    video: str | os.PathLike[str] | Pictures,
    output: str | os.PathLike[str] | None = None,
    formats: str | None = None,
) -> Report:
    """Decode a video as for making sound, and find what a copy of it would be.

    Args:
        video: Any file that PyAV can open, or a result of `as_source`.
        output: Also raise what writing this file would end with; None asks for no file.
        formats: As for `VideoStream`.

    Raises:
        InputError: As from `read_video` without a limit, and from `check_output`.
        RunError: As from `check_output`.
    """
    source = as_source(video)
    seen = VideoStream(source, (), formats=formats)
    for _ in seen:
        pass
    if output is not None:
        check_output(source, output)
    if isinstance(source, Pictures):
        return _report(source, seen, source.times[:-1], container=source.kind, codec=source.kind)
    encoded = unheld(source, formats) is not None
    times: Times | None = None
    notes: tuple[str, ...] = ()
    try:
        times = copied_times(source, None, formats)
    except InputError as error:
        notes = (str(error),)
    with open_video(source, formats) as (container, stream):
        hdr = find_hdr(stream.codec_context)
        suffixes: tuple[str, ...] = tuple(VIDEO_SUFFIXES) if encoded else ()
        if times is not None and not encoded:
            suffixes = _showing(stream, times)
        wished = (source if output is None else Path(output)).suffix.lower()
        if suffixes and not encoded:
            chosen = wished if wished in suffixes else suffixes[0]
            notes += left_out(source, container, stream, chosen)
        return _report(
            source,
            seen,
            _shown(times, stream.time_base),
            container=container.format.long_name,
            codec=stream.codec_context.codec.canonical_name,
            stream=stream.index,
            **_orientation(source, formats),
            range="SDR" if hdr is None else f"HDR ({hdr.transfer})",
            start=0.0 if times is None else float(times.zero),
            others=tuple(described(other) for other in video_streams(container)[1:]),
            sound=_sound(container),
            containers=suffixes,
            encoded=encoded,
            notes=notes,
        )


def destinations(
    path: Path, end: Fraction, formats: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the suffixes of files that a video's pictures can go to, or a line on why to none.

    Args:
        path: The video.
        end: Seconds of it that are wanted.
        formats: As for `VideoStream`.
    """
    if unheld(path, formats) is not None:
        return tuple(VIDEO_SUFFIXES), ()  # they are encoded, which `mux` says
    try:
        times = copied_times(path, end, formats)
    except InputError as error:
        return (), (str(error),)
    with open_video(path, formats) as (_, stream):
        return _showing(stream, times), ()


def _showing(stream: Any, times: Times) -> tuple[str, ...]:
    """Return the suffixes of files that show a stream's pictures and no others."""
    return tuple(s for s in containers_for(stream) if s in HIDING or not times.edited)


def _report(
    source: Path | Pictures, seen: VideoStream, shown: Sequence[Fraction], **found: Any
) -> Report:
    """Return what is the same for files and for pictures, with the rest of what was `found`."""
    gaps = [after - before for before, after in pairwise(shown)]
    usual = {
        "stream": None,
        "rotation": 0,
        "mirrored": False,
        "range": "SDR",
        "start": 0.0,
        "others": (),
        "sound": None,
        "containers": tuple(VIDEO_SUFFIXES),
        "encoded": True,
        "notes": (),
    }
    values = usual | found
    values["notes"] = tuple(dict.fromkeys((*seen.notes, *values["notes"])))
    return Report(
        path=str(source),
        width=seen.width,
        height=seen.height,
        frames=len(shown),
        fps=len(shown) / seen.duration if shown else seen.fps,
        variable=bool(gaps) and max(gaps) - min(gaps) > _UNEVEN,
        duration=seen.duration,
        **values,
    )


def _shown(times: Times | None, base: Fraction) -> list[Fraction]:
    """When pictures are shown, in seconds and in order."""
    if times is None:
        return []
    end = times.until
    kept = times.shown[times.first :]
    return sorted(t * base for t in kept if t >= 0 and (end is None or t < end))


def _orientation(path: Path, formats: str | None) -> dict[str, Any]:
    """Return how players turn and mirror the pictures."""
    with open_video(path, formats) as (container, stream):
        decoder = Decoder(path, stream, declared_duration(container, stream))
        a, b, c, d = next(display(frame) for _, frame in decoder.frames(container))
    mirrored = a * d < b * c
    if mirrored:
        a, c = -a, -c
    return {"rotation": 90 * TURNS.index((a, b, c, d)), "mirrored": mirrored}


def _sound(container: Any) -> str | None:
    """Return the sound track in a few words, and how many more there are."""
    stream = sound_stream(container)
    if stream is None:
        return None
    context = stream.codec_context
    if context is None:
        return "a track in an unknown codec"
    more = len(container.streams.audio) - 1
    others = f" and {more} more track{'s' if more > 1 else ''}" if more else ""
    return f"{context.codec.canonical_name} {context.sample_rate} Hz, {context.layout.name}{others}"
