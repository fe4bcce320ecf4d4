"""A video's pictures on a uniform time grid, as many a second as a network is given."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from mfmjt.errors import InputError, reason
from mfmjt.media._decode import Decoder
from mfmjt.media._open import declared_duration, open_video, others_note
from mfmjt.media.hdr import Hdr, to_sdr
from mfmjt.media.pictures import (
    PictureDecoder,
    Pictures,
    as_shown,
    as_source,
    over_white,
)

__all__ = ["Fit", "Pick", "Picture", "Video", "VideoStream", "decoding", "read_video", "thumbnails"]

_TIME_ROUNDING = Fraction(2, 1000)  # Matroska keeps milliseconds only
_BLOCK = 1  # seconds
_MOST_HDR = 1024  # pixels of the shorter side, far more than networks see: mapping them takes time


@dataclass(frozen=True)
class Video:
    """What `read_video` found.

    Attributes:
        frames: One uint8 array `(T, size, size, 3)` per rate, T = round(duration x rate).
        duration: Seconds that the frames cover.
        fps: Average frame rate of the file.
        width: Pixels across, as shown (after rotation).
        height: Pixels down, as shown.
        notes: One line each on what was odd but could be read, such as a file cut short.
    """

    frames: tuple[np.ndarray, ...]
    duration: float
    fps: float
    width: int
    height: int
    notes: tuple[str, ...]


Pick = Literal["shown", "next", "nearest"]
"""Which picture stands for a time: the one on the screen then, the next that comes, or the last
whose time, rounded to multiples of 1 / rate, is no later, as FFmpeg's filter `fps` picks it."""
Rate = int | Fraction
"""Pictures per second."""
Fit = Callable[[np.ndarray], Any]
"""Makes a uint8 `(1, H, W, 3)` picture, as it is decoded, what a network is given."""


def read_video(
    path: Any,
    rates: Sequence[int] = (8, 25),
    size: int | Sequence[int] = 64,
    duration: float | None = None,
    limit: float | None = None,
    fps: Any = None,
) -> Video:
    """Read a video's pictures at uniform rates, each squashed to a square.

    The picture for time k / rate is the frame on the screen at that time, as in training, whatever
    the file's own and perhaps variable frame rate. Rotation is applied, what is transparent is laid
    over white, and HDR is mapped to SDR. Frames are scaled down as they are decoded, so memory does
    not grow with the resolution.

    Args:
        path: Any file that PyAV can open, or whatever else `as_source` takes.
        rates: Pictures per second, one array for each.
        size: Side of the pictures in pixels: one for all rates, or one for each.
        duration: Read only so many seconds from the start; None reads the whole video.
        limit: Refuse a video longer than so many seconds when `duration` is None.
        fps: As for `as_source`.

    Raises:
        InputError: The file is missing, is no video, has nothing that can be decoded, has a single
            frame, is longer than `limit` or shorter than `duration`.
    """
    stream = VideoStream(as_source(path, fps), rates, size, duration, limit)
    found: list[list[np.ndarray]] = [[] for _ in rates]
    for block in stream:
        for pieces, new in zip(found, block, strict=True):
            pieces += new
    return Video(
        frames=tuple(np.concatenate(pieces) for pieces in found),
        duration=stream.duration,
        fps=stream.fps,
        width=stream.width,
        height=stream.height,
        notes=stream.notes,
    )


class VideoStream:
    """A video's pictures at uniform rates, a second at a time: memory does not grow with it.

    Iterating, once, gives for each block one list per rate of uint8 arrays `(1, H, W, 3)`, the
    pictures in order of time; the lists together hold round(duration x rate) of them. Frames that
    no time picks are decoded, because others are predicted from them, and never converted.

    Args:
        path: Any file that PyAV can open, or a result of `as_source`.
        rates: Pictures per second, one list for each.
        size: Side of the squares that pictures are squashed to while they are converted, one for
            all rates or one for each; for where no `fit` is given.
        duration: Read only so many seconds from the start; None reads the whole video.
        limit: Refuse a video longer than so many seconds when `duration` is None.
        fit: One function for each rate, called with each picked picture (rotated as shown) in full
            size, whose results are what the lists hold; they may be tensors on a device.
        pick: Which picture stands for a time.
        formats: Only these containers may be opened, FFmpeg's names with commas; None for all.

    Attributes:
        declared: Seconds that the file states, None where it does not, once iteration has begun.
        duration: Seconds that the pictures cover. This and the others below are known at the end.
        fps: Average frame rate of the file.
        width: Pixels across, as shown (after rotation).
        height: Pixels down, as shown.
        notes: One line each on what was odd but could be read, such as a file cut short.

    Raises:
        InputError: As `read_video`, while it is iterated.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Pictures,
        rates: Sequence[Rate] = (8, 25),
        size: int | Sequence[int] = 64,
        duration: float | None = None,
        limit: float | None = None,
        fit: Sequence[Fit] | None = None,
        pick: Pick = "shown",
        formats: str | None = None,
    ) -> None:
        if pick not in get_args(Pick):
            raise InputError(f"No pick {pick!r}: choose one of {', '.join(get_args(Pick))}.")
        self.path = path if isinstance(path, Pictures) else Path(path)
        self._asked, self._limit, self._formats = duration, limit, formats
        sizes = [size] * len(rates) if isinstance(size, int) else list(size)
        fits = [None] * len(rates) if fit is None else list(fit)
        self._samplers = [
            _Sampler(rate, side, fitting, pick)
            for rate, side, fitting in zip(rates, sizes, fits, strict=True)
        ]
        self.declared: float | None = None
        self.duration = self.fps = 0.0
        self.width = self.height = 0
        self.notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[list[Any], ...]]:
        path, asked, limit = self.path, self._asked, self._limit
        samplers = self._samplers
        counts = [] if asked is None else [_frame_count(asked, s.rate) for s in samplers]
        rates_are_high = all(sampler.rate >= 1 for sampler in samplers)
        with decoding(path, self._formats) as (decoder, decoded):
            declared = decoder.declared
            self.declared = None if declared is None else float(declared)
            if asked is None and limit is not None and declared is not None and declared > limit:
                raise _too_long(path, f"{float(declared):.1f} s", limit)
            block = _BLOCK
            for time, frame in decoded:
                if asked is None and limit is not None and time > limit:
                    raise _too_long(path, f"more than {limit:g} s", limit)
                # Before the frame is seen: what the last one adds may be cut off again.
                if time >= block:
                    yield tuple(sampler.take() for sampler in samplers)
                    block = int(time) + _BLOCK
                picture = Picture(frame, decoder.hdr)
                for sampler in samplers:
                    sampler.push(time, picture)
                # Frames of a low rate are all there long before the end, which is asked for, too.
                there = asked is not None and (rates_are_high or time + decoder.step >= asked)
                if there and all(s.count >= n for s, n in zip(samplers, counts, strict=True)):
                    break
        end = self._end(decoder)
        self.duration, self.fps = float(end), float(1 / decoder.step)
        self.width, self.height = decoder.width, decoder.height
        self.notes = decoder.about + decoder.notes(declared if asked is None else None)
        self.notes += () if decoder.hdr is None else (decoder.hdr.note,)
        yield tuple(sampler.finish(_frame_count(end, sampler.rate)) for sampler in samplers)

    def _end(self, decoder: Decoder | PictureDecoder) -> Fraction:
        """Seconds that the pictures cover, once all frames are seen."""
        if decoder.count == 0:
            raise InputError(f"No frame of {self.path} can be decoded. Give a video that plays.")
        if self._asked is None:
            if decoder.count == 1:
                raise InputError(
                    f"{self.path} has a single frame, so nothing in it moves. Give a video, "
                    "or leave it out and describe the sound with a prompt."
                )
            return decoder.end
        if decoder.end + decoder.step < self._asked:
            raise InputError(
                f"{self.path} lasts {float(decoder.end):.2f} s, less than the {self._asked:g} s "
                "asked for. Leave out the duration, or give a shorter one."
            )
        return Fraction(self._asked)


@contextlib.contextmanager
def decoding(
    source: Path | Pictures, formats: str | None = None
) -> Iterator[tuple[Decoder | PictureDecoder, Iterator[tuple[Fraction, av.VideoFrame]]]]:
    """Open a result of `as_source`; yields what decodes it, and its (seconds, frame) in order."""
    if isinstance(source, Pictures):
        shown = PictureDecoder(source)
        yield shown, shown.frames()
        return
    with open_video(source, formats) as (container, stream):
        decoder = Decoder(source, stream, declared_duration(container, stream))
        decoder.about = others_note(source, container)
        yield decoder, decoder.frames(container)


class Picture:
    """A decoded frame as RGB, rotated as shown; each size is made when it is first asked for."""

    def __init__(self, frame: av.VideoFrame, hdr: Hdr | None) -> None:
        self._frame, self._hdr = frame, hdr
        self._made: dict[int | None, np.ndarray] = {}

    def rgb(self, reformatter: VideoReformatter, side: int | None) -> np.ndarray:
        """uint8 `(H, W, 3)`: squashed to a square of `side` pixels, or whole for None.

        Whole HDR pictures are of half the size, or less, where they are large.
        """
        if side not in self._made:
            try:
                pixels = self._converted(reformatter, side)
            except (av.error.FFmpegError, ValueError) as error:
                raise InputError(
                    f"A frame in the pixel format {self._frame.format.name} cannot be converted: "
                    f"{reason(error)}. Convert the video to H.264 first."
                ) from error
            self._made[side] = np.ascontiguousarray(as_shown(pixels, self._frame))
        return self._made[side]

    def _converted(self, reformatter: VideoReformatter, side: int | None) -> np.ndarray:
        frame, width, height = over_white(self._frame), side, side
        if self._hdr is not None and side is None:
            smaller = -(-min(frame.width, frame.height) // _MOST_HDR)
            width, height = frame.width // smaller, frame.height // smaller
        way = {} if width is None else {"interpolation": Interpolation.AREA}
        if self._hdr is None:
            return reformatter.reformat(frame, width, height, "rgb24", **way).to_ndarray()
        deep = reformatter.reformat(frame, width, height, "rgb48le", **way)
        return to_sdr(deep.to_ndarray(), self._hdr)


class _Sampler:
    """Keeps, for each k / rate, the frame that stands for that time."""

    def __init__(self, rate: Rate, size: int, fit: Fit | None, pick: Pick) -> None:
        self.rate, self.count = rate, 0
        self._size, self._fit, self._pick = size, fit, pick
        self._reformatter = VideoReformatter()
        self._held: Picture | None = None
        self._pieces: list[Any] = []  # since the last block
        self._last: tuple[Picture, Any] | None = None

    def push(self, time: Fraction, picture: Picture) -> None:
        if self._pick == "next":
            while Fraction(self.count, self.rate) <= time + _TIME_ROUNDING:
                self._keep(picture)
        elif self._held is not None and self._pick == "nearest":
            while self.count < math.floor(time * self.rate + Fraction(1, 2)):
                self._keep(self._held)
        elif self._held is not None:
            while Fraction(self.count, self.rate) + _TIME_ROUNDING < time:
                self._keep(self._held)
        self._held = picture

    def take(self) -> list[Any]:
        """Return what was picked since the last call, as pieces `(1, H, W, 3)`."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self, count: int) -> list[Any]:
        """Return the rest of `count` pictures: the last one is held, what is beyond is cut off."""
        assert self._held is not None
        while self.count < count:
            self._keep(self._held)
        pieces = self.take()
        return pieces[: len(pieces) - (self.count - count)]

    def _keep(self, picture: Picture) -> None:
        self.count += 1
        if self._last is None or self._last[0] is not picture:
            if self._fit is None:
                piece = picture.rgb(self._reformatter, self._size)[None]
            else:
                piece = self._fit(picture.rgb(self._reformatter, None)[None])
            self._last = picture, piece
        self._pieces.append(self._last[1])


def thumbnails(
    video: Any, seconds: float, count: int = 12, size: int = 96
) -> tuple[list[np.ndarray], float]:
    """Read pictures from the middles of equal parts of a video.

    Args:
        video: As for `mfmjt.Pipeline`.
        seconds: How much of it is divided into parts.
        count: Number of parts, fewer where there are not as many pictures.
        size: Side of the pictures, in pixels.

    Returns:
        Pictures `(size, size, 3)` uint8, and the second at which the last of their parts ends.

    Raises:
        InputError: The video cannot be read, or is shorter.
    """
    rate = 25
    part = max(1.0, seconds * rate / count)
    shown: list[np.ndarray] = []
    place = 0
    for (pictures,) in VideoStream(as_source(video), (rate,), size, duration=seconds):
        for picture in pictures:
            if place >= int((len(shown) + 0.5) * part) and len(shown) < count:
                shown.append(np.asarray(picture)[0])
            place += 1
    return shown, min(seconds, len(shown) * part / rate)


def _frame_count(duration: float | Fraction, rate: Rate) -> int:
    return max(1, round(duration * rate))


def _too_long(path: Path | Pictures, length: str, limit: float) -> InputError:
    return InputError(
        f"{path} lasts {length}, and sound is made for at most {limit:g} s unless told otherwise. "
        "Choose how much of it with --duration (duration= in Python)."
    )
