"""Video files in, sound files and videos with sound out: the only module that knows containers.

Pictures are read on a uniform time grid and written never: `mux` copies the video's packets as
they are and adds a sound track beside them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

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
    "Video",
    "check_output",
    "mux",
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
    path = Path(path)
    sizes = [size] * len(rates) if isinstance(size, int) else list(size)
    with _open_video(path) as (container, stream):
        declared = _declared_duration(container, stream)
        if duration is None and limit is not None and declared is not None and declared > limit:
            raise _too_long(path, f"{float(declared):.1f} s", limit)
        samplers = [_Sampler(rate, side) for rate, side in zip(rates, sizes, strict=True)]
        counts = [] if duration is None else [_frame_count(duration, rate) for rate in rates]
        decoder = _Decoder(path, stream)
        for time, frame in decoder.frames(container):
            if duration is None and limit is not None and time > limit:
                raise _too_long(path, f"more than {limit:g} s", limit)
            for sampler in samplers:
                sampler.push(time, frame)
            if counts and all(len(s.frames) >= n for s, n in zip(samplers, counts, strict=True)):
                break
    if decoder.count == 0:
        raise InputError(f"No frame of {path} can be decoded. Give a video that plays.")
    end = decoder.end
    if duration is None:
        if decoder.count == 1:
            raise InputError(
                f"{path} has a single frame, so nothing in it moves. Give a video, "
                "or leave it out and describe the sound with a prompt."
            )
        notes = decoder.notes(declared)
    else:
        if end + decoder.step < duration:
            raise InputError(
                f"{path} lasts {float(end):.2f} s, less than the {duration:g} s asked for. "
                "Leave out the duration, or give a shorter one."
            )
        end = Fraction(duration)
        notes = decoder.notes(None)
    return Video(
        frames=tuple(s.finish(_frame_count(end, s.rate)) for s in samplers),
        duration=float(end),
        fps=float(1 / decoder.step),
        width=decoder.width,
        height=decoder.height,
        notes=notes,
    )


def mux(
    video_path: str | os.PathLike[str],
    waveform: np.ndarray,
    sample_rate: int,
    out_path: str | os.PathLike[str],
) -> None:
    """Write the video with this sound; its pictures are copied packet by packet, unchanged.

    The sound replaces any the video has. Pictures that start after the sound's end are left out,
    save those that an earlier picture is predicted from.

    Args:
        video_path: The video to take the pictures from; rotation is kept.
        waveform: Float samples `(channels, samples)` in [-1, 1], one or two channels.
        sample_rate: Of the waveform, in Hz.
        out_path: Where to write; the suffix chooses the container (`VIDEO_SUFFIXES`).

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
    with _open_video(video_path) as (source, stream), atomic_path(out_path) as temporary:
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
            soundfile.write(
                str(temporary), samples.T, sample_rate, format=file_format, subtype=subtype
            )
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

    def __init__(self, path: Path, stream: Any) -> None:
        rate = stream.average_rate or stream.guessed_rate or 25
        # A damaged header can state any rate; the step only closes gaps in the time stamps.
        self.step = 1 / Fraction(min(max(rate, 1), 1000))
        self.path, self.stream = path, stream
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


class _Sampler:
    """Keeps, for each k / rate, the frame that was on the screen then."""

    def __init__(self, rate: int, size: int) -> None:
        self.rate, self.size = rate, size
        self.frames: list[np.ndarray] = []
        self._reformatter = VideoReformatter()
        self._frame: av.VideoFrame | None = None
        self._picture: np.ndarray | None = None

    def push(self, time: Fraction, frame: av.VideoFrame) -> None:
        if self._frame is not None:
            while Fraction(len(self.frames), self.rate) + _TIME_ROUNDING < time:
                self.frames.append(self._converted())
        self._frame, self._picture = frame, None

    def finish(self, count: int) -> np.ndarray:
        while len(self.frames) < count:
            self.frames.append(self._converted())
        return np.stack(self.frames[:count])

    def _converted(self) -> np.ndarray:
        """The held frame as RGB; frames that no grid point picks are never converted."""
        if self._picture is None:
            assert self._frame is not None
            try:
                small = self._reformatter.reformat(
                    self._frame, self.size, self.size, "rgb24", interpolation=Interpolation.AREA
                )
                picture = small.to_ndarray()
            except (av.error.FFmpegError, ValueError) as error:
                raise InputError(
                    f"A frame in the pixel format {self._frame.format.name} cannot be converted: "
                    f"{_reason(error)}. Convert the video to H.264 first."
                ) from error
            turns = round(self._frame.rotation / 90)  # counterclockwise
            self._picture = np.ascontiguousarray(np.rot90(picture, turns))
        return self._picture


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
    sample_rate = sound.rate
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples), "fltp", _LAYOUTS[len(samples)]
    )
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
    queue = [*sound.encode(frame), *sound.encode(None)]
    queue.reverse()
    for packet in _packets_until(source, stream, end):
        # Sound goes in beside its pictures: players read both without seeking.
        while queue and queue[-1].pts * queue[-1].time_base <= packet.dts * packet.time_base:
            target.mux(queue.pop())
        packet.stream = pictures
        target.mux(packet)
    while queue:
        target.mux(queue.pop())


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


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    if not path.exists():
        raise InputError(f"There is no file {path}. Check the name.")
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give a video file.")
    try:
        # "file:" keeps a name such as "a:b.mp4" from being read as a protocol.
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened as a video: {_reason(error)}. "
            "Give a file that plays, such as an .mp4."
        ) from error
    with container:
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
    return samples.clip(-1.0, 1.0)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
