from __future__ import annotations

import os
import socket
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from mfmjt.data import foley
from mfmjt.data.preview import write_clip
from mfmjt.errors import InputError, RunError
from mfmjt.media import (
    AUDIO_SUFFIXES,
    VIDEO_SUFFIXES,
    VideoStream,
    check,
    check_output,
    mux,
    read_video,
    thumbnails,
    write_audio,
)
from tests.support.clips import (
    decoded_sound,
    frame_index,
    grey,
    packets,
    rotate,
    write_sound,
    write_video,
)

RATE = 16000


def tone(seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(np.arange(round(seconds * RATE)) * 0.3)
    return np.stack([wave] * channels).astype(np.float32)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- reading -----------------------------------------------------------------------------------


def test_frames_are_those_that_training_sees(tmp_path: Path) -> None:
    video = read_video(write_video(tmp_path / "a.mp4"))
    slow, fast = video.frames
    assert frame_index(fast) == list(range(50))
    assert frame_index(slow) == frame_index(fast[foley.frames_shown(len(fast), 8)])
    assert (video.duration, video.fps, video.width, video.height) == (2.0, 25.0, 64, 48)
    assert slow.shape == (16, 64, 64, 3)
    assert fast.dtype == np.uint8
    assert video.notes == ()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_every_container_gives_the_same_frames(tmp_path: Path, name: str) -> None:
    codec = "ffv1" if name.endswith("avi") else "libx264"
    video = read_video(write_video(tmp_path / name, frames=30, codec=codec), rates=(25,))
    assert frame_index(video.frames[0]) == list(range(30))


def test_variable_frame_rate(tmp_path: Path) -> None:
    times = [0, 30, 50, 400, 410, 440, 900, 1300, 1310, 1600]
    path = write_video(tmp_path / "vfr.mkv", frames=len(times), times_ms=times)
    (frames,) = read_video(path, rates=(20,), duration=1.6).frames
    on_screen = [sum(t <= 50 * k for t in times) - 1 for k in range(32)]
    assert frame_index(frames) == on_screen


@pytest.mark.parametrize("rate", [10, 24, 30, 50])
def test_other_frame_rates_last_as_long(tmp_path: Path, rate: int) -> None:
    video = read_video(write_video(tmp_path / "a.mp4", frames=rate, rate=rate))
    assert [len(f) for f in video.frames] == [8, 25]
    (frames,) = read_video(tmp_path / "a.mp4", rates=(rate,)).frames
    assert frame_index(frames) == list(range(rate))


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_is_applied(tmp_path: Path, turns: int) -> None:
    def corner(_: int, height: int, width: int) -> np.ndarray:
        picture = np.zeros((height, width, 3), np.uint8)
        picture[: height // 2, : width // 2] = 255
        return picture

    path = rotate(write_video(tmp_path / "r.mp4", frames=3, picture=corner), turns)
    video = read_video(path, rates=(25,), size=32)
    expected = np.rot90(corner(0, 32, 32), turns)
    middle = slice(4, None, 8)  # away from the edges, which coding blurs
    assert np.array_equal(video.frames[0][0][middle, middle] > 127, expected[middle, middle] > 127)
    assert (video.width, video.height) == ((48, 64) if turns % 2 else (64, 48))


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", ["", "h", "v"])
def test_mirrored_pictures_are_shown_so(tmp_path: Path, turned: int, mirrored: str) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    picture[:24, 32:] = 90
    with av.open(str(tmp_path / "m.mp4"), "w") as target:
        video = target.add_stream("libx264", rate=25, options={"crf": "1"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        video.set_display_rotation(turned, hflip=mirrored == "h", vflip=mirrored == "v")
        for _ in range(3):
            target.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        target.mux(video.encode())
    flips = {"": slice(None), "h": (slice(None), slice(None, None, -1)), "v": slice(None, None, -1)}
    expected = np.rot90(picture, turned // 90)[flips[mirrored]]
    seen: list[np.ndarray] = []
    for _ in VideoStream(tmp_path / "m.mp4", (25,), fit=[lambda p: seen.append(p) or p]):
        pass
    assert seen[0].shape[1:] == expected.shape
    middle = (slice(4, None, 8), slice(4, None, 8))  # away from the edges, which coding blurs
    assert np.abs(seen[0][0][middle].astype(int) - expected[middle]).max() < 40
    report = check(tmp_path / "m.mp4")
    assert report.mirrored == bool(mirrored)
    again = np.rot90(picture, report.rotation // 90)
    assert np.array_equal(again[:, ::-1] if report.mirrored else again, expected)


def test_odd_sizes_and_one_size_per_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mp4", frames=5, size=(47, 63), pixels="yuv444p")
    slow, fast = read_video(path, rates=(5, 25), size=(16, 33)).frames
    assert slow.shape == (1, 16, 16, 3)
    assert fast.shape == (5, 33, 33, 3)


def test_4k_is_scaled_while_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "4k.mp4", frames=3, size=(2160, 3840))
    video = read_video(path)
    assert video.frames[1].shape == (3, 64, 64, 3)
    assert frame_index(video.frames[1]) == [0, 1, 2]
    assert (video.width, video.height) == (3840, 2160)


def test_duration_takes_the_beginning(tmp_path: Path) -> None:
    video = read_video(write_video(tmp_path / "a.mp4"), duration=1.2, limit=1.5)
    assert [len(f) for f in video.frames] == [10, 30]
    assert video.duration == 1.2


def test_too_long_and_too_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="--duration") as error:
        read_video(path, limit=1.0)
    one_line(error)
    with pytest.raises(InputError, match=r"2\.00 s, less than the 3 s") as error:
        read_video(path, duration=3.0)
    one_line(error)


def test_a_file_cut_short_gives_what_is_there_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    video = read_video(path, rates=(25,))
    found = frame_index(video.frames[0])
    assert 1 < len(found) < 50
    assert found == list(range(len(found)))
    (note, *_) = video.notes
    assert "cut short" in note


def _broken(path: Path, kind: str) -> Path:
    if kind == "missing":
        return path / "nothing.mp4"
    if kind == "folder":
        return path
    file = path / "broken.mp4"
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "garbage":
        file.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif kind == "text":
        file.write_text("this is not a film\n" * 100)
    elif kind == "audio only":
        write_sound(file)
    elif kind == "no index":
        content = write_video(file).read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif kind == "one frame":
        write_video(file, frames=1)
    elif kind == "picture":
        return _picture(path)
    elif kind == "cover":
        return _song_with_cover(path)
    return file


def _picture(folder: Path) -> Path:
    frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
    frame.save(str(folder / "still.png"))
    return folder / "still.png"


def _song_with_cover(folder: Path) -> Path:
    with (
        av.open(str(_picture(folder))) as source,
        av.open(str(folder / "song.mp3"), "w") as target,
    ):
        sound = target.add_stream("mp3", rate=RATE, layout="mono")
        cover = target.add_stream_from_template(source.streams.video[0])
        frame = av.AudioFrame.from_ndarray(tone(), format="fltp", layout="mono")
        frame.sample_rate = RATE
        target.mux([*sound.encode(frame), *sound.encode(None)])
        for packet in source.demux():
            if packet.size:
                packet.stream = cover
                target.mux(packet)
    return folder / "song.mp3"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no file"),
        ("folder", "folder"),
        ("empty", "cannot be opened"),
        ("garbage", "cannot be opened"),
        ("text", "cannot be opened"),
        ("no index", "cannot be opened"),
        ("audio only", "only sound"),
        ("cover", "only sound"),
        ("one frame", "single frame"),
        ("picture", "single frame"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_video(_broken(tmp_path, kind))
    one_line(error)


def test_a_name_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4", frames=5).rename(tmp_path / "http:clip %20?.mp4")
    assert len(read_video("http:clip %20?.mp4", rates=(25,)).frames[0]) == 5


# --- reading block by block --------------------------------------------------------------------


def test_blocks_are_the_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=55, rate=17)
    stream = VideoStream(path, (8, 25), (16, 32))
    blocks = list(stream)
    whole = read_video(path, (8, 25), (16, 32))
    for i, frames in enumerate(whole.frames):
        assert np.array_equal(np.concatenate([p for block in blocks for p in block[i]]), frames)
        assert max(sum(map(len, block[i])) for block in blocks) <= (8, 25)[i] + 2
    assert len(blocks) == 4
    assert stream.duration == whole.duration == pytest.approx(55 / 17)
    assert stream.declared == pytest.approx(55 / 17, abs=0.01)


@pytest.mark.parametrize("duration", [None, 1.55])
def test_the_next_frame_is_that_of_mmaudio(tmp_path: Path, duration: float | None) -> None:
    times = [0, 30, 50, 400, 410, 440, 900, 1300, 1310, 1600]
    path = write_video(tmp_path / "vfr.mkv", frames=len(times), times_ms=times)
    stream = VideoStream(path, (20, 3), duration=duration, pick="next")
    found: tuple[list, list] = ([], [])
    for block in stream:
        for kept, pieces in zip(found, block, strict=True):
            kept += pieces
    for rate, pieces in zip((20, 3), found, strict=True):
        count = round((duration or stream.duration) * rate)
        # The first frame whose time has come, the last one held.
        expected = [
            next((i for i, t in enumerate(times) if t >= 1000 * k / rate), len(times) - 1)
            for k in range(count)
        ]
        assert frame_index(np.concatenate(pieces)) == expected
    with pytest.raises(InputError, match="No pick 'both'"):
        VideoStream(path, pick="both")  # type: ignore[arg-type]


def of_many(index: int, height: int, width: int) -> np.ndarray:
    return grey(index % 50, height, width)


@pytest.mark.parametrize(
    ("fps", "rate", "expected"),
    [
        # As FFmpeg's filter picks them: the last frame before the middle between two times.
        (25, Fraction(1, 2), [24, 74, 124, 174]),
        (30, Fraction(1, 2), [29, 89, 149, 209]),
        (24, Fraction(1, 2), [23, 71, 119, 167]),
        (30, 25, [0, 1, 2, 4, 5, 6, 7, 8, 10]),
        (25, 25, list(range(9))),
    ],
)
def test_the_nearest_frame_is_that_of_ffmpeg_s_filter(
    tmp_path: Path, fps: int, rate: int | Fraction, expected: list[int]
) -> None:
    path = write_video(tmp_path / "a.mp4", frames=8 * fps + 1, rate=fps, picture=of_many)
    stream = VideoStream(path, (rate,), duration=8, pick="nearest")
    frames = np.concatenate([frame for (block,) in stream for frame in block])
    assert len(frames) == 8 * rate
    assert frame_index(frames[: len(expected)]) == [index % 50 for index in expected]


def test_only_frames_that_are_picked_are_converted_and_fitted_once(tmp_path: Path) -> None:
    path = rotate(write_video(tmp_path / "a.mp4", frames=50, rate=50), 1)
    given: list[np.ndarray] = []

    def fit(pictures: np.ndarray) -> torch.Tensor:
        given.append(pictures)
        return torch.from_numpy(pictures[:, ::2, ::2]).clone()

    (pieces,) = zip(*VideoStream(path, (8,), fit=[fit]), strict=True)
    assert {p.shape[1:] for p in given} == {(64, 48, 3)}  # full size, turned as shown
    assert frame_index(np.concatenate(given)) == [50 * k // 8 for k in range(8)]
    fitted = torch.cat([piece for part in pieces for piece in part])
    assert fitted.shape == (8, 32, 24, 3)
    # A slow video's pictures are held, and still fitted once.
    given.clear()
    slow = write_video(tmp_path / "slow.mp4", frames=4, rate=2)
    (pieces,) = zip(*VideoStream(slow, (25,), fit=[fit]), strict=True)
    fitted = torch.cat([piece for part in pieces for piece in part])
    assert frame_index(fitted.numpy()) == [min(i * 2 // 25, 3) for i in range(50)]
    assert len(given) == 4


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv"])
def test_mux_copies_the_pictures_and_replaces_the_sound(tmp_path: Path, suffix: str) -> None:
    source = write_video(tmp_path / "in.mp4", sound=True)
    out = tmp_path / f"out{suffix}"
    mux(source, tone(2.0), RATE, out)
    assert packets(out, "video") == packets(source, "video")
    assert packets(out, "audio") != packets(source, "audio")
    assert frame_index(read_video(out, rates=(25,)).frames[0]) == list(range(50))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", out.name]


def test_mux_lasts_as_long_as_the_sound(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4")
    mux(source, tone(2.0), RATE, tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as container:
        assert [s.duration * s.time_base for s in container.streams] == [2, 2]
    mux(source, tone(1.0), RATE, tmp_path / "half.mp4")
    with av.open(str(tmp_path / "half.mp4")) as container:
        assert container.streams.audio[0].duration * container.streams.audio[0].time_base == 1
    shown = frame_index(read_video(tmp_path / "half.mp4", rates=(25,)).frames[0])
    assert shown == list(range(25))  # pictures that earlier ones are predicted from are hidden


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_comes_when_it_should(tmp_path: Path, suffix: str, channels: int) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    source = write_video(tmp_path / f"in{suffix}", frames=25, codec=codec)
    wave = np.zeros((channels, RATE), np.float32)
    wave[:, RATE // 2 :] = tone(0.5)[0]
    mux(source, wave, RATE, tmp_path / f"out{suffix}")
    heard = decoded_sound(tmp_path / f"out{suffix}")
    rate = 48000 if suffix == ".webm" else RATE
    start = int(np.argmax(np.abs(heard) > np.abs(heard).max() / 2)) / rate
    assert abs(start - 0.5) < 0.01  # pre-echo of a lossy codec, far below one picture


def test_mux_resamples_what_the_codec_does_not_take(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4", frames=25)
    wave = np.sin(2 * np.pi * 440 * np.arange(50_000) / 50_000).astype(np.float32)[None]
    mux(source, wave, 50_000, tmp_path / "out.mp4")
    heard = decoded_sound(tmp_path / "out.mp4")[4800:43200]
    spectrum = np.abs(np.fft.rfft(heard))
    assert int(spectrum.argmax()) * 48_000 / len(heard) == pytest.approx(440, abs=1.25)


def test_rotation_is_kept(tmp_path: Path) -> None:
    source = rotate(write_video(tmp_path / "in.mp4"), 1)
    mux(source, tone(2.0), RATE, tmp_path / "out.mp4")
    video = read_video(tmp_path / "out.mp4")
    assert (video.width, video.height) == (48, 64)
    assert np.array_equal(video.frames[1], read_video(source).frames[1])


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_sound_files(tmp_path: Path, suffix: str) -> None:
    wave = tone(channels=2)
    write_audio(tmp_path / f"a{suffix}", wave, RATE)
    read, rate = soundfile.read(tmp_path / f"a{suffix}", always_2d=True, dtype="float32")
    assert rate == RATE
    assert len(read) == RATE
    if suffix in (".wav", ".flac"):
        assert np.abs(read.T - wave).max() <= 2.0**-15


def test_sound_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 4 * tone(), RATE)
    read, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert (read.max(), read.min()) == (2**15 - 1, -(2**15))


def test_the_input_is_never_written(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4")
    before = source.read_bytes()
    (tmp_path / "link.mp4").symlink_to(source)
    for name in ("in.mp4", "./in.mp4", "link.mp4"):
        with pytest.raises(InputError, match="input itself"):
            mux(source, tone(), RATE, tmp_path / name)
        with pytest.raises(InputError, match="input itself"):
            check_output(source, tmp_path / name)
    assert source.read_bytes() == before


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4")
    (tmp_path / "folder.mp4").mkdir()
    cases = [
        ("out.webm", InputError, "cannot hold h264"),
        ("out.txt", InputError, "tells no format"),
        ("out", InputError, "no suffix"),
        ("nowhere/out.mp4", RunError, "Cannot write"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for name, kind, says in cases:
        with pytest.raises(kind, match=says) as error:
            mux(source, tone(), RATE, tmp_path / name)
        one_line(error)
        with pytest.raises(kind, match=says) as error:
            check_output(source, tmp_path / name)
        one_line(error)
    with pytest.raises(InputError, match="is a folder"):
        check_output(source, tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="tells no format"):
        check_output(None, tmp_path / "video.mp4")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Cannot write"):
        write_audio(tmp_path / "a.wav", tone(), RATE)


@pytest.mark.parametrize("suffix", [".wav", ".mp4"])
@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(100),
        np.zeros((3, 100)),
        np.zeros((1, 0)),
        np.full((1, 100), np.nan),
        np.full((1, 100), np.inf),
    ],
    ids=["1-d", "3 channels", "empty", "nan", "inf"],
)
def test_waveforms_that_cannot_be(tmp_path: Path, suffix: str, wave: np.ndarray) -> None:
    source = write_video(tmp_path / "in.mp4", frames=3)
    out = tmp_path / f"out{suffix}"
    write = partial(write_audio, out) if suffix == ".wav" else partial(mux, source, out_path=out)
    with pytest.raises(InputError, match="waveform"):
        write(waveform=wave, sample_rate=RATE)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_an_interrupt_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_video(tmp_path / "in.mp4")
    (tmp_path / "out.mp4").write_bytes(b"an earlier result")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mfmjt.media.write.packets", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux(source, tone(), RATE, tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an earlier result"


def test_only_the_containers_that_are_named_are_opened(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mkv")
    assert len(list(VideoStream(clip, formats="mov,mp4,matroska,webm"))) > 1
    for formats in ("mov,mp4", "avi"):
        with pytest.raises(InputError, match="cannot be opened"):
            list(VideoStream(clip, formats=formats))
        with pytest.raises(InputError, match="cannot be opened"):
            mux(clip, tone(), RATE, tmp_path / "out.mkv", formats=formats)


def test_no_file_makes_the_reader_open_an_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n"
        )
        with pytest.raises(InputError):
            read_video(playlist)
        with pytest.raises(TimeoutError):
            server.accept()


def test_thumbnails_are_from_the_middles_of_equal_parts(tmp_path: Path) -> None:
    levels = np.repeat(np.arange(4) * 60 + 20, 25)  # a second of each
    frames = np.broadcast_to(levels[:, None, None, None], (100, 64, 64, 3)).astype(np.uint8)
    write_clip(tmp_path / "clip.mp4", frames, None)
    shown, end = thumbnails(tmp_path / "clip.mp4", 4.0, count=4, size=32)
    assert end == 4
    assert [round(float(picture.mean()), -1) for picture in shown] == [20, 80, 140, 200]
    assert shown[0].shape == (32, 32, 3)
