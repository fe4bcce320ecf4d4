"""A copy shows the same pictures at the same times as a player shows of the video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mfmjt.errors import InputError
from mfmjt.media import VIDEO_SUFFIXES, check, check_output, mux, read_audio, read_video
from mfmjt.media.write import containers_for
from tests.media.films import Film, draw, look
from tests.support.clips import encode_sound, packets, write_video

RATE = 16_000
SOME, MANY = 32, 600
HIDING = (".mp4", ".m4v", ".mov")


def silence(seconds: Fraction | float) -> np.ndarray:
    return np.zeros((1, max(1, round(seconds * RATE))), np.float32)


def begin_of_sound(path: Path) -> Fraction:
    """When a Matroska file's sound begins: its times are never below 0, so both may be later."""
    if path.suffix in HIDING:
        return Fraction(0)
    with av.open(str(path)) as container:
        frame = next(container.decode(audio=0))
        return max(Fraction(0), frame.pts * frame.time_base)


def compare(film: Film, path: Path, out: Path, end: Fraction) -> int:
    """Judge a copy that ends at `end` seconds; returns how many pictures were compared."""
    source, copy = look(path), look(out)
    assert len(source.pictures) == len(film.shown)
    times = film.shown
    if film.suffix == "mpg":  # what this container tells is FFmpeg's guess
        times = [time - source.pictures[0][0] for time, _ in source.pictures]
    within = copy.tick + min(Fraction(1, 1000), source.tick)
    wanted = [(t, picture) for t, (_, picture) in zip(times, source.pictures, strict=True)]
    begins = begin_of_sound(out)
    seen = [(time - begins, picture) for time, picture in copy.pictures]
    kept = [each for each in wanted if each[0] < end - within]
    assert [picture for _, picture in seen[: len(kept)]] == [picture for _, picture in kept]
    late = [
        i for i, (a, b) in enumerate(zip(seen, kept, strict=False)) if abs(a[0] - b[0]) > within
    ]
    assert late == []
    beyond = [each for each in seen[len(kept) :] if each[0] >= end + within]
    if out.suffix in HIDING:
        assert beyond == []
    for time, picture in beyond:
        assert any(abs(time - t) <= within and picture == p for t, p in wanted)
    assert copy.matrix == source.matrix
    return len(kept)


def copied(seed: int, folder: Path) -> int:
    """Draw a film, copy it, and compare; 0 where the command refuses what no file could hold."""
    film = draw(seed)
    path = film.write(folder)
    rng = np.random.default_rng([seed, 1])
    with av.open(str(path)) as container:
        possible = containers_for(container.streams.best("video"))
    suffix = str(rng.choice(possible if rng.random() < 0.9 else list(VIDEO_SUFFIXES)))
    part = Fraction([100, 100, int(rng.integers(20, 100)), 150][rng.integers(0, 4)], 100)
    end = Fraction(max(1, round((film.shown[-1] + 1 / film.rate) * part * RATE)), RATE)
    out = folder / f"out{suffix}"
    try:
        check_output(path, out)
    except InputError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        says = "The edit list of" if suffix in possible else f"cannot hold {film.codec}"
        assert says in refused
        assert film.hidden or suffix not in possible
        with pytest.raises(InputError, match=says):
            mux(path, silence(end), RATE, out)
        assert not out.exists()
        return 0
    mux(path, silence(end), RATE, out)
    return compare(film, path, out, end)


def test_copies_of_films_of_every_make(tmp_path: Path) -> None:
    for seed in range(SOME):
        folder = tmp_path / str(seed)
        folder.mkdir()
        copied(seed, folder)


@pytest.mark.slow
def test_copies_of_many_films(tmp_path: Path) -> None:
    compared = []
    for seed in range(SOME, SOME + MANY):
        folder = tmp_path / str(seed)
        folder.mkdir()
        compared.append(copied(seed, folder))
    assert sum(n > 0 for n in compared) >= MANY // 2


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("between", [1, 3])
def test_files_that_leave_out_when_to_decode(
    tmp_path: Path, codec: str, between: int, suffix: str
) -> None:
    rate = Fraction(25)
    x265 = f"bframes={between}:log-level=none:pools=1"
    options = {"bf": str(between)} if codec == "h264" else {"x265-params": x265}
    film = Film(codec, "mkv", 20, rate, options, [i / rate for i in range(20)])
    path = film.write(tmp_path)
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).dts is None
    mux(path, silence(0.8), RATE, tmp_path / f"out{suffix}")
    assert compare(film, path, tmp_path / f"out{suffix}", Fraction(4, 5)) == 20
    assert packets(tmp_path / f"out{suffix}", "video") == packets(path, "video") or suffix != ".mkv"


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "h264"), ("hevc", "hevc"), ("h264", "avi"),
                                           ("mpeg4", "avi"), ("mpeg2", "m2v")])  # fmt: skip
def test_files_without_times_of_their_own(tmp_path: Path, codec: str, suffix: str) -> None:
    rate = Fraction(25)
    options = {"x265-params": "log-level=none:pools=1"} if codec == "hevc" else {"bf": "2"}
    film = Film(codec, suffix, 40, rate, options, [i / rate for i in range(40)])
    path = film.write(tmp_path)
    video = read_video(path, rates=(25,))
    assert video.duration == 1.6
    assert len(video.frames[0]) == 40
    assert len({frame.tobytes() for frame in video.frames[0]}) == 40
    for out in (tmp_path / "out.mp4", tmp_path / "out.mkv"):
        mux(path, silence(1.6), RATE, out)
        assert compare(film, path, out, Fraction(8, 5)) == 40
        again = read_video(out, rates=(25,))
        assert np.array_equal(again.frames[0], video.frames[0])


def test_two_pictures_in_one_packet(tmp_path: Path) -> None:
    """As DivX and Xvid wrote AVI: one that comes later in time, its B-picture, then a stand-in."""
    rate = Fraction(25)
    film = Film("mpeg4", "avi", 21, rate, {"bf": "1"}, [i / rate for i in range(21)])
    path = film.write(tmp_path)
    nothing = bytes.fromhex("000001b6540000")
    with av.open(str(path)) as old, av.open(str(tmp_path / "packed.avi"), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream, opaque=True)
        whole = [bytes(packet) for packet in old.demux(stream) if packet.size]
        packed = whole[:1]
        for later, between in zip(whole[1::2], whole[2::2], strict=True):
            packed += [later + between, nothing]
        for i, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = 1 / rate, copy
            packet.is_keyframe = i == 0
            new.mux(packet)
    wanted = [picture for _, picture in look(path).pictures]
    assert len(set(wanted)) == 21
    assert len(read_video(tmp_path / "packed.avi", rates=(25,)).frames[0]) == 21
    for suffix in (".mp4", ".mkv", ".mov"):
        out = tmp_path / f"out{suffix}"
        mux(tmp_path / "packed.avi", silence(0.84), RATE, out)
        copy = look(out).pictures
        assert [picture for _, picture in copy] == wanted
        assert [round(float(time), 2) for time, _ in copy] == [
            round(0.04 * i, 2) for i in range(21)
        ]


def test_the_zero_of_sound_that_is_read_is_the_first_picture(tmp_path: Path) -> None:
    """In AVI the first picture comes a place later, as it is decoded."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as target:
        video = target.add_stream("mpeg4", rate=25, options={"bf": "2"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        track = target.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), "rgb24")
            target.mux(video.encode(frame))
        target.mux(video.encode())
        samples = np.arange(RATE // 2, dtype=np.int16)[None]
        heard = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        heard.sample_rate = RATE
        target.mux([*track.encode(heard), *track.encode()])
    first = read_audio(path, RATE)[0] * 2**15
    assert round(float(first)) == RATE // 25


def _two(path: Path, default: int) -> Path:
    """A small preview and a film, of which one is the default."""
    with av.open(str(path), "w") as target:
        streams = []
        for i, side in enumerate((16, 64)):
            stream = target.add_stream("libx264", rate=25)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default if i == default else 0
            streams.append(stream)
        for k in range(12):
            for stream in streams:
                picture = np.full((stream.width, stream.width, 3), 10 * k, np.uint8)
                target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        for stream in streams:
            target.mux(stream.encode())
    return path


@pytest.mark.parametrize(("default", "side"), [(1, 64), (0, 16)])
def test_of_several_streams_that_which_players_show(
    tmp_path: Path, default: int, side: int
) -> None:
    path = _two(tmp_path / "two.mkv", default)
    video = read_video(path)
    assert video.width == side
    (note,) = video.notes
    assert f"#{default} h264 {side}x{side}; left out: #{1 - default}" in note
    assert mux(path, silence(0.48), RATE, tmp_path / "out.mp4") == (note,)
    assert len(look(tmp_path / "out.mp4").pictures) == 12
    assert read_video(tmp_path / "out.mp4").width == side


@pytest.mark.parametrize(("tag", "suffix", "becomes"), [
    ("hvc1", ".mp4", "hvc1"), ("hvc1", ".m4v", "hvc1"), ("hvc1", ".mov", "hvc1"),
    ("hev1", ".mp4", "hev1"), ("hev1", ".mov", "hev1"), (None, ".mp4", "hvc1"),
])  # fmt: skip
def test_tags_of_hevc(tmp_path: Path, tag: str | None, suffix: str, becomes: str) -> None:
    path = tmp_path / ("in.mp4" if tag else "in.mkv")
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx265", rate=25)
        stream.options = {"x265-params": "log-level=none:pools=1"}
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        if tag:
            stream.codec_context.codec_tag = tag
        for i in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), "rgb24")
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    mux(path, silence(0.24), RATE, tmp_path / f"out{suffix}")
    assert look(tmp_path / f"out{suffix}").tag == becomes
    assert len(look(tmp_path / f"out{suffix}").pictures) == 6


def test_other_tags_are_kept_where_the_container_knows_them(tmp_path: Path) -> None:
    rate = Fraction(25)
    times = [i / rate for i in range(6)]
    cases = (("prores", "mov", "apch", ".mov", "apch"), ("h264", "mp4", "avc3", ".mov", "avc3"),
             ("av1", "mp4", "av01", ".mp4", "av01"),
             ("mjpeg", "mov", "jpeg", ".mp4", "mp4v"))  # fmt: skip
    for codec, suffix, tag, target, becomes in cases:
        folder = tmp_path / (codec + target)
        folder.mkdir()
        path = Film(codec, suffix, 6, rate, {}, times).write(folder)
        content = path.read_bytes()
        if tag == "avc3":
            path.write_bytes(content.replace(b"avc1\0\0\0\0", b"avc3\0\0\0\0"))
        mux(path, silence(0.24), RATE, folder / f"out{target}")
        assert look(folder / f"out{target}").tag == becomes
        assert [p for _, p in look(folder / f"out{target}").pictures] == [
            p for _, p in look(path).pictures
        ]


def test_titles_places_chapters_and_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "full.mkv"
    with av.open(str(path), "w") as target:
        target.metadata.update(title="My film", creation_time="2020-01-02T03:04:05.000000Z")
        target.metadata["com.apple.quicktime.make"] = "Apple"
        video = target.add_stream("libx264", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        video.metadata.update(language="ger", title="Bild")
        track = target.add_stream("aac", rate=RATE, layout="mono")
        target.add_attachment("notes.txt", "text/plain", b"hello")
        begins = [0, 500, 900]
        times = enumerate(zip(begins, [500, 900, 1200], "abc", strict=True))
        base = {"time_base": Fraction(1, 1000)}
        target.set_chapters(
            [
                {"id": i, "start": a, "end": b, "metadata": {"title": t}} | base
                for i, (a, b, t) in times
            ]
        )
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8), "rgb24")
            target.mux(video.encode(frame))
        target.mux(video.encode())
        encode_sound(target, track, 1.2)
    for suffix in (".mp4", ".mov", ".mkv"):
        out = tmp_path / f"out{suffix}"
        notes = mux(path, silence(0.8), RATE, out)
        assert notes[0] == f"Not copied from {path}: 1 attachment."
        with av.open(str(out)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
            assert tags["title"] == "My film"
            assert tags["com.apple.quicktime.make"] == "Apple"
            assert suffix != ".mkv" or tags["creation_time"].startswith("2020-01-02T03:04:05")
            assert container.streams.video[0].language in ("ger", "deu")
            found = [
                (round(float(c["start"] * c["time_base"]), 2), c["metadata"]["title"])
                for c in container.chapters()
            ]
            assert found == [(0.0, "a"), (0.5, "b")]
            for stream in (container.streams.video[0], container.streams.audio[0]):
                assert stream.disposition & av.stream.Disposition.default


def test_dolby_vision_stays_known(tmp_path: Path) -> None:
    path = Film("hevc", "mp4", 6, Fraction(25), {}, [Fraction(i, 25) for i in range(6)]).write(
        tmp_path
    )
    content = bytearray(path.read_bytes())
    assert content.index(b"mdat") < content.index(b"moov")  # so that nothing moves but the index
    # Version 1.0, profile 8, level 1; a base layer with RPUs, compatible to HDR10.
    box = bytes.fromhex("00000020 64767643 0100 100d 10") + bytes(19)
    boxes, place, end = [], 0, len(content)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hev1"):
        place = content.index(name, place, end) - 4
        boxes.append(place)
        end = place + int.from_bytes(content[place : place + 4], "big")
        place += 8
    content[end:end] = box
    for place in boxes:
        size = int.from_bytes(content[place : place + 4], "big") + len(box)
        content[place : place + 4] = size.to_bytes(4, "big")
    path.write_bytes(bytes(content))
    for suffix in (".mp4", ".mkv"):
        mux(path, silence(0.24), RATE, tmp_path / f"out{suffix}")
        assert box[8:] in (tmp_path / f"out{suffix}").read_bytes()


def test_what_is_transparent_stays_so(tmp_path: Path) -> None:
    """VP8 keeps it beside each packet, and a tag says that it is there."""
    with av.open(str(tmp_path / "in.webm"), "w") as target:
        video = target.add_stream("libvpx", rate=25, options={"auto-alt-ref": "0"})
        video.width = video.height = 32
        video.pix_fmt = "yuva420p"
        video.metadata["alpha_mode"] = "1"
        for i in range(5):
            pixels = np.full((32, 32, 4), 40 * i, np.uint8)
            target.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgba")))
        target.mux(video.encode())
    for suffix in (".webm", ".mkv"):
        mux(tmp_path / "in.webm", silence(0.2), RATE, tmp_path / f"out{suffix}")
        beside = []
        for name in ("in.webm", f"out{suffix}"):
            with av.open(str(tmp_path / name)) as container:
                tags = container.streams.video[0].metadata
                assert {key.lower(): value for key, value in tags.items()}["alpha_mode"] == "1"
                beside.append([
                    bytes(p.get_sidedata("matroska_block_additional"))
                    for p in container.demux(video=0) if p.size
                ])  # fmt: skip
        assert beside[0] == beside[1]
        assert all(beside[0])


def _trimmed(path: Path, begins: int, lasts: int) -> Path:
    """Let the edit list of an .mp4 show `lasts` ms from `begins` ms on."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 4
    assert content[at : at + 8] == bytes([0, 0, 0, 0, 0, 0, 0, 1])
    scale = 12_800  # ticks a second of a track at 25 pictures a second
    offset = int.from_bytes(content[at + 12 : at + 16], "big") + begins * scale // 1000
    content[at + 8 : at + 16] = lasts.to_bytes(4, "big") + offset.to_bytes(4, "big")
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize(("begins", "lasts"), [(0, 480), (240, 400), (200, 1000)])
def test_a_trimmed_clip_stays_trimmed(tmp_path: Path, begins: int, lasts: int) -> None:
    path = _trimmed(write_video(tmp_path / "in.mp4", frames=30), begins, lasts)
    shown = look(path).pictures
    video = read_video(path, rates=(25,))
    assert len(shown) == len(video.frames[0]) == lasts // 40
    for suffix in (".mp4", ".mov"):
        mux(path, silence(video.duration), RATE, tmp_path / f"out{suffix}")
        copy = look(tmp_path / f"out{suffix}").pictures
        assert [p for _, p in copy] == [p for _, p in shown]
        assert [t - copy[0][0] for t, _ in copy] == [t - shown[0][0] for t, _ in shown]
        assert copy[0][0] == 0
    report = check(path)
    assert ".mkv" not in report.containers
    with pytest.raises(InputError, match=r"edit list .* Choose .mp4 or .m4v or .mov"):
        mux(path, silence(video.duration), RATE, tmp_path / "out.mkv")
    with pytest.raises(InputError, match="edit list"):
        check_output(path, tmp_path / "out.mkv")
    assert not (tmp_path / "out.mkv").exists()


def test_pictures_after_the_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.mp4", frames=30)
    whole = look(path).pictures
    mux(path, silence(0.48), RATE, tmp_path / "out.mp4")
    assert look(tmp_path / "out.mp4").pictures == whole[:12]
    notes = mux(path, silence(0.48), RATE, tmp_path / "out.mkv")
    copy = look(tmp_path / "out.mkv").pictures
    beyond = len(copy) - 12
    assert [p for _, p in copy[:12]] == [p for _, p in whole[:12]]
    assert {p for _, p in copy} <= {p for _, p in whole}
    assert beyond
    assert f"shows {beyond} of the pictures after" in notes[0]


def test_only_containers_that_were_tried_are_named(tmp_path: Path) -> None:
    rate = Fraction(25)
    times = [i / rate for i in range(6)]
    for codec, suffix, holds in (
        ("vp8", "webm", {".mkv", ".webm"}),
        ("prores", "mov", {".mov", ".mkv"}),
        ("vp9", "webm", {".mp4", ".m4v", ".mkv", ".webm"}),
    ):
        path = Film(codec, suffix, 6, rate, {}, times).write(tmp_path)
        with av.open(str(path)) as container:
            assert set(containers_for(container.streams.video[0])) == holds
        for other in VIDEO_SUFFIXES:
            out = tmp_path / f"out{other}"
            if other in holds:
                mux(path, silence(0.24), RATE, out)
                assert len(look(out).pictures) == 6
                continue
            with pytest.raises(InputError, match=f"cannot hold {codec}") as error:
                mux(path, silence(0.24), RATE, out)
            advice = str(error.value).split("Choose ")[1].split(", or write")[0]
            assert set(advice.split(" or ")) == holds


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """Two transport streams, one after the other: each is shown where reading has it."""
    parts = []
    for i in range(2):
        rate = Fraction(25)
        film = Film("h264", "ts", 20, rate, {"bf": "2"}, [k / rate for k in range(20)], seed=i)
        film.start = Fraction(40 if i == 0 else 3)
        (tmp_path / str(i)).mkdir()
        parts.append(film.write(tmp_path / str(i)))
    path = tmp_path / "both.ts"
    path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    video = read_video(path, rates=(25,))
    mux(path, silence(video.duration), RATE, tmp_path / "out.mp4")
    copy = look(tmp_path / "out.mp4").pictures
    assert [p for _, p in copy] == [p for path in parts for _, p in look(path).pictures]
    assert np.array_equal(read_video(tmp_path / "out.mp4", rates=(25,)).frames[0], video.frames[0])
