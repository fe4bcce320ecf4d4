"""What would be read of a video and copied of it, found without making any sound."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from mfmjt.errors import InputError
from mfmjt.media._copy import HIDING, left_out
from mfmjt.media._decode import Decoder
from mfmjt.media._open import declared_duration, described, open_video, sound_stream, video_streams
from mfmjt.media._times import Times, copied_times
from mfmjt.media.video import VideoStream
from mfmjt.media.write import check_output, containers_for

__all__ = ["Report", "check"]

_UNEVEN = Fraction(2, 1000)  # seconds: Matroska rounds to milliseconds
_CURVES = {16: "HDR (PQ)", 18: "HDR (HLG)"}  # by number, of H.273


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        path: The video.
        container: FFmpeg's name of its format.
        stream: Number of the stream of pictures that is read.
        codec: Of the pictures.
        width: Pixels across, as shown (after rotation).
        height: Pixels down, as shown.
        rotation: Degrees, counterclockwise, that players turn the pictures by.
        range: SDR, HDR (PQ) or HDR (HLG).
        frames: How many pictures are shown.
        fps: Pictures per second on the whole.
        variable: Whether the pictures follow one another at different distances.
        duration: Seconds that they are shown.
        start: What the file's clock says at the first one, in seconds; it becomes 0.
        others: Streams of moving pictures that are not read.
        sound: The sound track that is replaced, None if there is none.
        containers: Suffixes of the files that the pictures can be copied to as they are.
        notes: One line each on what is odd, and what a copy leaves out.
    """

    path: str
    container: str
    stream: int
    codec: str
    width: int
    height: int
    rotation: int
    range: str
    frames: int
    fps: float
    variable: bool
    duration: float
    start: float
    others: tuple[str, ...]
    sound: str | None
    containers: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """What `mfmjt check` prints: one line for each thing to know."""
        turned = f", turned by {self.rotation} degrees" if self.rotation else ""
        pace = "at a variable rate, on the whole " if self.variable else ""
        rows = {
            "Pictures": f"{self.codec}, {self.width}x{self.height}{turned}, {self.range}",
            "Time": f"{self.duration:.2f} s, {self.frames} pictures {pace}{self.fps:.5g} a second"
            + (f"; the file's clock begins at {self.start:.3f} s" if self.start else ""),
            "File": f"{self.container}, stream #{self.stream}"
            + (f"; not read: {', '.join(self.others)}" if self.others else ""),
            "Sound": "none" if self.sound is None else f"{self.sound}, would be replaced",
            "Can go to": " ".join(self.containers) or "no video file as it is",
        }
        lines = [f"{self.path}", *(f"  {name:<10}{text}" for name, text in rows.items())]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def check(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    formats: str | None = None,
) -> Report:
    """Decode a video as for making sound, and find what a copy of it would be.

    Args:
        path: Any file that PyAV can open.
        output: Also raise what writing this file would end with; None asks for no file.
        formats: As for `VideoStream`.

    Raises:
        InputError: As from `read_video` without a limit, and from `check_output`.
        RunError: As from `check_output`.
    """
    path = Path(path)
    seen = VideoStream(path, (), formats=formats)
    for _ in seen:
        pass
    if output is not None:
        check_output(path, output)
    times: Times | None = None
    notes = list(seen.notes)
    try:
        times = copied_times(path, None, formats)
    except InputError as error:
        notes.append(str(error))
    with open_video(path, formats) as (container, stream):
        context = stream.codec_context
        suffixes = containers_for(stream) if times is not None else ()
        if times is not None and times.edited:
            suffixes = tuple(suffix for suffix in suffixes if suffix in HIDING)
        target = None if output is None else Path(output).suffix.lower()
        if suffixes:
            chosen = target if target in suffixes else suffixes[0]
            notes += left_out(path, container, stream, chosen)
        shown = _shown(times)
        base = stream.time_base
        gaps = [(after - before) * base for before, after in pairwise(shown)]
        return Report(
            path=str(path),
            container=container.format.long_name,
            stream=stream.index,
            codec=context.codec.canonical_name,
            width=seen.width,
            height=seen.height,
            rotation=_rotation(path, formats),
            range=_CURVES.get(context.color_trc, "SDR"),
            frames=len(shown),
            fps=len(shown) / seen.duration if times is not None else seen.fps,
            variable=bool(gaps) and max(gaps) - min(gaps) > _UNEVEN,
            duration=seen.duration,
            start=0.0 if times is None else float(times.zero),
            others=tuple(described(other) for other in video_streams(container)[1:]),
            sound=_sound(container),
            containers=suffixes,
            notes=tuple(notes),
        )


def _shown(times: Times | None) -> list[int]:
    """When pictures are shown, in ticks and in order."""
    if times is None:
        return []
    end = times.until
    return sorted(
        ticks for ticks in times.shown[times.first :] if ticks >= 0 and (end is None or ticks < end)
    )


def _rotation(path: Path, formats: str | None) -> int:
    with open_video(path, formats) as (container, stream):
        for _, frame in Decoder(path, stream, declared_duration(container, stream)).frames(
            container
        ):
            return round(frame.rotation) % 360
    return 0


def _sound(container: Any) -> str | None:
    stream = sound_stream(container)
    if stream is None:
        return None
    context = stream.codec_context
    if context is None:
        return "a track in an unknown codec"
    more = len(container.streams.audio) - 1
    others = f" and {more} more track{'s' if more > 1 else ''}" if more else ""
    return f"{context.codec.canonical_name} {context.sample_rate} Hz, {context.layout.name}{others}"
