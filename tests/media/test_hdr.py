"""HDR clips against twins of ordinary range: the same pictures, made here, in both."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter

from mfmjt.media import VideoStream, mux, read_video
from mfmjt.media.hdr import Hdr
from mfmjt.media.video import Picture

PQ, HLG = 16, 18  # these and the next: numbers of H.273
BT709, BT601, BT2020 = 1, 5, 9
WHITE = 203.0  # cd/m² of the twin's white (BT.2408)
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
NAMES = {PQ: "PQ", HLG: "HLG"}


def scene(number: int, brightest: float = 0.88) -> np.ndarray:
    """R'G'B' of ordinary range `(64, 96, 3)` in [0, 1]: greys and colors that move."""
    picture = np.zeros((64, 96, 3))
    picture[:32] = np.linspace(0.05, brightest, 96)[None, :, None]
    colors = [(0.8, 0.3, 0.2), (0.25, 0.7, 0.3), (0.2, 0.3, 0.75), (0.8, 0.75, 0.3)]
    for i, color in enumerate(colors):
        picture[32:, 24 * i : 24 * (i + 1)] = np.array(color) * brightest / 0.88
    return np.roll(picture, 4 * number, axis=1)


def coded(picture: np.ndarray, transfer: int, white: float = WHITE) -> np.ndarray:
    """The same light in BT.2100's R'G'B'."""
    light = white * picture**2.4 @ TO_2020.T  # BT.1886, in cd/m²
    if transfer == PQ:
        power = (light / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    shown = light / 1000
    scenes = shown * np.maximum(shown @ LUMINANCE, 1e-9)[..., None] ** (1 / 1.2 - 1)
    low = np.sqrt(3 * scenes)
    high = 0.17883277 * np.log(np.maximum(12 * scenes - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scenes <= 1 / 12, low, high)


def write(path: Path, pictures: list[np.ndarray], transfer: int | None = None) -> Path:
    """Encode R'G'B' pictures in [0, 1] as ordinary H.264, or as HDR in HEVC."""
    with av.open(str(path), "w") as container:
        hdr = transfer is not None
        stream = container.add_stream("libx265" if hdr else "libx264", rate=10)
        context = stream.codec_context
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p10le" if hdr else "yuv420p"
        stream.options = {"crf": "2"}
        if hdr:  # without B-frames: x265 forgets when some of so few are shown
            stream.options |= {"x265-params": "bframes=0:pools=1:log-level=none"}
        context.colorspace = context.color_primaries = BT2020 if hdr else BT709
        context.color_trc, context.color_range = transfer or 1, 1
        for i, picture in enumerate(pictures):
            values = (65535 * picture.clip(0, 1)).round().astype(np.uint16)
            frame = av.VideoFrame.from_ndarray(values, "rgb48le").reformat(
                format=stream.pix_fmt,
                dst_colorspace=BT2020 if hdr else BT709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def off(path: Path, twin: Path) -> np.ndarray:
    first, second = (read_video(p, (10,), 48).frames[0].astype(int) for p in (path, twin))
    return np.abs(first - second)


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_hdr_looks_like_its_twin_of_ordinary_range(tmp_path: Path, transfer: int) -> None:
    scenes = [scene(i) for i in range(4)]
    twin = write(tmp_path / "sdr.mp4", scenes)
    path = write(tmp_path / "hdr.mp4", [coded(p, transfer) for p in scenes], transfer)
    assert off(path, twin).mean() <= 4  # the twin is read some 2 too dark
    name = NAMES[transfer]
    note = f"HDR ({name}) is mapped to SDR for the network; the copy keeps it."
    assert read_video(path).notes == (note,)
    assert read_video(twin).notes == ()
    # Whole pictures, for networks that fit them themselves.
    (pieces,) = zip(*VideoStream(path, (10,), fit=[np.copy]), strict=True)
    whole = np.concatenate([piece for block in pieces for piece in block])
    assert whole.shape == (4, 64, 96, 3)
    assert np.abs(whole - 255 * np.stack(scenes)).mean() <= 3
    mux(path, np.zeros((1, 6400), np.float32), 16_000, tmp_path / "copy.mp4")
    with av.open(str(tmp_path / "copy.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_trc, context.color_primaries, context.pix_fmt) == (
            transfer,
            9,
            "yuv420p10le",
        )


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_each_color_is_that_of_the_twin(tmp_path: Path, transfer: int) -> None:
    grey = [(x, x, x) for x in (0.05, 0.2, 0.5, 0.88)]
    for color in [*grey, (0.8, 0.3, 0.2), (0.25, 0.7, 0.3), (0.2, 0.3, 0.75), (0.8, 0.75, 0.3)]:
        picture = np.tile(np.array(color), (64, 64, 1))
        path = write(tmp_path / "hdr.mp4", [coded(picture, transfer)] * 2, transfer)
        (seen,) = read_video(path, (10,), 16).frames
        assert np.abs(seen - 255 * np.array(color)).max() <= 2


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_what_is_brighter_than_white_is_still_told_apart(tmp_path: Path, transfer: int) -> None:
    levels = [50, 100, 203, 400, 700, 950]  # cd/m²
    bars = np.repeat([(x / WHITE) ** (1 / 2.4) for x in levels], 16)
    picture = np.repeat(np.repeat(bars[None, :, None], 64, 0), 3, 2)
    path = write(tmp_path / "bars.mp4", [coded(picture, transfer)] * 2, transfer)
    (seen,) = read_video(path, (10,), 96).frames
    grey = seen[0, 48, 8::16].astype(int)
    assert (np.diff(grey.mean(1)) > 0).all()
    assert np.ptp(grey, axis=1).max() <= 2  # greys stay grey
    expected = 255 * np.array([50 / WHITE, 100 / WHITE]) ** (1 / 2.4)
    assert np.abs(grey[:2].mean(1) - expected).max() <= 2
    assert 240 <= grey[2].mean() <= 250 < grey[-1].mean()


def test_large_hdr_pictures_are_whole_at_half_their_size() -> None:
    picture = np.empty((1600, 1800, 3), np.uint16)
    picture[:] = (65535 * coded(np.full((1, 1, 3), 0.5), PQ)).round()
    picture[:800, :900] = (65535 * coded(np.full((1, 1, 3), 0.8), PQ)).round()
    frame = av.VideoFrame.from_ndarray(picture, "rgb48le")
    seen = Picture(frame, Hdr("PQ", wide=True)).rgb(VideoReformatter(), None)
    assert (seen.shape, seen.dtype) == ((800, 900, 3), np.uint8)
    assert np.abs(seen[:390, :440].astype(int) - 204).max() <= 1
    assert np.abs(seen[410:, 460:].astype(int) - 127).max() <= 1


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [BT709, BT601, BT2020])
def test_matrix_and_range_are_those_that_the_file_states(
    tmp_path: Path, matrix: int, full: bool
) -> None:
    color = np.array([224, 32, 64], np.uint8)
    color_range = ColorRange.JPEG if full else ColorRange.MPEG
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt, stream.options = "yuv444p", {"qp": "0"}
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = color_range.value
        for i in range(2):
            frame = av.VideoFrame.from_ndarray(np.tile(color, (32, 32, 1)), "rgb24").reformat(
                format="yuv444p", dst_colorspace=matrix, dst_color_range=color_range
            )
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (frames,) = read_video(tmp_path / "a.mp4", (10,), 16).frames
    assert np.abs(frames.astype(int) - color).max() <= 2
