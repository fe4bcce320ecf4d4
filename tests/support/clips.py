"""Small real media files for tests, and a model of random weights for the whole way through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BLACK, STEP = 24, 4  # grey of frame 0, and what each further one adds
DARKER = 1.5  # what the trip through video range takes away from a grey, on average


def grey(index: int, height: int, width: int) -> np.ndarray:
    """A picture that says which frame it is."""
    return np.full((height, width, 3), BLACK + STEP * index, np.uint8)


def frame_index(pictures: np.ndarray) -> list[int]:
    """Which frames of a `grey` video these pictures (T, H, W, 3) are."""
    return [round((float(p.mean()) + DARKER - BLACK) / STEP) for p in pictures]


def moving(i: int, height: int, width: int) -> np.ndarray:
    """A light square that goes to the right over a dark ground."""
    picture = np.full((height, width, 3), 40, np.uint8)
    left = i * 3 % (width - 8)
    picture[8:16, left : left + 8] = 220
    return picture


def write_video(
    path: Path,
    frames: int = 50,
    size: tuple[int, int] = (48, 64),
    rate: int = 25,
    times_ms: Sequence[int] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = grey,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode `frames` pictures of (height, width), at `rate` or at the given times."""
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=rate)
        video.height, video.width = size
        video.pix_fmt = pixels
        if times_ms is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            video.options = {"preset": "ultrafast", "bf": "2", "crf": "10"}
        track = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts = i if times_ms is None else times_ms[i]
            frame.time_base = Fraction(1, rate) if times_ms is None else Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if track is not None:
            encode_sound(container, track, frames / rate)
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """An .m4a or the like: a container with a sound track and no pictures."""
    with av.open(str(path), "w") as container:
        encode_sound(container, container.add_stream("aac", rate=16000, layout="mono"), seconds)
    return path


def encode_sound(container: av.container.OutputContainer, track, seconds: float) -> None:
    samples = np.sin(np.arange(round(seconds * 16000)) * 0.2).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(track.encode(frame))
    container.mux(track.encode())


def rotate(path: Path, quarter_turns: int) -> Path:
    """Set the display matrix of an .mp4: players turn it so often, counterclockwise."""
    content = bytearray(path.read_bytes())
    one = 1 << 16
    cosine, sine = ((one, 0), (0, one), (-one, 0), (0, -one))[quarter_turns % 4]
    matrix = (cosine, -sine, 0, sine, cosine, 0, 0, 0, 1 << 30)
    start = content.index(b"tkhd") + 44  # the box's name, then 40 bytes of version 0
    content[start : start + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    path.write_bytes(bytes(content))
    return path


def packets(path: Path, kind: str) -> list[bytes]:
    """The encoded packets of the only stream of a kind, "video" or "audio"."""
    with av.open(str(path)) as container:
        (stream,) = getattr(container.streams, kind)
        return [bytes(p) for p in container.demux(stream) if p.size]


def decoded_sound(path: Path) -> np.ndarray:
    """The sound track as samples (S,), from the first channel."""
    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
