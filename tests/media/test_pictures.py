"""Videos that are no video file: animations, folders and patterns of pictures, arrays."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from mfmjt.errors import InputError
from mfmjt.media import (
    Pictures,
    as_source,
    check_output,
    content,
    default_suffix,
    mux,
    read_video,
)
from tests.support.clips import BLACK, STEP, grey, write_video

RATE = 16_000
SIZE = 47, 63  # odd, which H.264 does not know
DELAYS = [40, 80, 40, 200, 40, 40, 40, 120]  # ms


def pictures(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.stack([grey(i, *size) for i in range(count)])


def write_pictures(folder: Path, names: Sequence[str], size: tuple[int, int] = SIZE) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        lossless = {"lossless": True} if name.endswith(".webp") else {}
        Image.fromarray(grey(i, *size)).save(folder / name, **lossless)
    return folder


def animate(path: Path, delays: Sequence[int], frames: np.ndarray | None = None) -> Path:
    frames = pictures(len(delays)) if frames is None else frames
    first, *others = map(Image.fromarray, frames)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    form = "PNG" if path.suffix == ".apng" else None
    kept = {"disposal": 2} if path.suffix == ".gif" else {}
    first.save(
        path,
        form,
        save_all=True,
        append_images=others,
        duration=list(delays),
        loop=0,
        **lossless,
        **kept,
    )
    return path


def write_hevc(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=20)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"x265-params": "bframes=0:pools=1:log-level=none"}
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def index(frames: np.ndarray) -> list[int]:
    return [round((float(picture.mean()) - BLACK) / STEP) for picture in frames]


def shown(path: Path) -> list[tuple[Fraction, int]]:
    """When each picture of a file begins, in ms, and which one it is."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [
        (round(1000 * f.pts * f.time_base), *index(f.to_ndarray(format="rgb24")[None]))
        for f in frames
    ]


def silence(seconds: float) -> np.ndarray:
    return np.zeros((1, round(seconds * RATE)), np.float32)


# --- animations --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".apng", ".webp", ".png"])
def test_an_animation_is_read_and_encoded_with_its_own_times(tmp_path: Path, suffix: str) -> None:
    path = animate(tmp_path / f"a{suffix}", DELAYS)
    video = read_video(path, (50,), 32)
    begins = list(itertools.accumulate(DELAYS, initial=0))[:-1]
    expected = [sum(t <= 20 * k for t in begins) - 1 for k in range(30)]
    assert index(video.frames[0]) == expected
    assert (video.duration, video.width, video.height) == (0.6, 63, 47)
    assert default_suffix(as_source(path)) == ".mp4"
    for out in ("a.mp4", "a.mkv", "a.mov", "a.webm"):
        check_output(path, tmp_path / out)
        (note,) = mux(path, silence(0.6), RATE, tmp_path / out)
        assert "encoded once, since no container holds" in note
        assert shown(tmp_path / out) == list(zip(begins, range(8), strict=True))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (64, 48)
        assert stream.duration * stream.time_base == Fraction(6, 10)
    with av.open(str(tmp_path / "a.webm")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_animations_that_are_coded_as_video_are_copied(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    frames = np.stack([grey(2 * i, 48, 64) for i in range(8)])
    if suffix == ".heic":
        write_hevc(tmp_path / "a.mp4", frames)
        path.write_bytes((tmp_path / "a.mp4").read_bytes().replace(b"ftypisom", b"ftyphevc", 1))
    elif features.check("avif"):
        animate(path, [50] * 8, frames)
    else:
        pytest.skip("this Pillow cannot write AVIF")
    suffix = default_suffix(as_source(path))
    assert suffix == ".mp4"
    assert not any("encoded" in note for note in mux(path, silence(0.4), RATE, tmp_path / "o.mp4"))
    for name in (path, tmp_path / "o.mp4"):
        video = read_video(name, (20,), 32)
        assert [i // 2 for i in index(video.frames[0] + 1)] == list(range(8))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_delays_that_no_browser_keeps(tmp_path: Path, suffix: str) -> None:
    path = animate(tmp_path / f"a{suffix}", [0, 10, 20, 30])
    assert read_video(path, (100,), 8).duration == 0.25
    assert index(read_video(path, (50,), 8).frames[0])[::5] == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".gif", ".apng", ".webp"])
def test_a_picture_may_be_shown_long(tmp_path: Path, suffix: str) -> None:
    path = animate(tmp_path / f"a{suffix}", [15_000, 40, 20_000])
    video = read_video(path, (1,), 8)
    assert (video.duration, video.notes) == (35.04, ())
    mux(path, silence(35.04), RATE, tmp_path / "a.mp4")
    assert shown(tmp_path / "a.mp4") == [(0, 0), (15_000, 1), (15_040, 2)]
    assert read_video(tmp_path / "a.mp4", (1,), 8).duration == pytest.approx(35.04)


def test_pictures_that_begin_after_the_sound_are_left_out(tmp_path: Path) -> None:
    mux(animate(tmp_path / "a.gif", DELAYS), silence(0.3), RATE, tmp_path / "a.mp4")
    assert shown(tmp_path / "a.mp4") == [(0, 0), (40, 1), (120, 2), (160, 3)]


@pytest.mark.parametrize("suffix", [".gif", ".apng", ".webp"])
def test_what_is_transparent_lies_over_white(tmp_path: Path, suffix: str) -> None:
    frames = np.zeros((3, 32, 32, 4), np.uint8)
    frames[:, 8:24, 8:24] = [200, 40, 40, 255]
    for i in range(3):  # so that no writer leaves a picture out
        frames[i, 12 + i, 12] = [0, 0, 200, 255]
    path = animate(tmp_path / f"a{suffix}", [100] * 3, frames)
    mux(path, silence(0.3), RATE, tmp_path / "a.mp4")
    for name in (path, tmp_path / "a.mp4"):
        (found,) = read_video(name, (10,), 32).frames
        near = np.abs(found.astype(int) - np.where(frames[..., 3:] > 0, frames[..., :3], 255))
        assert near[:, :6].max() <= 5, name
        assert np.median(near[:, 10:22, 10:22]) <= 5, name


def test_a_webp_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = animate(tmp_path / "a.webp", DELAYS)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pip install pillow"):
        as_source(path)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "a.jpg"])
def test_a_single_picture_stays_an_error(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path / "one", [name])
    for path in (tmp_path / "one" / name, tmp_path / "one"):
        if path.is_dir() and name.endswith(".gif"):
            continue
        with pytest.raises(InputError, match="single frame, so nothing in it moves"):
            read_video(path)


# --- folders and patterns ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".TIFF", ".tga"])
def test_a_folder_is_shown_in_the_natural_order_of_names(tmp_path: Path, suffix: str) -> None:
    folder = write_pictures(tmp_path / "my.frames", [f"Shot {i}{suffix}" for i in range(30)])
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"no picture either")
    video = read_video(folder, (10,), 32, fps=10)
    assert index(video.frames[0]) == list(range(30))
    assert (video.duration, video.fps, video.notes) == (3.0, 10.0, ())
    assert as_source(folder).stem == "my.frames"


def test_a_folder_without_a_rate_is_taken_at_25_with_a_note(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "frames", [f"{i:04d}.png" for i in range(10)])
    video = read_video(folder, (25,), 32)
    assert index(video.frames[0]) == list(range(10))
    assert any("25 pictures a second" in note for note in video.notes)


def test_a_folder_of_videos_is_not_taken_for_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["1.png", "2.png"])
    (tmp_path / "frames.mfmjt.mp4").touch()
    assert isinstance(as_source(tmp_path), Pictures)
    (tmp_path / "clip.mov").touch()
    with pytest.raises(InputError, match=r"such as clip.mov, .*pattern"):
        as_source(tmp_path)
    assert isinstance(as_source(tmp_path / "%d.png"), Pictures)


def test_a_pattern_takes_its_numbers(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "frames", [f"a_{i}.png" for i in (*range(7, 12), 14)])
    write_pictures(folder, ["a_x.png", "b_1.png", "a_12.jpg"])
    video = read_video(folder / "a_%d.png", (30,), 32, fps="30000/1001")
    assert index(video.frames[0]) == list(range(6))
    assert video.duration == pytest.approx(6 * 1001 / 30000)
    assert ["2 numbers are missing" in note for note in video.notes] == [True]
    assert as_source(folder / "a_%d.png").stem == "a"
    write_pictures(folder, ["0001.png", "0002.png", "001.png"])
    source = as_source(folder / "%04d.png", 25)
    assert [path.name for path in source.files] == ["0001.png", "0002.png"]
    assert source.stem == "frames"


def test_a_file_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    path = write_video(tmp_path / "%d.mp4", frames=3)
    assert as_source(path) == path


def test_a_folder_is_written_as_a_video(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "frames", [f"{i}.png" for i in range(12)])
    Image.fromarray(grey(12, 30, 80)).save(folder / "12.jpg")  # neither the size nor the kind
    assert any(".jpg and .png" in note for note in read_video(folder, fps=25).notes)
    notes = mux(folder, silence(1.3), RATE, tmp_path / "out.mp4", fps=10)
    assert len(notes) == 1
    assert shown(tmp_path / "out.mp4") == [(100 * i, i) for i in range(13)]
    (tmp_path / "link.mp4").symlink_to(folder / "3.png")
    with pytest.raises(InputError, match="input itself"):
        mux(folder, silence(1.3), RATE, tmp_path / "link.mp4", fps=10)


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    for i in range(3):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg", exif=turned)
    video = read_video(tmp_path, (25,), 32)
    assert (video.width, video.height) == (32, 64)
    mux(tmp_path, silence(0.12), RATE, tmp_path / "out.mp4")
    for found in (video, read_video(tmp_path / "out.mp4", (25,), 32)):
        corners = found.frames[0][0][4::24, 4::24, 0] > 127
        assert corners.tolist() == [[False, True], [False, False]]


def test_a_damaged_picture_leaves_its_time_to_the_one_before(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "frames", [f"{i}.png" for i in range(6)])
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    video = read_video(folder, (25,), 32, fps=25)
    assert index(video.frames[0]) == [0, 1, 2, 2, 4, 5]
    assert ["1 of the pictures" in note for note in video.notes] == [True]
    mux(folder, silence(0.24), RATE, tmp_path / "a.mp4", fps=25)
    assert shown(tmp_path / "a.mp4") == [(0, 0), (40, 1), (80, 2), (160, 4), (200, 5)]
    (folder / "0.png").write_bytes(b"nor this one")
    assert index(read_video(folder, (25,), 32, fps=25).frames[0]) == [1, 1, 2, 2, 4, 5]
    for file in folder.iterdir():
        file.write_bytes(b"nor any other")
    for use in (read_video, lambda path: mux(path, silence(0.24), RATE, tmp_path / "b.mp4")):
        with pytest.raises(InputError, match="frames can be decoded"):
            use(folder)
    assert not (tmp_path / "b.mp4").exists()


# --- arrays ------------------------------------------------------------------------------------


def test_arrays_and_tensors(tmp_path: Path) -> None:
    frames = pictures(8)
    turned = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1)
    for given in (frames, turned, frames[:, ::-1]):
        video = read_video((given, 10), (10,), 32)
        assert index(video.frames[0]) == list(range(8))
        assert (video.duration, video.width, video.height) == (0.8, 63, 47)
    exact = read_video(frames, (8,), 63, fps=np.float32(8)).frames[0]
    assert [np.unique(picture).tolist() for picture in exact] == [
        [BLACK + STEP * i] for i in range(8)
    ]
    mux((turned, 29.97), silence(0.3), RATE, tmp_path / "out.mkv")
    assert shown(tmp_path / "out.mkv") == [(round(i / 0.02997), i) for i in range(8)]


FRAMES = pictures(4)


@pytest.mark.parametrize(
    ("video", "fps", "says"),
    [
        (FRAMES, None, r"shape \(4, 47, 63, 3\).*Give a pair \(frames, fps\)"),
        ((FRAMES, None), None, r"Give a pair \(frames, fps\)"),
        ((FRAMES, 25), 25, "no fps besides"),
        ((FRAMES, 25, 1), None, r"Give a pair \(frames, fps\)"),
        ((FRAMES, 0), None, "fps is 0. Give pictures per second, from 0.001 to 1000"),
        ((FRAMES, -25), None, "fps is -25"),
        ((FRAMES, 1e-9), None, "fps is 1e-09"),
        ((FRAMES, float("nan")), None, "fps is nan"),
        ((FRAMES, float("inf")), None, "fps is inf"),
        ((FRAMES, "fast"), None, "fps is fast"),
        ((FRAMES, "1/0"), None, "fps is 1/0"),
        ((FRAMES, "1e999999999"), None, "fps is 1e999999999"),
        ((FRAMES, np.ones((9, 9))), None, "fps is"),
        ((FRAMES / 255, 25), None, r"dtype float64. Give uint8 from 0 to 255"),
        ((torch.from_numpy(FRAMES).float(), 25), None, "dtype torch.float32. Give uint8"),
        ((FRAMES.transpose(0, 3, 1, 2), 25), None, r"frames.transpose\(0, 2, 3, 1\)"),
        ((torch.zeros(4, 3, 8, 9, dtype=torch.uint8), 25), None, r"frames.permute\(0, 2, 3, 1\)"),
        ((FRAMES[..., 0], 25), None, r"Give \(T, H, W, 3\)"),
        ((FRAMES[0], 25), None, r"Give \(T, H, W, 3\)"),
        ((FRAMES[None], 25), None, r"Give \(T, H, W, 3\)"),
        ((FRAMES[:0], 25), None, r"shape \(0, 47, 63, 3\)"),
        ((list(FRAMES), 25), None, "The video is a list"),
        ((FRAMES[:1], 25), None, "single frame"),
        (7, None, "The video is a int"),
        ("clip.mp4", 25, "clip.mp4 has times of its own"),
        ("frames/%d.png", 25, "No picture is named like"),
        ("frames/%d_%d.png", 25, "no pattern"),
        ("frames/%d.txt", 25, "no pattern"),
        (".", 25, "folder without pictures"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: object, fps: object, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        read_video(video, fps=fps)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_content_is_that_of_the_pictures_and_their_times(tmp_path: Path) -> None:
    def digest(video: object, fps: object = None) -> bytes:
        return b"".join(content(as_source(video, fps)))

    folder = write_pictures(tmp_path / "frames", [f"{i}.png" for i in range(4)])
    other = folder.rename(tmp_path / "renamed")
    for video in (other, pictures(4)):
        assert digest(video, 25) == digest(video, 25.0) != digest(video, 24)
    assert digest(other) != digest(other, 25)  # which has another note
    before = digest(other)
    write_pictures(tmp_path / "frames", [f"{i}.png" for i in range(4)])
    assert digest(folder) == before
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    assert digest(folder) != before
    changed = pictures(4)
    changed[3, 0, 0, 0] += 1
    assert digest(changed, 25) != digest(pictures(4), 25)
    assert digest(pictures(4).reshape(4, 63, 47, 3), 25) != digest(pictures(4), 25)


# --- video that no container holds -------------------------------------------------------------


def test_video_that_differs_in_its_coding_keeps_its_colors(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.avi", frames=5, codec="huffyuv", pixels="yuv422p")
    (note,) = mux(source, silence(0.2), RATE, tmp_path / "a.mp4")
    assert "no container holds huffyuv" in note
    assert [i for _, i in shown(tmp_path / "a.mp4")] == [i for _, i in shown(source)]
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace) == ("yuv420p", 2)  # not stated, as before


def test_advice_names_what_was_tried(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", frames=3)
    with pytest.raises(InputError, match="cannot hold h264") as error:
        check_output(source, tmp_path / "b.webm")
    advised = [s for s in (".mp4", ".m4v", ".mov", ".mkv", ".webm") if f" {s}" in str(error.value)]
    assert advised
    for suffix in set(advised) - {".webm"}:
        mux(source, silence(0.1), RATE, tmp_path / f"b{suffix}")
    vp8 = write_video(tmp_path / "a.avi", frames=3, codec="libvpx")
    mux(vp8, silence(0.1), RATE, tmp_path / f"c{default_suffix(vp8)}")
