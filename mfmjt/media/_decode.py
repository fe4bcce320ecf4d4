"""Decodes a video's pictures one after the other, and says when each is shown."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from mfmjt.media._open import (
    declared_duration,
    in_decoding_order,
    open_video,
    packets,
    step_of,
)
from mfmjt.media.hdr import find_hdr
from mfmjt.media.pictures import browser_delay, refuse_huge, shown_size

__all__ = ["MAX_JUMP", "Decoder", "first_time"]

MAX_JUMP = 10
"""Seconds of time stamps beyond the stated end: more is damage."""


class Decoder:
    """Frames in order of time from the first one at 0 s, past whatever is damaged.

    Args:
        path: Of the file, for messages.
        stream: What to decode.
        declared: Seconds that the file states; what is shown far later is damaged.
        numbered: Whether `number` is wanted.

    Attributes:
        first: When the first frame is shown by the file's own clock, in seconds.
        about: Notes on what was chosen before decoding began.
        hdr: How the pictures' high dynamic range is coded, None where it is the ordinary one.
        count: Frames so far; `end`, `width` and `height` follow along.
        number: Of the packet that the last frame came in, None if its decoder does not say.
        damaged: Places that could not be decoded.
    """

    def __init__(
        self, path: Path, stream: Any, declared: Fraction | None, numbered: bool = False
    ) -> None:
        self.step = step_of(stream)
        self.number: int | None = None
        self._stamps: list[int | None] | None = [] if numbered else None
        self.path, self.stream, self.declared = path, stream, declared
        self.hdr = find_hdr(stream.codec_context)
        self.about: tuple[str, ...] = ()
        self.count = self.damaged = self.width = self.height = 0
        self.first = self.end = Fraction(0)

    def frames(self, container: Any) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """Yield (seconds, frame)."""
        previous = Fraction(-1)
        untimed = in_decoding_order(container, self.stream)
        animated = self.stream.codec_context.name in ("gif", "apng")
        for frame in self._decoded(container, untimed):
            refuse_huge(self.path, frame)
            base = Fraction(frame.time_base or self.stream.time_base or Fraction(1, 25))
            # A decoder gives a frame back when it is shown: with the packet that is decoded then.
            stamp = frame.dts if untimed else frame.pts
            if self._stamps is not None:
                known = frame.pts is not None and 0 <= frame.pts < len(self._stamps)
                self.number = frame.pts if known else None
                if not untimed:
                    stamp = None if self.number is None else self._stamps[self.number]
            if self.count == 0:
                self.first = Fraction(0) if stamp is None else stamp * base
                time = Fraction(0)
            else:
                time = previous + self.step if stamp is None else stamp * base - self.first
            if self.count and time <= previous:
                time = previous + self.step
            if self.declared is not None and time > max(previous, self.declared) + MAX_JUMP:
                self.damaged += 1
                time = previous + self.step
            held = self.step if untimed else (frame.duration or 0) * base
            if animated:
                time = self.end if self.count else time
                held = browser_delay(held)
            elif not 0 < held <= max(time, self.declared or time) - time + MAX_JUMP:
                held = self.step
            previous = time
            self.count += 1
            self.end = time + held
            self.width, self.height = shown_size(frame)
            yield time, frame

    def _decoded(self, container: Any, untimed: bool) -> Iterator[av.VideoFrame]:
        source = packets(container, self.stream)
        number = 0
        while True:
            try:
                packet = next(source)
            except (StopIteration, av.error.EOFError):
                break
            except (av.error.FFmpegError, ValueError):
                self.damaged += 1
                break
            if untimed and packet.dts is None:
                packet.dts = round(number * self.step / self.stream.time_base)
            if self._stamps is not None:
                # Decoders hand a packet's time on to its frame. (Its `opaque` would do, too, but
                # a thread of dav1d's that frees one waits for Python, which waits for it.)
                self._stamps.append(packet.pts)
                packet.pts = number
            number += 1
            yield from self._from(packet)
        yield from self._from(None)

    def _from(self, packet: Any) -> Iterator[av.VideoFrame]:
        try:
            yield from self.stream.decode(packet)
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, ValueError):
            self.damaged += 1

    def notes(self, declared: Fraction | None) -> tuple[str, ...]:
        """Say what was lost; `declared` is the length in the header, None if not to be judged."""
        notes = []
        if declared is not None and self.end + 3 * self.step < declared:
            notes.append(
                f"{self.path} is cut short: {float(self.end):.2f} s of {float(declared):.2f} s "
                "could be read, and only those get sound."
            )
        if self.damaged:
            notes.append(f"{self.path} is damaged in {self.damaged} places, which were skipped.")
        return tuple(notes)


def first_time(path: Path, formats: str | None = None) -> Fraction | None:
    """When the first picture that can be decoded is shown by the file's own clock, in seconds."""
    with open_video(path, formats) as (container, stream):
        decoder = Decoder(path, stream, declared_duration(container, stream))
        for _ in decoder.frames(container):
            return decoder.first
    return None
