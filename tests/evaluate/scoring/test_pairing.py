from __future__ import annotations

from pathlib import Path

import pytest

from mfmjt.errors import InputError
from mfmjt.evaluate.scoring.pairing import Problem, pair
from tests.evaluate.scoring.conftest import Write


def test_names_pair_files_in_any_folder_below(write: Write, tmp_path: Path) -> None:
    write("made/a/one.wav"), write("made/two.flac"), write("made/three.wav")
    write("real/one.flac"), write("real/b/two.wav"), write("real/four.wav")
    listing = pair(tmp_path / "made", tmp_path / "real")
    assert listing.pairs == [("one", "one"), ("two", "two")]
    assert listing.generated["two"] == tmp_path / "made" / "two.flac"
    assert listing.problems == [
        Problem("generated", "three", "there is no reference of this name"),
        Problem("reference", "four", "there is no generated sound of this name"),
    ]


def test_a_name_that_two_files_have_is_listed_and_not_chosen(write: Write, tmp_path: Path) -> None:
    write("made/one.wav"), write("made/b/one.flac"), write("made/two.wav")
    write("real/one.wav"), write("real/two.wav")
    listing = pair(tmp_path / "made", tmp_path / "real")
    assert listing.pairs == [("two", "two")]
    told = {problem.side: problem.why for problem in listing.problems}
    assert told["generated"].startswith("2 files have this name: ")


def test_a_table_pairs_any_names(write: Write, tmp_path: Path) -> None:
    write("made/x.wav", 1), write("real/y.wav", 2)
    (tmp_path / "clips.csv").write_text(
        "id,generated,reference,caption,class,events\n"
        'first,made/x.wav,real/y.wav,"a bell, twice",bell,0.1 0.5\n'
        "second,made/no.wav,real/y2.wav,,,\n"
    )
    listing = pair(tmp_path / "clips.csv", None)
    assert listing.pairs == [("first", "first")]
    assert listing.reference == {"first": tmp_path / "real" / "y.wav"}
    assert listing.known["first"] == {
        "caption": "a bell, twice", "class": "bell", "events": [0.1, 0.5],
    }  # fmt: skip
    sides = {(problem.side, problem.name) for problem in listing.problems}
    assert sides == {("generated", "second"), ("reference", "second")}


def test_captions_without_a_file_and_files_without_a_caption(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "captions.csv").write_text("name,caption\nclip1,a tone\nclip99,nothing\n")
    listing = pair(*folders, tmp_path / "captions.csv")
    assert listing.known["clip1"]["caption"] == "a tone"
    why = {problem.name: problem.why for problem in listing.problems}
    assert why["clip99"] == "there is no sound of this name"
    assert why["clip0"] == "there is no caption"
    assert len(listing.problems) == 1 + 9


def test_videos_go_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip3.mp4").write_bytes(b"")
    listing = pair(*folders, videos=tmp_path / "videos")
    assert listing.known["clip3"]["video"] == tmp_path / "videos" / "clip3.mp4"
    assert sum(problem.side == "video" for problem in listing.problems) == 9


@pytest.mark.parametrize(
    ("made", "real"),
    [
        ("000000014_zxpo56cpUBU_000007-0", "zxpo56cpUBU_000007"),
        ("zxpo56cpUBU_000007-0", "zxpo56cpUBU_000007"),
        ("Y---g-f_I2yQ_000001_0", "---g-f_I2yQ_000001"),
        ("plain", "plain"),
    ],
)
def test_av_benchmark_cuts_names_by_their_length(
    write: Write, tmp_path: Path, made: str, real: str
) -> None:
    write(f"made/{made}.wav"), write(f"real/{real}.wav")
    listing = pair(tmp_path / "made", tmp_path / "real", protocol="av-benchmark")
    assert listing.pairs == [(made, real)]


def test_av_benchmark_looks_at_one_folder_and_takes_the_last_of_equal_names(
    write: Write, tmp_path: Path
) -> None:
    write("made/one.wav"), write("made/one.flac"), write("made/b/two.wav"), write("made/three.ogg")
    write("real/one.wav"), write("real/two.wav")
    listing = pair(tmp_path / "made", tmp_path / "real", protocol="av-benchmark")
    assert listing.generated == {"one": tmp_path / "made" / "one.flac"}


def test_what_is_nothing_to_pair_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no sounds"):
        pair(folders[0], empty)
    with pytest.raises(InputError, match=r"neither .wav or .flac"):
        pair(empty, folders[1], protocol="av-benchmark")
    with pytest.raises(InputError, match="no folder or table"):
        pair(tmp_path / "nowhere", folders[1])
    with pytest.raises(InputError, match="nothing to compare with"):
        pair(folders[0], None)
    (folders[0] / "clip0.wav").rename(empty / "another.wav")
    with pytest.raises(InputError, match="none belong together"):
        pair(empty, folders[1])
    (tmp_path / "rows.csv").write_text("name,sound\nclip1,made/clip1.wav\n")
    with pytest.raises(InputError, match="no column generated or path"):
        pair(tmp_path / "rows.csv", folders[1])
    (tmp_path / "events.csv").write_text("id,events\nclip1,soon\n")
    with pytest.raises(InputError, match="'soon'"):
        pair(*folders, tmp_path / "events.csv")
    (tmp_path / "nameless.csv").write_text("caption\na tone\n")
    with pytest.raises(InputError, match="names no clip"):
        pair(*folders, tmp_path / "nameless.csv")
    with pytest.raises(InputError, match="of videos"):
        pair(*folders, videos=tmp_path / "nowhere")
