"""Files of video and sound in, and out again with sound: the only module that knows containers.

Pictures are read on a uniform time grid and written never: `mux` copies the video's packets as
they are and adds a sound track beside them.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
import soundfile
import soxr
from av.video.reformatter import Interpolation, VideoReformatter

from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path, check_writable

__all__ = [
    "AUDIO_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Pick",
    "Video",
    "VideoStream",
    "check_output",
    "mux",
    "read_audio",
    "read_video",
    "write_audio",
]

# Suffix -> (soundfile's format, its subtype).
AUDIO_SUFFIXES = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
# Suffix -> (FFmpeg's name of the container, the encoder of the sound track).
VIDEO_SUFFIXES = {
    ".mp4": ("mp4", "aac"),
    ".m4v": ("mp4", "aac"),
    ".mov": ("mov", "aac"),
    ".mkv": ("matroska", "aac"),
    ".webm": ("webm", "libopus"),
}
_FAST_START = {"movflags": "faststart"}  # the index comes first: plays while it loads
_CONTAINER_OPTIONS = {"mp4": _FAST_START, "mov": _FAST_START}
_LAYOUTS = {1: "mono", 2: "stereo"}
_BIT_RATE_PER_CHANNEL = 96_000
_TIME_ROUNDING = Fraction(2, 1000)  # Matroska keeps milliseconds only
_MAX_PIXELS = 8192 * 8192
_MAX_JUMP = 10  # seconds of time stamps beyond the stated end: more is damage
_BLOCK = 1  # seconds
_OPENING = {"protocol_whitelist": "file"}  # no file makes FFmpeg open an address
_DECODER_THREADS = 4  # each holds a frame: enough for 4K in real time, small in memory


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


Pick = Literal["shown", "next"]
"""Which picture stands for a time: the one on the screen then, or the next that comes."""
Fit = Callable[[np.ndarray], Any]
"""Makes a uint8 `(1, H, W, 3)` picture, as it is decoded, what a network is given."""


def read_video(
    path: str | os.PathLike[str],
    rates: Sequence[int] = (8, 25),
    size: int | Sequence[int] = 64,
    duration: float | None = None,
    limit: float | None = None,
) -> Video:
    """Read a video's pictures at uniform rates, each squashed to a square.

    The picture for time k / rate is the frame on the screen at that time, as in training, whatever
    the file's own and perhaps variable frame rate. Rotation is applied. Frames are scaled down as
    they are decoded, so memory does not grow with the resolution.

    Args:
        path: Any file that PyAV can open.
        rates: Pictures per second, one array for each.
        size: Side of the pictures in pixels: one for all rates, or one for each.
        duration: Read only so many seconds from the start; None reads the whole video.
        limit: Refuse a video longer than so many seconds when `duration` is None.

    Raises:
        InputError: The file is missing, is no video, has nothing that can be decoded, has a single
            frame, is longer than `limit` or shorter than `duration`.
    """
    stream = VideoStream(path, rates, size, duration, limit)
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
        path: Any file that PyAV can open.
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
        path: str | os.PathLike[str],
        rates: Sequence[int] = (8, 25),
        size: int | Sequence[int] = 64,
        duration: float | None = None,
        limit: float | None = None,
        fit: Sequence[Fit] | None = None,
        pick: Pick = "shown",
        formats: str | None = None,
    ) -> None:
        if pick not in get_args(Pick):
            raise InputError(f"No pick {pick!r}: choose one of {', '.join(get_args(Pick))}.")
        self.path = Path(path)
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
        with _open_video(path, self._formats) as (container, stream):
            declared = _declared_duration(container, stream)
            self.declared = None if declared is None else float(declared)
            if asked is None and limit is not None and declared is not None and declared > limit:
                raise _too_long(path, f"{float(declared):.1f} s", limit)
            decoder = _Decoder(path, stream, declared)
            block = _BLOCK
            for time, frame in decoder.frames(container):
                if asked is None and limit is not None and time > limit:
                    raise _too_long(path, f"more than {limit:g} s", limit)
                # Before the frame is seen: what the last one adds may be cut off again.
                if time >= block:
                    yield tuple(sampler.take() for sampler in samplers)
                    block = int(time) + _BLOCK
                picture = _Picture(frame)
                for sampler in samplers:
                    sampler.push(time, picture)
                if counts and all(s.count >= n for s, n in zip(samplers, counts, strict=True)):
                    break
        end = self._end(decoder)
        self.duration, self.fps = float(end), float(1 / decoder.step)
        self.width, self.height = decoder.width, decoder.height
        self.notes = decoder.notes(declared if asked is None else None)
        yield tuple(sampler.finish(_frame_count(end, sampler.rate)) for sampler in samplers)

    def _end(self, decoder: _Decoder) -> Fraction:
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


def read_audio(
    path: str | os.PathLike[str], sample_rate: int, duration: float | None = None
) -> np.ndarray:
    """Read the first sound track of a file of sound or of video as one channel.

    Time 0 is the first picture of a video: a track that begins later begins with silence, and what
    comes before is cut off. Channels are averaged.

    Args:
        path: Any file that PyAV can open.
        sample_rate: Wanted, in Hz.
        duration: Read only so many seconds from the start; None reads the whole track.

    Returns:
        float32 `(samples,)`, which may be fewer than asked for, and not finite if the file's are.

    Raises:
        InputError: The file is missing, has no sound track, or nothing of it can be decoded.
    """
    path = Path(path)
    parts: list[np.ndarray] = []
    with _open(path, "a file of sound or video", None) as container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            raise InputError(f"{path} has no sound track that can be read. Give a file with one.")
        rate, wanted, skipped = 0, 0.0, 0
        for samples, rate, time in _decoded_sound(path, container):
            if not parts:
                wanted = math.inf if duration is None else math.ceil(duration * rate)
                skipped = round((_first_picture(container, time) - time) * rate)
                # As long as the file says, which may be damaged, but not longer than is wanted.
                parts.append(np.zeros(int(min(max(0, -skipped), wanted)), np.float32))
                skipped = max(0, skipped)
            parts.append(samples[skipped:])
            skipped = max(0, skipped - len(samples))
            if sum(map(len, parts)) >= wanted:
                break
    if not parts:
        raise InputError(f"No sound of {path} can be decoded. Give a file that plays.")
    whole = np.concatenate(parts)
    whole = whole[: int(min(wanted, len(whole)))]
    resampled: np.ndarray = soxr.resample(whole, rate, sample_rate)
    return resampled


def mux(
    video_path: str | os.PathLike[str],
    waveform: np.ndarray,
    sample_rate: int,
    out_path: str | os.PathLike[str],
    formats: str | None = None,
) -> None:
    """Write the video with this sound; its pictures are copied packet by packet, unchanged.

    The sound replaces any the video has. Pictures that start after the sound's end are left out,
    save those that an earlier picture is predicted from.

    Args:
        video_path: The video to take the pictures from; rotation is kept.
        waveform: Float samples `(channels, samples)` in [-1, 1], one or two channels.
        sample_rate: Of the waveform, in Hz.
        out_path: Where to write; the suffix chooses the container (`VIDEO_SUFFIXES`).
        formats: As for `VideoStream`, of the input.

    Raises:
        InputError: The input is no video, the suffix is not known, the container cannot hold the
            video's codec, or the output is the input itself.
        RunError: The output cannot be written.
    """
    video_path, out_path = Path(video_path), Path(out_path)
    suffix = _suffix(out_path, VIDEO_SUFFIXES)
    _refuse_same(video_path, out_path)
    samples = _checked(waveform)
    end = Fraction(samples.shape[1], sample_rate)
    container_name, codec_name = VIDEO_SUFFIXES[suffix]
    codec = av.Codec(codec_name, "w")
    if sample_rate not in (codec.audio_rates or [sample_rate]):
        samples = soxr.resample(samples.T, sample_rate, 48_000).T
        sample_rate = 48_000
    opened = _open_video(video_path, formats)
    with opened as (source, stream), atomic_path(out_path) as temporary:
        options = _CONTAINER_OPTIONS.get(container_name, {})
        try:
            with av.open(str(temporary), "w", format=container_name, options=options) as target:
                pictures = _add_pictures(target, stream, suffix)
                sound = _add_sound(target, codec_name, len(samples), sample_rate)
                _write_tracks(source, stream, target, pictures, sound, samples, end)
        except (av.error.FFmpegError, OSError) as error:
            raise RunError(
                f"Cannot write {out_path}: {_reason(error)}. Check the disk, or choose .mkv."
            ) from error


def write_audio(path: str | os.PathLike[str], waveform: np.ndarray, sample_rate: int) -> None:
    """Write a sound file whose format is chosen by the suffix (`AUDIO_SUFFIXES`).

    Args:
        path: Where to write.
        waveform: Float samples `(channels, samples)`; what lies beyond [-1, 1] is clipped.
        sample_rate: In Hz.

    Raises:
        InputError: The suffix is not known.
        RunError: The file cannot be written.
    """
    path = Path(path)
    file_format, subtype = AUDIO_SUFFIXES[_suffix(path, AUDIO_SUFFIXES)]
    samples = _checked(waveform)
    if subtype == "OPUS" and sample_rate not in (8_000, 12_000, 16_000, 24_000, 48_000):
        samples = soxr.resample(samples.T, sample_rate, 48_000).T
        sample_rate = 48_000
    with atomic_path(path) as temporary:
        try:
            with soundfile.SoundFile(
                str(temporary), "w", sample_rate, len(samples), subtype, format=file_format
            ) as file:
                for start in range(0, samples.shape[1], sample_rate):
                    file.write(samples[:, start : start + sample_rate].clip(-1.0, 1.0).T)
        except (soundfile.LibsndfileError, OSError) as error:
            raise RunError(f"Cannot write {path}: {_reason(error)}. Check the disk.") from error


def check_output(
    video_path: str | os.PathLike[str] | None, out_path: str | os.PathLike[str]
) -> None:
    """Raise the error that writing would end with, as far as it can be known before any work.

    Args:
        video_path: The video whose sound is to be written, None if there is only sound.
        out_path: The file to be written, of sound or of video.

    Raises:
        InputError: As from `write_audio` and `mux`.
        RunError: The folder does not exist or cannot be written.
    """
    out_path = Path(out_path)
    known = AUDIO_SUFFIXES if video_path is None else {**VIDEO_SUFFIXES, **AUDIO_SUFFIXES}
    suffix = _suffix(out_path, known)
    if out_path.is_dir():
        raise InputError(f"{out_path} is a folder. Give the name of a file in it.")
    check_writable(out_path)
    if video_path is None:
        return
    video_path = Path(video_path)
    _refuse_same(video_path, out_path)
    with _open_video(video_path) as (_, stream):
        if suffix in VIDEO_SUFFIXES:
            with av.open(io.BytesIO(), "w", format=VIDEO_SUFFIXES[suffix][0]) as target:
                _add_pictures(target, stream, suffix)


class _Decoder:
    """Frames in order of time from the first one at 0 s, past whatever is damaged."""

    def __init__(self, path: Path, stream: Any, declared: Fraction | None) -> None:
        rate = stream.average_rate or stream.guessed_rate or 25
        # A damaged header can state any rate; the step only closes gaps in the time stamps.
        self.step = 1 / Fraction(min(max(rate, 1), 1000))
        self.path, self.stream, self.declared = path, stream, declared
        self.count = self.damaged = self.width = self.height = 0
        self.end = Fraction(0)

    def frames(self, container: Any) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """Yield (seconds, frame); `count`, `end`, `width` and `height` follow along."""
        first: Fraction | None = None
        previous = Fraction(-1)
        for frame in self._decoded(container):
            if frame.width * frame.height > _MAX_PIXELS:
                raise InputError(
                    f"{self.path} has frames of {frame.width}x{frame.height}, more than "
                    f"{_MAX_PIXELS >> 20} million pixels. Scale the video down first."
                )
            base = Fraction(frame.time_base or self.stream.time_base or Fraction(1, 25))
            time = previous + self.step if frame.pts is None else frame.pts * base
            if first is None:
                first = time
            time -= first
            if self.count and time <= previous:
                time = previous + self.step
            if self.declared is not None and time > max(previous, self.declared) + _MAX_JUMP:
                self.damaged += 1
                time = previous + self.step
            previous = time
            self.count += 1
            held = (frame.duration or 0) * base
            self.end = time + (held if held > 0 else self.step)
            self.width, self.height = frame.width, frame.height
            if frame.rotation % 180:
                self.width, self.height = frame.height, frame.width
            yield time, frame

    def _decoded(self, container: Any) -> Iterator[av.VideoFrame]:
        packets = container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except (av.error.FFmpegError, ValueError):
                self.damaged += 1
                return
            try:
                yield from packet.decode()
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


class _Picture:
    """A decoded frame as RGB, rotated as shown; each size is made when it is first asked for."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self._frame = frame
        self._made: dict[int | None, np.ndarray] = {}

    def rgb(self, reformatter: VideoReformatter, side: int | None) -> np.ndarray:
        """uint8 `(H, W, 3)`: squashed to a square of `side` pixels, or whole for None."""
        if side not in self._made:
            way = {} if side is None else {"interpolation": Interpolation.AREA}
            try:
                small = reformatter.reformat(self._frame, side, side, "rgb24", **way)
                pixels = small.to_ndarray()
            except (av.error.FFmpegError, ValueError) as error:
                raise InputError(
                    f"A frame in the pixel format {self._frame.format.name} cannot be converted: "
                    f"{_reason(error)}. Convert the video to H.264 first."
                ) from error
            turns = round(self._frame.rotation / 90)  # counterclockwise
            self._made[side] = np.ascontiguousarray(np.rot90(pixels, turns))
        return self._made[side]


class _Sampler:
    """Keeps, for each k / rate, the frame that stands for that time."""

    def __init__(self, rate: int, size: int, fit: Fit | None, pick: Pick) -> None:
        self.rate, self.count = rate, 0
        self._size, self._fit, self._pick = size, fit, pick
        self._reformatter = VideoReformatter()
        self._held: _Picture | None = None
        self._pieces: list[Any] = []  # since the last block
        self._last: tuple[_Picture, Any] | None = None

    def push(self, time: Fraction, picture: _Picture) -> None:
        if self._pick == "next":
            while Fraction(self.count, self.rate) <= time + _TIME_ROUNDING:
                self._keep(picture)
        elif self._held is not None:
            while Fraction(self.count, self.rate) + _TIME_ROUNDING < time:
                self._keep(self._held)
        self._held = picture

    def take(self) -> list[Any]:
        """What was picked since the last call, as pieces `(1, H, W, 3)`."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self, count: int) -> list[Any]:
        """The rest of `count` pictures in all, the last one held or what is beyond cut off."""
        assert self._held is not None
        while self.count < count:
            self._keep(self._held)
        pieces = self.take()
        return pieces[: len(pieces) - (self.count - count)]

    def _keep(self, picture: _Picture) -> None:
        self.count += 1
        if self._last is None or self._last[0] is not picture:
            if self._fit is None:
                piece = picture.rgb(self._reformatter, self._size)[None]
            else:
                piece = self._fit(picture.rgb(self._reformatter, None)[None])
            self._last = picture, piece
        self._pieces.append(self._last[1])


def _add_pictures(target: Any, stream: Any, suffix: str) -> Any:
    try:
        return target.add_stream_from_template(stream, opaque=True)
    except ValueError as error:
        raise InputError(
            f"A {suffix} file cannot hold {stream.codec_context.name} video as it is. "
            "Choose another suffix, such as .mkv, or write only the sound (.wav)."
        ) from error


def _add_sound(target: Any, codec_name: str, channels: int, sample_rate: int) -> Any:
    return target.add_stream(
        codec_name,
        rate=sample_rate,
        layout=_LAYOUTS[channels],
        bit_rate=_BIT_RATE_PER_CHANNEL * channels,
    )


def _write_tracks(
    source: Any,
    stream: Any,
    target: Any,
    pictures: Any,
    sound: Any,
    samples: np.ndarray,
    end: Fraction,
) -> None:
    """Write both tracks, interleaved; pictures that start at `end` seconds or later are left."""
    encoded = _encoded(sound, samples)
    heard = next(encoded, None)
    for packet in _packets_until(source, stream, end):
        # Sound goes in beside its pictures: players read both without seeking.
        while heard is not None and heard.pts * heard.time_base <= packet.dts * packet.time_base:
            target.mux(heard)
            heard = next(encoded, None)
        packet.stream = pictures
        target.mux(packet)
    while heard is not None:
        target.mux(heard)
        heard = next(encoded, None)


def _encoded(sound: Any, samples: np.ndarray) -> Iterator[Any]:
    """Packets of the sound track, encoded a second at a time as they are asked for."""
    rate = sound.rate
    for start in range(0, samples.shape[1], rate):
        part = np.ascontiguousarray(samples[:, start : start + rate].clip(-1.0, 1.0))
        frame = av.AudioFrame.from_ndarray(part, "fltp", _LAYOUTS[len(part)])
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield from sound.encode(frame)
    yield from sound.encode(None)


def _packets_until(source: Any, stream: Any, end: Fraction) -> Iterator[Any]:
    """The stream's packets, starting at 0 s, whose picture is needed for the time before `end`."""
    start = stream.start_time or 0
    waiting = []
    previous = None
    try:
        for packet in source.demux(stream):
            if packet.dts is None and packet.pts is None:
                continue  # the empty packet that flushes decoders
            packet.dts = (packet.pts if packet.dts is None else packet.dts) - start
            packet.pts = packet.dts if packet.pts is None else packet.pts - start
            if previous is not None and packet.dts <= previous:
                continue  # no container takes time that stands still
            previous = packet.dts
            if packet.dts * packet.time_base >= end:
                return
            waiting.append(packet)
            if packet.pts * packet.time_base < end:
                yield from waiting
                waiting.clear()
    except (av.error.EOFError, av.error.InvalidDataError):
        return  # cut short: what was read is what the sound was made for


def _decoded_sound(path: Path, container: Any) -> Iterator[tuple[np.ndarray, int, Fraction]]:
    """Pieces of one channel (S,), their rate in Hz, and when each begins, past what is damaged."""
    stream = container.streams.audio[0]
    planes = av.AudioResampler(format="fltp")
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.error.EOFError):
            return
        except (av.error.InvalidDataError, ValueError):
            continue
        except av.error.FFmpegError:
            return
        for frame in frames:
            base = frame.time_base or stream.time_base or Fraction(1, frame.sample_rate)
            time = Fraction(0) if frame.pts is None else frame.pts * base
            try:
                pieces = planes.resample(frame)
            except ValueError as error:
                raise InputError(
                    f"The sound of {path} changes its rate or channels on the way. Convert it."
                ) from error
            for piece in pieces:
                yield piece.to_ndarray().mean(0, dtype=np.float32), piece.sample_rate, time


def _first_picture(container: Any, otherwise: Fraction) -> Fraction:
    """When a video's pictures begin, in seconds; sound alone begins with itself."""
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover and stream.start_time is not None:
            return Fraction(stream.start_time * stream.time_base)
    return otherwise


@contextlib.contextmanager
def _open(path: Path, what: str, formats: str | None) -> Iterator[Any]:
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
            f"{path} cannot be opened as {what.removesuffix(' file')}: {_reason(error)}. "
            "Give a file that plays, such as an .mp4."
        ) from error
    with container:
        yield container


@contextlib.contextmanager
def _open_video(path: Path, formats: str | None = None) -> Iterator[tuple[Any, Any]]:
    with _open(path, "a video file", formats) as container:
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


def _declared_duration(container: Any, stream: Any) -> Fraction | None:
    if stream.duration and stream.time_base:
        return Fraction(stream.duration * stream.time_base)
    if container.duration and not container.streams.audio:
        return Fraction(container.duration, av.time_base)
    return None


def _frame_count(duration: float | Fraction, rate: int) -> int:
    return max(1, round(duration * rate))


def _too_long(path: Path, length: str, limit: float) -> InputError:
    return InputError(
        f"{path} lasts {length}, and sound is made for at most {limit:g} s unless told otherwise. "
        "Choose how much of it with --duration (duration= in Python)."
    )


def _refuse_same(video_path: Path, out_path: Path) -> None:
    if out_path.exists() and video_path.exists() and out_path.samefile(video_path):
        raise InputError(f"The output {out_path} is the input itself. Choose another name.")


def _suffix(path: Path, known: dict[str, Any]) -> str:
    suffix = path.suffix.lower()
    if suffix not in known:
        raise InputError(
            f"The name {path} {'ends in ' + suffix if suffix else 'has no suffix'}, which tells no "
            f"format that can be written. Choose one of {', '.join(known)}."
        )
    return suffix


def _checked(waveform: Any) -> np.ndarray:
    samples = np.asarray(waveform, np.float32)
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= 2 or samples.shape[1] == 0:
        raise InputError(
            f"The waveform has shape {samples.shape}. Give (channels, samples), 1 or 2 channels."
        )
    if not np.isfinite(samples).all():
        raise InputError("The waveform has samples that are not finite. Generate it in float32.")
    return samples


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
