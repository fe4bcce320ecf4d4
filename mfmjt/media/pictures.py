"""Videos that are no video file: folders and patterns of pictures, arrays, animated WebP."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np

from mfmjt.errors import InputError
from mfmjt.media._open import open_container

__all__ = ["Pictures", "as_source", "content", "over_white"]

PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    *(".tga", ".jp2", ".ppm", ".pgm"),
)
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
DEFAULT_FPS = 25
_MOST_FPS = 1000
_NUMBER = re.compile(r"%(?:0(\d+))?d")
_BLOCK = 2**20
_MAX_PIXELS = 8192 * 8192
TURNS = (1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)
"""What `display` gives for 0 to 3 quarter turns, counterclockwise."""


class Pictures:
    """Pictures in a row with the time of each, of a video that no container holds.

    Args:
        name: What messages call it.
        stem: What files made from it are named after.
        times: When each picture begins, and after that when the last one ends, in seconds.
        decode: Gives the pictures anew each time it is called; None for one that is damaged.
        kind: What it is, as something that no container holds.
        files: The pictures' files, if there are any.
        notes: One line each on how it was understood.
    """

    def __init__(
        self,
        name: str,
        stem: str,
        times: Sequence[Fraction],
        decode: Callable[[], Iterator[av.VideoFrame | None]],
        kind: str,
        files: Sequence[Path] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.stem, self.times, self.files = name, stem, tuple(times), tuple(files)
        self.decode, self.kind, self.notes = decode, kind, notes

    def __str__(self) -> str:
        return self.name


class PictureDecoder:
    """Goes through `Pictures` once; has the face of the decoder of a file.

    Args:
        source: Whose pictures are wanted.
    """

    def __init__(self, source: Pictures) -> None:
        self.source, self.declared = source, source.times[-1]
        self.step = source.times[-1] / (len(source.times) - 1)
        self.count = self.damaged = self.width = self.height = 0
        self.end = Fraction(0)
        self.about, self.hdr = source.notes, None

    def frames(self) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """Yield (seconds, frame); `count`, `end`, `width` and `height` follow along."""
        for number, frame in enumerate(self.source.decode()):
            self.end = self.source.times[number + 1]
            if frame is None:
                self.damaged += 1
                continue
            refuse_huge(self.source, frame)
            self.count += 1
            self.width, self.height = shown_size(frame)
            yield self.source.times[number], frame

    def notes(self, declared: Fraction | None) -> tuple[str, ...]:
        """Say what was lost."""
        lost = f"{self.damaged} of the pictures of {self.source} cannot be read; those before "
        lost += "them are shown longer."
        return (lost,) if self.damaged else ()


def as_source(video: Any, fps: Any = None) -> Path | Pictures:
    """Find out what a video is given as.

    Args:
        video: A file; a folder of pictures, taken in the natural order of their names; a pattern
            such as `frames/%04d.png`; uint8 pictures `(T, H, W, 3)` as an array or a tensor on any
            device; such pictures or a path in a pair with their `fps`; or a result of this.
        fps: Pictures per second, of what has no times of its own: a number or, as text, a fraction.
            Folders and patterns are taken at 25 with a note if there is none.

    Returns:
        The path of a file that PyAV opens, or what stands for one.

    Raises:
        InputError: It is none of these, or `fps` is missing, out of range, or not needed.
    """
    if isinstance(video, tuple):
        if len(video) != 2 or fps is not None:
            raise InputError(
                "The video is a tuple that cannot be used. Give a pair (frames, fps) and no fps "
                "besides."
            )
        video, fps = video
    rate = None if fps is None else _rate(fps)
    if isinstance(video, Pictures) and rate is None:
        return video
    if hasattr(video, "shape") and hasattr(video, "dtype"):
        return _array(video, rate)
    if not isinstance(video, str | os.PathLike | Pictures):
        raise InputError(
            f"The video is a {type(video).__name__}. Give a file, a folder of pictures, or a pair "
            "(frames, fps) with frames an array (T, H, W, 3) of uint8."
        )
    if not isinstance(video, Pictures):
        path = Path(video)
        if path.is_dir():
            return _folder(path, rate)
        if _NUMBER.search(path.name) and not path.exists():
            return _pattern(path, rate)
        if rate is None:
            durations = _webp_durations(path)
            return _webp(path, durations) if len(durations) > 1 else path
    raise InputError(
        f"{video} has times of its own, so there is no use for fps. Leave it out: it is for "
        "folders, patterns and arrays of pictures."
    )


def content(source: Path | Pictures) -> Iterator[bytes]:
    """Yield all that decides on a source's pictures and its notes, whatever it is called."""
    if isinstance(source, Pictures):
        yield repr((source.times, [n.replace(source.name, "") for n in source.notes])).encode()
        if not source.files:
            for frame in source.decode():
                assert frame is not None  # arrays have nothing to decode
                yield repr((frame.width, frame.height)).encode()
                yield frame.to_ndarray().tobytes()
    for path in source.files if isinstance(source, Pictures) else [source]:
        with path.open("rb") as stream:
            if isinstance(source, Pictures):
                yield repr(os.fstat(stream.fileno()).st_size).encode()
            while block := stream.read(_BLOCK):
                yield block


def browser_delay(seconds: Fraction) -> Fraction:
    """For how long a picture is shown that asks for so long: no browser does 10 ms or less."""
    return seconds if seconds > Fraction(1, 100) else Fraction(1, 10)


def refuse_huge(source: Path | Pictures, frame: av.VideoFrame) -> None:
    """Raise InputError for a frame of more pixels than anything shows."""
    if frame.width * frame.height > _MAX_PIXELS:
        raise InputError(
            f"{source} has frames of {frame.width}x{frame.height}, more than "
            f"{_MAX_PIXELS >> 20} million pixels. Scale the video down first."
        )


def display(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return where the right side (x, y) and the bottom (x, y) of a picture go when it is shown."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives nothing where there is data of a kind that is new to it
        return TURNS[round(frame.rotation / 90) % 4]
    if matrix is None:
        return TURNS[0]
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return 0, 1 if b >= 0 else -1, 1 if c >= 0 else -1, 0
    return 1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1


def as_shown(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror the pixels `(H, W, C)` of a frame as players do."""
    a, b, c, d = display(frame)
    return (pixels.swapaxes(0, 1) if a == 0 else pixels)[:: b or d, :: a or c]


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Pixels across and down, as shown after rotation."""
    turned = display(frame)[0] == 0
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def over_white(frame: av.VideoFrame) -> av.VideoFrame:
    """Lay what is transparent over white, as a page shows it; others come back as they are."""
    if not (frame.format.has_palette or any(c.is_alpha for c in frame.format.components)):
        return frame
    rgba = frame.to_ndarray(format="rgba")
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return frame
    mixed = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(mixed.astype(np.uint8), "rgb24")


def _rate(fps: Any) -> Fraction:
    text = " ".join(str(fps).split())
    with contextlib.suppress(ValueError, ZeroDivisionError):
        # A fraction of "1e999999999" would be a number of a billion digits.
        rate = Fraction(text if "/" in text else f"{float(text):.9g}")
        if 1 / _MOST_FPS <= rate <= _MOST_FPS:
            return rate
    raise InputError(
        f"fps is {text:.40}. Give pictures per second, from "
        f"{1 / _MOST_FPS} to {_MOST_FPS}, such as 24 or 30000/1001."
    )


def _array(frames: Any, rate: Fraction | None) -> Pictures:
    shape = tuple(frames.shape)
    given = f"The video is an array of shape {shape} and dtype {frames.dtype}"
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        turned = len(shape) == 4 and shape[1] == 3
        order = "permute" if hasattr(frames, "permute") else "transpose"
        remedy = f"frames.{order}(0, 2, 3, 1)" if turned else "pictures in a row, channels last"
        raise InputError(f"{given}. Give (T, H, W, 3): {remedy}.")
    if str(frames.dtype).removeprefix("torch.") != "uint8":
        raise InputError(
            f"{given}. Give uint8 from 0 to 255, such as (255 * frames).round() of numbers from 0 "
            "to 1, as uint8."
        )
    if rate is None:
        raise InputError(f"{given}, without a rate. Give a pair (frames, fps), such as fps 25.")

    def decode() -> Iterator[av.VideoFrame]:
        for picture in frames:
            here = picture.cpu() if hasattr(picture, "cpu") else picture
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(here), "rgb24")

    return Pictures("The array", "array", _uniform(len(frames), rate), decode, "arrays")


def _folder(path: Path, rate: Fraction | None) -> Pictures:
    there = [file for file in path.iterdir() if not file.name.startswith(".")]
    files = [file for file in there if file.suffix.lower() in PICTURE_SUFFIXES]
    if not files:
        raise InputError(
            f"{path} is a folder without pictures. Give a video file, or a folder of pictures "
            f"({', '.join(PICTURE_SUFFIXES)})."
        )
    # What was written beside them by default is no reason to doubt.
    videos = [f.name for f in there if f.suffix.lower() in _VIDEOS and ".mfmjt" not in f.suffixes]
    if videos:
        raise InputError(
            f"{path} is a folder of videos, such as {min(videos)}, and pictures. Give one of them, "
            f"or a pattern that the pictures are named by, such as {path / '%04d.png'}."
        )
    kinds = sorted({file.suffix.lower() for file in files})
    notes: tuple[str, ...] = ()
    if len(kinds) > 1:
        notes = (f"{path} holds {' and '.join(kinds)}: all are taken, in the order of names.",)
    files.sort(key=lambda file: _natural(file.name))
    return _files(str(path), path.resolve().name or "pictures", files, rate, notes)


def _pattern(path: Path, rate: Fraction | None) -> Pictures:
    place = _NUMBER.search(path.name)
    assert place is not None
    before, after = path.name[: place.start()], path.name[place.end() :]
    if path.suffix.lower() not in PICTURE_SUFFIXES or _NUMBER.search(after):
        raise InputError(
            f"{path} is no pattern that can be read. Give one number and the suffix of a picture, "
            "such as frames/%04d.png."
        )
    digits = rf"\d{{{place[1]},}}" if place[1] else r"\d+"
    named = re.compile(re.escape(before) + f"({digits})" + re.escape(after))
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    found = sorted((int(match[1]), file) for file in there if (match := named.fullmatch(file.name)))
    if not found:
        raise InputError(f"No picture is named like {path}. Check the pattern and the folder.")
    missing = found[-1][0] - found[0][0] + 1 - len(found)
    notes: tuple[str, ...] = ()
    if missing > 0:
        notes = (f"{path}: {missing} numbers are missing; no time is left for them.",)
    stem = (
        (before + after.removesuffix(path.suffix)).strip("_-. ")
        or path.resolve().parent.name
        or "pictures"
    )
    return _files(str(path), stem, [file for _, file in found], rate, notes)


def _files(
    name: str, stem: str, files: list[Path], rate: Fraction | None, notes: tuple[str, ...]
) -> Pictures:
    if rate is None:
        rate = Fraction(DEFAULT_FPS)
        notes += (f"{name} is shown at {DEFAULT_FPS} pictures a second, since no fps was given.",)

    def decode() -> Iterator[av.VideoFrame | None]:
        return map(_still, files)

    return Pictures(name, stem, _uniform(len(files), rate), decode, "picture files", files, notes)


def _still(path: Path) -> av.VideoFrame | None:
    try:
        with open_container(path, "a picture", None) as container:
            return next(container.decode(video=0), None)
    except (InputError, av.error.FFmpegError, ValueError, IndexError):
        return None


def _webp_durations(path: Path) -> list[Fraction]:
    """Seconds of each picture of an animated WebP; nothing for any other file."""
    durations: list[Fraction] = []
    with contextlib.suppress(OSError), path.open("rb") as stream:
        head = stream.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WEBP":
            return []
        while len(chunk := stream.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            start = stream.tell()
            if chunk[:4] == b"ANMF":
                delay = int.from_bytes(stream.read(16)[12:15], "little")
                durations.append(browser_delay(Fraction(delay, 1000)))
            stream.seek(start + size + size % 2)
    return durations


def _webp(path: Path, durations: list[Fraction]) -> Pictures:
    """Return an animated WebP as pictures: FFmpeg reads its first one at most."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            f"{path} is an animated WebP, which needs Pillow to be read. Run: pip install pillow"
        ) from error

    def decode() -> Iterator[av.VideoFrame | None]:
        try:
            image = Image.open(path)
        except (OSError, ValueError, Image.DecompressionBombError):
            image = None
        for number in range(len(durations)):
            frame = None
            with contextlib.suppress(OSError, ValueError, EOFError):
                if image is not None:
                    image.seek(number)
                    frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), "rgba")
            yield frame

    times = list(accumulate(durations, initial=Fraction(0)))
    return Pictures(str(path), path.stem, times, decode, "webp", [path])


def _uniform(count: int, rate: Fraction) -> list[Fraction]:
    return [Fraction(i) / rate for i in range(count + 1)]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts picture 2 before picture 10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]
