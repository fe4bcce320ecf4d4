"""Files with sound: a video's pictures copied beside it, or the sound alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path, check_writable
from mfmjt.media._copy import (
    HIDING,
    VIDEO_SUFFIXES,
    add_pictures,
    container_options,
    containers_for,
    copy_tags,
    hide_from,
    hiding,
    holds,
    left_out,
)
from mfmjt.media._open import (
    in_decoding_order,
    in_mov,
    open_video,
    others_note,
    packets,
    step_of,
)
from mfmjt.media._times import Times, copied_times
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

    The sound replaces any the video has. Each picture is shown when it is in the video, from the
    first one on, at 0 s. Pictures that start after the sound's end are left out, save those that
    an earlier picture is predicted from; of these, .mp4, .m4v and .mov tell players to hide them.
    What no container holds, such as a GIF or a folder of pictures, is encoded once.

    Args:
        video_path: The video to take the pictures from, as for `as_source`; rotation, colors and
            tags are kept.
        waveform: Float samples `(channels, samples)` in [-1, 1], one or two channels.
        sample_rate: Of the waveform, in Hz.
        out_path: Where to write; the suffix chooses the container (`VIDEO_SUFFIXES`).
        formats: As for `VideoStream`, of the input.
        fps: As for `as_source`.

    Returns:
        One line each on what of the video is not in the output as it was, its sound apart.

    Raises:
        InputError: The input is no video, the suffix is not known, the container cannot hold the
            video's codec or hide what an edit list does, or the output is the input itself.
        RunError: The output cannot be written.
    """
    out_path = Path(out_path)
    # What is limited to some containers is a file.
    given = as_source(video_path, fps) if formats is None else Path(video_path)
    suffix = _suffix(out_path, VIDEO_SUFFIXES)
    refuse_same(given, out_path)
    samples = _checked(waveform)
    end = Fraction(samples.shape[1], sample_rate)
    if (kind := unheld(given, formats)) is not None:
        with encoded(given, suffix, end, formats) as copy:
            mux(copy, samples, sample_rate, out_path)
        return (f"The pictures are encoded once, since no container holds {kind}.",)
    assert isinstance(given, Path)
    video_path = given
    container_name, codec_name = VIDEO_SUFFIXES[suffix]
    codec = av.Codec(codec_name, "w")
    if sample_rate not in (codec.audio_rates or [sample_rate]):
        samples = soxr.resample(samples.T, sample_rate, 48_000).T
        sample_rate = 48_000
    times = copied_times(video_path, end, formats)
    opened = open_video(video_path, formats)
    with opened as (source, stream), atomic_path(out_path) as temporary:
        _check_holds(stream, suffix)
        _check_hides(video_path, stream, times, suffix)
        notes = others_note(video_path, source) + left_out(video_path, source, stream, suffix)
        if times.until is not None and suffix not in HIDING:
            beyond = sum(ticks >= times.until for ticks in times.shown)
            others = hiding(stream)
            notes += (
                f"{out_path} shows {beyond} of the pictures after its sound's end: earlier ones "
                f"are predicted from them.{others and f' Hidden they are in {others}.'}",
            )
        options = container_options(source, suffix)
        try:
            with av.open(str(temporary), "w", format=container_name, options=options) as target:
                pictures = add_pictures(target, source, stream, suffix)
                copy_tags(source, target, times.zero, end)
                sound = _add_sound(target, codec_name, len(samples), sample_rate)
                _write_tracks(source, stream, target, pictures, sound, samples, times)
            if times.until is not None and suffix in HIDING:
                hide_from(temporary, times.until * stream.time_base)
        except (av.error.FFmpegError, OSError) as error:
            raise RunError(f"Cannot write {out_path}: {reason(error)}. Check the disk.") from error
    return notes


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
    given = as_source(video_path, fps)
    refuse_same(given, out_path)
    if unheld(given) is not None:
        return
    assert isinstance(given, Path)
    video_path = given
    with open_video(video_path) as (source, stream):
        if suffix not in VIDEO_SUFFIXES:
            return
        _check_holds(stream, suffix)
        if in_mov(source) and suffix not in HIDING:
            _check_hides(video_path, stream, copied_times(video_path), suffix)


def default_suffix(source: Path | Pictures) -> str:
    """Return the suffix of a video that may be written with a source's pictures.

    Args:
        source: A result of `as_source`.

    Raises:
        InputError: The source cannot be opened.
    """
    if unheld(source) is not None:
        return ".mp4"
    assert isinstance(source, Path)
    with open_video(source) as (_, stream):
        there = containers_for(stream)
    own = source.suffix.lower()
    return own if own in there else there[0]


def unheld(source: Path | Pictures, formats: str | None = None) -> str | None:
    """Return what a source's pictures are if no container holds them as they are, else None."""
    if isinstance(source, Pictures):
        return source.kind
    with open_video(source, formats) as (_, stream):
        codec: str = stream.codec_context.codec.canonical_name
        copied = codec not in _NEVER_COPIED and containers_for(stream)
    return None if copied else codec


def _check_holds(stream: Any, suffix: str) -> None:
    if holds(stream, suffix):
        return
    others = containers_for(stream)
    instead = f"Choose {' or '.join(others)}, or write" if others else "Write"
    raise InputError(
        f"A {suffix} file cannot hold {stream.codec_context.codec.canonical_name} video as it is. "
        f"{instead} only the sound (.wav)."
    )


def _check_hides(path: Path, stream: Any, times: Times, suffix: str) -> None:
    if times.edited and suffix not in HIDING:
        raise InputError(
            f"The edit list of {path} hides pictures that others are predicted from, and a "
            f"{suffix} file would show them. Choose {hiding(stream) or 'only the sound (.wav)'}."
        )


def _add_sound(target: Any, codec_name: str, channels: int, sample_rate: int) -> Any:
    return target.add_stream(
        codec_name,
        rate=sample_rate,
        layout=_LAYOUTS[channels],
        bit_rate=_BIT_RATE_PER_CHANNEL * channels,
        disposition=av.stream.Disposition.default,
    )


def _write_tracks(
    source: Any,
    stream: Any,
    target: Any,
    pictures: Any,
    sound: Any,
    samples: np.ndarray,
    times: Times,
) -> None:
    """Write both tracks, interleaved."""
    shift = 0
    if target.format.name not in {VIDEO_SUFFIXES[suffix][0] for suffix in HIDING}:
        shift = -min(0, *times.shown[times.first :])  # no time is below 0 in such a file
    encoded = _encoded(sound, samples, shift * stream.time_base)
    heard = next(encoded, None)
    last = len(times.shown) - 1
    step = max(1, round(step_of(stream) / stream.time_base))
    untimed = in_decoding_order(source, stream)
    for number, packet in enumerate(packets(source, stream)):
        if number < times.first:
            continue
        packet.pts, packet.dts = times.shown[number] + shift, times.decoded[number] + shift
        packet.duration = step if untimed else packet.duration or step
        # Sound goes in beside its pictures: players read both without seeking.
        while heard is not None and heard.pts * heard.time_base <= packet.dts * packet.time_base:
            target.mux(heard)
            heard = next(encoded, None)
        packet.stream = pictures
        target.mux(packet)
        if number == last:
            break
    while heard is not None:
        target.mux(heard)
        heard = next(encoded, None)


def _encoded(sound: Any, samples: np.ndarray, begins: Fraction) -> Iterator[Any]:
    """Packets of the sound track, encoded a second at a time as they are asked for."""
    rate = sound.rate
    shift = round(begins * rate)
    for start in range(0, samples.shape[1], rate):
        part = np.ascontiguousarray(samples[:, start : start + rate].clip(-1.0, 1.0))
        frame = av.AudioFrame.from_ndarray(part, "fltp", _LAYOUTS[len(part)])
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = start + shift
        yield from sound.encode(frame)
    yield from sound.encode(None)


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
