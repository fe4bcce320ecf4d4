from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mfmjt.errors import InputError
from mfmjt.extract.esc50 import CAPTIONS
from mfmjt.extract.tables import LAYOUTS, Row, read_table
from tests.extract.conftest import write_json, write_table

ROWS = [("one.mp4", "a dog, barking", "train"), ("deep/two.wav", "", "val")]
HEADER = ("path", "caption", "split")


@pytest.fixture
def media(tmp_path) -> Path:
    (tmp_path / "deep").mkdir()
    for name, *_ in ROWS:
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def as_objects() -> list[dict[str, str]]:
    return [dict(zip(HEADER, row, strict=True)) for row in ROWS]


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"table{suffix}"
    if suffix in (".csv", ".tsv"):
        return write_table(path, HEADER, ROWS)
    if suffix == ".json":
        return write_json(path, as_objects())
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, as_objects())) + "\n\n")
        return path
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(as_objects()), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_form_says_the_same(media, suffix):
    assert read_table(written(media, suffix)) == [
        Row(1, "one.mp4", media / "one.mp4", "a dog, barking", "train"),
        Row(2, "deep/two.wav", media / "deep" / "two.wav", "", "validation"),
    ]


def test_names_of_columns_and_splits(media, tmp_path_factory):
    table = tmp_path_factory.mktemp("elsewhere") / "t.tsv"
    write_table(table, ("id", "label"), [("one", "bark"), ("two", "meow")])
    rows = read_table(table, media=media, columns={"caption": "label"}, split="val")
    # Found by name, wherever they are below the folder, and whatever their suffix.
    assert [(r.path, r.caption, r.split) for r in rows] == [
        (media / "one.mp4", "bark", "validation"),
        (media / "deep" / "two.wav", "meow", "validation"),
    ]
    assert [r.id for r in read_table(written(media, ".csv"), split="validation")] == [ROWS[1][0]]


def test_vggsound(tmp_path):
    """Without a header; `id_start` with six digits, in folders of any depth."""
    (tmp_path / "video" / "x").mkdir(parents=True)
    for name in ("--0PQM4-hqg_000030", "abc_def_000001"):
        (tmp_path / "video" / "x" / f"{name}.mp4").write_bytes(b"")
    rows = [
        ("--0PQM4-hqg", 30, "waterfall burbling", "train"),
        ("abc_def", 1, "playing badminton", "test"),
    ]
    found = read_table(write_table(tmp_path / "vggsound.csv", None, rows), "vggsound")
    assert [(r.id, r.path and r.path.stem, r.caption, r.split, r.reason) for r in found] == [
        ("--0PQM4-hqg_000030", "--0PQM4-hqg_000030", "waterfall burbling", "train", ""),
        ("abc_def_000001", "abc_def_000001", "playing badminton", "test", ""),
    ]


@pytest.mark.parametrize("name", ["Yqz_30.wav", "Yqz_000030.flac", "7.wav", "YYqz.wav", "Yqz.m4a"])
def test_audiocaps(tmp_path, name):
    """A file for each split, five captions a clip in two of them; files have many names."""
    header = ("audiocap_id", "youtube_id", "start_time", "caption")
    rows = [(7, "Yqz", 30, "A dog barks"), (8, "Yqz", 30, "Barking")]
    table = write_table(tmp_path / "val.csv", header, rows)
    (tmp_path / name).write_bytes(b"")
    found = read_table(table, "audiocaps", split="validation")
    assert [(r.id, r.caption, r.split) for r in found] == [
        ("7", "A dog barks", "validation"),
        ("8", "Barking", "validation"),
    ]
    assert found[0].path == tmp_path / name
    shared = name != "7.wav"
    assert (found[1].path == tmp_path / name) == shared


def test_wavcaps(tmp_path):
    """JSON with a list `data`; those of AudioSet end in .wav and lie there as .flac."""
    for name in ("Y--SZ.flac", "1234.flac"):
        (tmp_path / name).write_bytes(b"")
    content = {
        "num_captions_per_audio": 1,
        "data": [
            {"id": "Y--SZ.wav", "caption": "Wind blows.", "audio": "wav", "duration": 10.0},
            {"id": 1234, "caption": "Rain falls.", "duration": 3.5, "href": "/x"},
        ],
    }
    found = read_table(write_json(tmp_path / "as_final.json", content), "wavcaps")
    assert [(r.id, r.path, r.caption, r.split) for r in found] == [
        ("Y--SZ.wav", tmp_path / "Y--SZ.flac", "Wind blows.", "train"),
        ("1234", tmp_path / "1234.flac", "Rain falls.", "train"),
    ]


def test_esc50(tmp_path):
    """The table is in one folder, the sounds in another; folds are the splits."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    rows = [
        ("1-100032-A-0.wav", 1, 0, "dog", True, 100032, "A"),
        ("4-1-A-34.wav", 4, 34, "can_opening", False, 1, "A"),
        ("5-2-B-50.wav", 5, 50, "own_category", False, 2, "B"),
    ]
    for name, *_ in rows:
        (tmp_path / "audio" / name).write_bytes(b"")
    table = write_table(tmp_path / "meta" / "esc50.csv", header, rows)
    found = read_table(table, "esc50", tmp_path)
    assert [(r.id, r.path, r.caption, r.split) for r in found] == [
        (rows[0][0], tmp_path / "audio" / rows[0][0], "a dog barking", "train"),
        (rows[1][0], tmp_path / "audio" / rows[1][0], "a can being opened", "validation"),
        (rows[2][0], tmp_path / "audio" / rows[2][0], "own category", "test"),
    ]
    assert len(CAPTIONS) == len(set(CAPTIONS.values())) == 50


def test_rows_that_cannot_be_used_keep_their_place(media):
    table = media / "t.csv"
    table.write_text(
        "path,caption\none.mp4,a\nnone.mp4,b\none.mp4,c\n,d\none.mp4,e, f\ndeep/two.wav,g\n"
    )
    rows = read_table(table)
    assert [bool(r.reason) for r in rows] == [False, True, True, True, True, False]
    for row, words in zip(
        rows[1:5],
        ("no file none.mp4", "that of row 1 already", "names no file", "needs quotes"),
        strict=True,
    ):
        assert words in row.reason
    assert [r.line for r in rows] == list(range(1, 7))


@pytest.mark.parametrize(
    ("name", "content", "arguments", "words"),
    [
        ("t.csv", "file,text\na,b\n", {}, "no column path or id.*--column path=NAME"),
        ("t.csv", "path,text\na,b\n", {"columns": {"caption": "txt"}}, "no column 'txt'"),
        ("t.csv", "path,caption\na,b\n", {"layout": "audiocaps"}, "no column audiocap_id"),
        ("t.csv", "path,caption\na,b\n", {"layout": "coco"}, ", ".join(LAYOUTS)),
        ("t.csv", "path,caption\n", {}, "has no rows"),
        ("t.csv", "path,split\na,test\n", {"split": "train"}, "no rows of the split train"),
        ("t.csv", "path,split\na,../x\n", {}, "Row 1 .* becomes a folder"),
        ("t.csv", b"path\n\xff\xfe\n", {}, "cannot be read"),
        ("t.json", "{", {}, "cannot be read"),
        ("t.json", "{}", {}, "list of JSON objects"),
        ("t.jsonl", "3\n", {}, "list of JSON objects"),
        ("t.xlsx", "", {}, "no table that is known"),
        ("t.csv", "path\na\n", {"media": "nowhere"}, "--media"),
    ],
)
def test_wrong_tables_say_what_to_do(tmp_path, name, content, arguments, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        read_table(path, **arguments)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no table .*none\.csv"):
        read_table(tmp_path / "none.csv")


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"mfmjt\[data\]"):
        read_table(tmp_path / "t.parquet")


def test_a_damaged_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match=r"t\.parquet cannot be read"):
        read_table(tmp_path / "t.parquet")
