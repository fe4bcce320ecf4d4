"""What `mfmjt check` says of a video."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mfmjt import cli
from mfmjt.errors import InputError
from mfmjt.media import as_source, check
from tests.media.films import Film
from tests.support.clips import rotate, write_sound, write_video

WITHOUT_WEBM = (".mp4", ".m4v", ".mov", ".mkv")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["check", *map(str, arguments)])


def test_an_ordinary_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", sound=True)
    report = check(path)
    assert (report.codec, report.width, report.height, report.rotation) == ("h264", 64, 48, 0)
    assert (report.frames, report.fps, report.duration, report.start) == (50, 25.0, 2.0, 0.0)
    assert (report.variable, report.range, report.encoded) == (False, "SDR", False)
    assert report.containers == WITHOUT_WEBM
    assert report.sound == "aac 16000 Hz, mono"
    assert (report.others, report.notes) == ((), ())
    result = run(path)
    assert result.exit_code == 0
    assert result.stdout == f"{report}\n"
    for words in ("h264, 64x48, SDR", "2.00 s, 50 pictures 25 a second", "would be replaced"):
        assert words in result.stdout
    assert json.loads(run(path, "--json").stdout) == json.loads(
        json.dumps(dataclasses.asdict(report))
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


def test_turned_late_and_uneven(tmp_path: Path) -> None:
    path = rotate(write_video(tmp_path / "r.mp4"), 1)
    report = check(path)
    assert (report.width, report.height, report.rotation) == (48, 64, 90)
    assert "turned by 90 degrees" in str(report)
    times = [Fraction(t, 1000) for t in (0, 30, 50, 400, 410, 440, 900, 1300, 1310, 1600)]
    film = Film("h264", "mkv", 10, Fraction(25), {"bf": "2"}, times, start=Fraction(3))
    report = check(film.write(tmp_path))
    assert report.variable
    assert report.frames == 10
    assert report.start == 3.0
    assert "at a variable rate" in str(report)


@pytest.mark.parametrize(("curve", "says"), [(16, "HDR (PQ)"), (18, "HDR (HLG)"), (1, "SDR")])
def test_high_dynamic_range(tmp_path: Path, curve: int, says: str) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as target:
        video = target.add_stream("libx264", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p10le"
        video.codec_context.color_trc = curve
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            target.mux(video.encode(frame.reformat(format="yuv420p10le")))
        target.mux(video.encode())
    assert check(path).range == says


def test_several_streams_and_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "full.mkv"
    with av.open(str(path), "w") as target:
        streams = [target.add_stream("libx264", rate=25) for _ in range(2)]
        for i, stream in enumerate(streams):
            stream.width = stream.height = 32 * (i + 1)
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default if i else 0
        target.add_attachment("a.txt", "text/plain", b"hello")
        for k in range(6):
            for stream in streams:
                picture = np.full((stream.width, stream.width, 3), 10 * k, np.uint8)
                target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        for stream in streams:
            target.mux(stream.encode())
    report = check(path)
    assert report.stream == 1
    assert report.others == ("#0 h264 32x32",)
    assert any("2 video streams" in note for note in report.notes)
    assert f"Not copied from {path}: 1 attachment." in report.notes


def test_damage_and_cut_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    report = check(path)
    assert report.frames < 50
    assert any("cut short" in note for note in report.notes)


def test_an_output(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", frames=5, codec="libvpx-vp9")
    assert check(path).containers == (".mp4", ".m4v", ".mkv", ".webm")
    assert run(path, "-o", tmp_path / "out.webm").exit_code == 0
    refused = run(path, "-o", tmp_path / "out.mov")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "cannot hold vp9" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert run(path, "-o", path).exit_code == 2
    assert run(path, "-o", tmp_path / "none" / "out.mp4").exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mkv"]


def test_what_is_no_video(tmp_path: Path) -> None:
    write_sound(tmp_path / "song.m4a")
    write_video(tmp_path / "still.mp4", frames=1)
    for name, says in (("nothing.mp4", "no file"), ("song.m4a", "only sound"),
                       ("still.mp4", "single frame")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            check(tmp_path / name)
        result = run(tmp_path / name)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_pictures_that_are_no_video_file(tmp_path: Path) -> None:
    for i in range(4):
        frame = av.VideoFrame.from_ndarray(np.full((16, 24, 3), 50 * i, np.uint8), "rgb24")
        frame.save(str(tmp_path / f"{i}.png"))
    report = check(as_source(tmp_path, 8))
    assert (report.frames, report.duration, report.stream) == (4, 0.5, None)
    assert report.encoded
    assert ".mp4" in report.containers
    result = run(tmp_path / "%d.png", "--fps", 8)
    assert result.exit_code == 0
    assert "0.50 s, 4 pictures 8 a second" in result.stdout
    assert "encoded once" in result.stdout
