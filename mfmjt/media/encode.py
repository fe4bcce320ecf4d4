"""Pictures that no container holds as they are, encoded once to what plays everywhere."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mfmjt.errors import InputError, RunError, reason
from mfmjt.media.pictures import TURNS, PictureDecoder, Pictures, display, shown_size
from mfmjt.media.video import Picture, decoding

__all__ = ["encoded"]

# Without B-frames: pictures are stored in the order, and for the time, in which they are shown.
_H264 = "libx264", {"crf": "16", "bf": "0"}
_VP9 = "libvpx-vp9", {"crf": "20", "b": "0", "cpu-used": "4", "row-mt": "1"}
_TICKS = 90_000  # a second; all common rates and milliseconds are whole numbers of them
_BT709 = 1
_LIMITED = 1


@contextlib.contextmanager
def encoded(
    source: Path | Pictures, suffix: str, end: Fraction, formats: str | None = None
) -> Iterator[Path]:
    """Yield a temporary video file with a source's pictures as H.264, or VP9 for WebM.

    Times are kept. Pictures are turned as shown, those that are transparent laid over white, those
    of another size scaled to the first one's. Odd sizes, which no player is sure to know, get
    their last row or column twice.

    Args:
        source: A result of `as_source`.
        suffix: Of the file that the pictures are for.
        end: Pictures that begin so many seconds after the first one, or later, are left out.
        formats: As for `VideoStream`.

    Raises:
        InputError: The source cannot be decoded.
        RunError: The file cannot be written.
    """
    webm = suffix == ".webm"
    with tempfile.TemporaryDirectory(prefix="mfmjt-") as folder:
        path = Path(folder) / ("pictures.webm" if webm else "pictures.mp4")
        try:
            with decoding(source, formats) as (decoder, frames), av.open(str(path), "w") as target:
                encoder = _Encoder(target, _VP9 if webm else _H264, decoder)
                for time, frame in frames:
                    if not encoder.add(time, frame, end):
                        break
                if decoder.count == 0:
                    raise InputError(
                        f"No frame of {source} can be decoded. Give a video that plays."
                    )
                encoder.finish(decoder.end)
        except (av.error.FFmpegError, OSError) as error:
            raise RunError(
                f"Cannot encode {source}: {reason(error)}. Check the disk, or write only the sound "
                "(.wav)."
            ) from error
        yield path


class _Encoder:
    """One stream of pictures as large as the first one."""

    def __init__(self, target: Any, codec: tuple[str, dict[str, str]], decoder: Any) -> None:
        self._target, self._decoder = target, decoder
        rate = (1 / decoder.step).limit_denominator(1001)
        self._stream = target.add_stream(codec[0], rate=rate, options=codec[1])
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._reformatter, self._to_rgb = VideoReformatter(), VideoReformatter()
        self._first: Fraction | None = None
        self._previous = 0
        self._lasts: dict[int, int] = {}  # ticks for which the picture of each time is shown
        self._plain = False

    def add(self, time: Fraction, frame: av.VideoFrame, end: Fraction) -> bool:
        """Encode a frame; False if it begins at `end` seconds after the first one, or later."""
        if self._first is None:
            self._first = time
            self._begin(frame)
        elif time - self._first >= end:
            return False
        ready = self._converted(frame)
        ready.pts, ready.time_base = self._ticks(time), Fraction(1, _TICKS)
        self._lasts[self._previous] = ready.pts - self._previous
        self._previous = ready.pts
        self._write(ready)
        return True

    def finish(self, end: Fraction) -> None:
        """Encode what is left; the last picture is shown until `end` seconds."""
        self._lasts[self._previous] = max(1, self._ticks(end) - self._previous)
        self._write(None)

    def _ticks(self, time: Fraction) -> int:
        assert self._first is not None
        return round((time - self._first) * _TICKS)

    def _begin(self, frame: av.VideoFrame) -> None:
        context = self._stream.codec_context
        width, height = shown_size(frame)
        context.width, context.height = width + width % 2, height + height % 2
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        still = isinstance(self._decoder, PictureDecoder)
        if _is_yuv(frame) and not still and display(frame) == TURNS[0]:
            # Video that differs in its coding alone: what its colors mean stays.
            source = self._decoder.stream.codec_context
            self._plain = (width, height) == (context.width, context.height)
            if self._plain:
                context.colorspace, context.color_range = source.colorspace, source.color_range
                context.color_primaries = source.color_primaries
                context.color_trc = source.color_trc

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        context = self._stream.codec_context
        size = context.width, context.height
        if self._plain:
            return self._reformatter.reformat(frame, *size, "yuv420p")
        pixels = Picture(frame, self._decoder.hdr).rgb(self._to_rgb, None)
        height, width = pixels.shape[:2]
        if (width + width % 2, height + height % 2) == size:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        return self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, "rgb24"),
            *size,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC,
        )

    def _write(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._lasts.get(packet.pts, 0)
            self._target.mux(packet)


def _is_yuv(frame: av.VideoFrame) -> bool:
    form = frame.format
    return not form.is_rgb and not form.has_palette and len(form.components) == 3
