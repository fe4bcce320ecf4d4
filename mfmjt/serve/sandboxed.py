"""The process in which an upload is opened: what a hostile file breaks is this process alone.

`python -m mfmjt.serve.sandboxed` reads one request (JSON) from its standard input, does one of two
things with a file in its working folder, and writes one line of JSON: what it found, or why the
file is refused. It imports no more than it needs, because every upload starts it anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from mfmjt import media
from mfmjt.errors import InputError, MfmjtError
from mfmjt.media._open import open_video
from mfmjt.media.check import destinations

__all__ = ["FORMATS", "kind", "main"]

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg"
"""Containers that are opened. None of them refers to other files or to addresses."""
MAX_SIDE = 8192
MAX_PIXELS = 4096 * 2304
MAX_RATE = 240
"""Frames per second, on the whole."""
MAX_WORK = 1920 * 1080 * 60
"""Pixels per second of the longest sound: what is decoded of a file."""
SURVEY_SECONDS = 2.0
FILE_SIZE = 4 * 2**30
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "mp4"),
    (4, b"moov", "mp4"),
    (4, b"mdat", "mp4"),
    (4, b"wide", "mp4"),
    (4, b"free", "mp4"),
    (4, b"skip", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
)


def kind(head: bytes) -> str | None:
    """Return the container by a file's first 600 bytes, None if it is none that is opened."""
    for place, mark, name in _SIGNATURES:
        if head[place : place + len(mark)] == mark:
            return name
    packets = head[::188]
    return "mpegts" if len(packets) > 2 and set(packets[:3]) == {0x47} else None


def main() -> None:
    """Do what standard input asks for, and write the result to standard output as one line."""
    request = json.load(sys.stdin)
    _follow_parent()
    options = _options(request["specs"]) if request["do"] == "read" else {}
    _limit(request["memory"], request["seconds"])
    video = Path("upload")
    try:
        # FFmpeg logs to the terminal, which nobody reads here.
        av.logging.set_level(None)
        answer = _read(video, request, options) if request["do"] == "read" else _mux(video, request)
    except MfmjtError as error:
        answer = {"refused": _plain(str(error), "the file")}
    except MemoryError:
        answer = {"refused": "The file needs too much memory to be read. Scale the video down."}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing of the decoder's own threads and clean-up is worth waiting for


def _read(video: Path, request: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Write the frames of stream N as `frames-N.npy`; return what is known of the video."""
    duration, limit = request["duration"], request["limit"]
    with video.open("rb") as file:
        head = file.read(600)
    if kind(head) is None:
        raise InputError(
            "The file is no video of a kind that is taken here. Give .mp4, .mov, .webm, .mkv, "
            ".avi or .ts."
        )
    signal.setitimer(signal.ITIMER_REAL, SURVEY_SECONDS)
    _survey(video, duration, limit)
    signal.setitimer(signal.ITIMER_REAL, 0)
    stream = media.VideoStream(video, duration=duration, limit=limit, formats=FORMATS, **options)
    found: list[list[Any]] = [[] for _ in options["rates"]]
    for block in stream:
        for pieces, new in zip(found, block, strict=True):
            pieces += [np.asarray(piece) for piece in new]
    for i, pieces in enumerate(found):
        np.save(f"frames-{i}.npy", np.concatenate(pieces), allow_pickle=False)
    containers, notes = destinations(video, Fraction(stream.duration), FORMATS)
    return {
        "duration": stream.duration,
        "fps": stream.fps,
        "width": stream.width,
        "height": stream.height,
        "containers": containers,
        "notes": [_plain(note) for note in (*stream.notes, *notes)],
    }


def _plain(text: str, name: str = "the video") -> str:
    """Return a message of `media` without the name `upload`, which no user knows."""
    text = text.replace("upload", name, 1)
    return text[0].upper() + text[1:]


def _survey(video: Path, duration: float | None, limit: float) -> None:
    """Refuse, before the first frame is decoded, what would take too long to decode.

    An index that takes too long to be looked at ends the process by SIGALRM.
    """
    with open_video(video, FORMATS) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            raise InputError(
                f"The video has frames of {width}x{height}: more than "
                f"{MAX_PIXELS / 1e6:.1f} million pixels are not taken. Scale it down first."
            )
        if stream.duration and stream.time_base and duration is None:
            lasts = float(stream.duration * stream.time_base)
            if lasts > limit:
                raise InputError(
                    f"The video lasts {lasts:.1f} s, and at most {limit:g} s get sound here. "
                    "Give a duration: it counts from the video's start."
                )
        frames = 0
        max_frames = min(limit * MAX_RATE, limit * MAX_WORK / max(1, width * height))
        with contextlib.suppress(av.error.FFmpegError, ValueError):
            for packet in container.demux(stream):
                frames += packet.size > 0
                if frames > max_frames:
                    break
        if frames > max_frames:
            raise InputError(
                f"The video has more than {max_frames:.0f} frames of {width}x{height}: decoding it "
                f"would take too long. Give at most {limit:g} s, or scale it down."
            )


def _mux(video: Path, request: dict[str, Any]) -> dict[str, Any]:
    samples, rate = soundfile.read(request["sound"], dtype="float32", always_2d=True)
    waveform = np.ascontiguousarray(samples.T)
    notes = media.mux(video, waveform, rate, request["output"], FORMATS)
    return {"notes": [_plain(note) for note in notes]}


def _options(specs: list[list[Any]]) -> dict[str, Any]:
    """Return arguments of `media.VideoStream` for the frames that the encoders take.

    Args:
        specs: `FrameSpec` of each stream.
    """
    rates, sizes, fits, picks = zip(*specs, strict=True)
    if fits[0] == "decoder":  # without PyTorch, which takes long to load
        return {"rates": rates, "size": sizes, "fit": None, "pick": picks[0]}
    import torch

    from mfmjt.encoders.base import FrameSpec, stream_options

    torch.set_num_threads(2)
    return stream_options([FrameSpec(*spec) for spec in specs])


def _limit(memory: int, seconds: float) -> None:
    """Bound this process: address space, processor time, size of files, no core dump."""
    limits = {
        resource.RLIMIT_CPU: int(2 * seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if sys.platform == "linux":  # others do not say how much there is already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (lower, lower))


def _follow_parent() -> None:
    """Let Linux end this process when the server ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    main()
