"""Files with sound: a video's pictures copied beside it, or the sound alone."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path, check_writable
from mfmjt.media._open import open_video, reason
from mfmjt.media.encode import encoded
from mfmjt.media.pictures import Pictures, as_source

__all__ = [
    "AUDIO_SUFFIXES",
    "VIDEO_SUFFIXES",
    "check_output",
    "containers_for",
    "default_suffix",
    "mux",
    "refuse_same",
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
_NEVER_COPIED = ("gif", "rawvideo")  # which .mov has names for and players do not show
_LAYOUTS = {1: "mono", 2: "stereo"}
_BIT_RATE_PER_CHANNEL = 96_000


def mux(
    video_path: Any,
    waveform: np.ndarray,
    sample_rate: int,
    out_path: str | os.PathLike[str],
    formats: str | None = None,
    fps: Any = None,
) -> tuple[str, ...]:
    """Write the video with this sound; its pictures are copied packet by packet, unchanged.

    The sound replaces any the video has. Pictures that start after the sound's end are left out,
    save those that an earlier picture is predicted from. What no container holds, such as a GIF,
    arrays and folders of pictures, is encoded once (`mfmjt.media.encode`).

    Args:
        video_path: The video to take the pictures from, as for `as_source`; rotation is kept.
        waveform: Float samples `(channels, samples)` in [-1, 1], one or two channels.
        sample_rate: Of the waveform, in Hz.
        out_path: Where to write; the suffix chooses the container (`VIDEO_SUFFIXES`).
        formats: As for `VideoStream`, of the input.
        fps: As for `as_source`.

    Returns:
        One line each on what was not copied as it is.

    Raises:
        InputError: The input is no video, the suffix is not known, the container cannot hold the
            video's codec, or the output is the input itself.
        RunError: The output cannot be written.
    """
    out_path = Path(out_path)
    # What is limited to some containers is a file.
    source = as_source(video_path, fps) if formats is None else Path(video_path)
    suffix = _suffix(out_path, VIDEO_SUFFIXES)
    refuse_same(source, out_path)
    samples = _checked(waveform)
    end = Fraction(samples.shape[1], sample_rate)
    if (unheld := _unheld(source, formats)) is not None:
        with encoded(source, suffix, end, formats) as copy:
            mux(copy, samples, sample_rate, out_path)
        return (f"The pictures are encoded once, since no container holds {unheld}.",)
    assert isinstance(source, Path)
    container_name, codec_name = VIDEO_SUFFIXES[suffix]
    codec = av.Codec(codec_name, "w")
    if sample_rate not in (codec.audio_rates or [sample_rate]):
        samples = soxr.resample(samples.T, sample_rate, 48_000).T
        sample_rate = 48_000
    opened = open_video(source, formats)
    with opened as (container, stream), atomic_path(out_path) as temporary:
        _check_holds(stream, suffix)
        options = _CONTAINER_OPTIONS.get(container_name, {})
        try:
            with av.open(str(temporary), "w", format=container_name, options=options) as target:
                pictures = target.add_stream_from_template(stream, opaque=True)
                sound = _add_sound(target, codec_name, len(samples), sample_rate)
                _write_tracks(container, stream, target, pictures, sound, samples, end)
        except (av.error.FFmpegError, OSError) as error:
            raise RunError(f"Cannot write {out_path}: {reason(error)}. Check the disk.") from error
    return ()


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
            raise RunError(f"Cannot write {path}: {reason(error)}. Check the disk.") from error


def check_output(video_path: Any, out_path: str | os.PathLike[str], fps: Any = None) -> None:
    """Raise the error that writing would end with, as far as it can be known before any work.

    Args:
        video_path: The video whose sound is to be written, as for `as_source`; None if there is
            only sound.
        out_path: The file to be written, of sound or of video.
        fps: As for `as_source`.

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
    source = as_source(video_path, fps)
    refuse_same(source, out_path)
    if _unheld(source) is None:
        assert isinstance(source, Path)
        with open_video(source) as (_, stream):
            if suffix in VIDEO_SUFFIXES:
                _check_holds(stream, suffix)


def default_suffix(source: Path | Pictures) -> str:
    """Return the suffix of a video that may be written with a source's pictures.

    Args:
        source: A result of `as_source`.

    Raises:
        InputError: The source cannot be opened.
    """
    if _unheld(source) is not None:
        return ".mp4"
    assert isinstance(source, Path)
    with open_video(source) as (_, stream):
        there = containers_for(stream)
    own = source.suffix.lower()
    return own if own in there else there[0]


def _unheld(source: Path | Pictures, formats: str | None = None) -> str | None:
    """What a source's pictures are, if there is no container to copy them into; else None."""
    if isinstance(source, Pictures):
        return source.kind
    with open_video(source, formats) as (_, stream):
        codec: str = stream.codec_context.codec.canonical_name
        copied = codec not in _NEVER_COPIED and containers_for(stream)
    return None if copied else codec


def containers_for(stream: Any) -> tuple[str, ...]:
    """Return the suffixes of `VIDEO_SUFFIXES` whose container holds a video stream's packets.

    Each was tried: the header of such a file is written to memory.

    Args:
        stream: A video stream of an open PyAV container.
    """
    return tuple(suffix for suffix in VIDEO_SUFFIXES if _holds(stream, suffix))


def _holds(stream: Any, suffix: str) -> bool:
    try:
        with av.open(io.BytesIO(), "w", format=VIDEO_SUFFIXES[suffix][0]) as target:
            target.add_stream_from_template(stream, opaque=True)
            target.start_encoding()
    except (av.error.FFmpegError, ValueError):
        return False
    return True


def _check_holds(stream: Any, suffix: str) -> None:
    if _holds(stream, suffix):
        return
    others = containers_for(stream)
    instead = f"Choose {' or '.join(others)}, or write" if others else "Write"
    raise InputError(
        f"A {suffix} file cannot hold {stream.codec_context.codec.canonical_name} video as it is. "
        f"{instead} only the sound (.wav)."
    )


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


def refuse_same(source: Path | Pictures | None, out_path: Path) -> None:
    """Raise InputError if a file to be written is one that the source is made of."""
    files = source.files if isinstance(source, Pictures) else [source] if source else []
    if out_path.exists() and any(f.exists() and out_path.samefile(f) for f in files):
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
