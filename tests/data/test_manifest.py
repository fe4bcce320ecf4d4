from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from mfmjt.data.manifest import COLUMNS, SPLITS, credits_page, read_manifest, shipped
from mfmjt.data.wordings import wordings
from mfmjt.errors import InputError

LINE = {
    "set": "things",
    "source": "someone/sounds@0123456789ab",
    "path": "a/dog-{0..2}.wav",
    "licence": "CC-BY 4.0",
    "author": "A. Person",
    "split": "train",
    "label": "dog",
    "caption": "a dog, barking",
    "sha256": "0" * 64,
}


def written(path: Path, *lines: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(lines)
    return path


def test_the_manifest_in_the_package() -> None:
    lines = read_manifest(shipped())
    assert shipped().stat().st_size < 400_000
    assert {line.split for line in lines} == set(SPLITS)
    assert len({line.id for line in lines}) == len(lines)
    assert all(line.author and line.licence and line.caption for line in lines)


def test_a_line_is_read_with_its_place_and_its_pieces(tmp_path: Path) -> None:
    (line,) = read_manifest(written(tmp_path / "m.csv", LINE))
    assert line.place == f"Line 2 of {tmp_path / 'm.csv'}"
    assert line.paths == ["a/dog-0.wav", "a/dog-1.wav", "a/dog-2.wav"]
    assert line.id.startswith("things_")
    assert line.about == {
        "split": "train",
        "label": "dog",
        "caption": "a dog, barking",
        "set": "things",
        "licence": "CC-BY 4.0",
        "credit": "A. Person",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("CC0", "CC0 1.0", "CC BY 3.0", "CC-BY-4.0", "OGA BY 3.0", "PD", "CC-BY/CC0"),
        *("public domain", "PD (US National Park Service)", "CC-BY 3.0 (planet/authors.txt)"),
    ],
)
def test_allowed_licenses(tmp_path: Path, name: str) -> None:
    assert read_manifest(written(tmp_path / "m.csv", LINE | {"licence": name}))


@pytest.mark.parametrize(
    "name",
    [
        *("CC BY-NC 3.0", "CC-BY-SA 4.0", "CC BY-ND", "GPL-2", "ODbL", "CC0/CC-BY-SA", "unknown"),
        *("CC-BY NC (a note)", "Sampling+"),
    ],
)
def test_other_licenses_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        read_manifest(written(tmp_path / "m.csv", LINE, LINE | {"licence": name}))
    assert f"Line 3 of {tmp_path / 'm.csv'}: the license {name!r} is not allowed" in str(
        caught.value
    )
    assert "remove the line" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": ""}, "label is empty"),
        ({"split": "dev"}, "the split 'dev': give one of train, validation, test"),
        ({"source": "github.com/a/b"}, "is not owner/name@commit"),
        ({"sha256": "abc"}, "Give 16 to 64 hexadecimal digits"),
        ({}, "is in Line 2 of"),
    ],
)
def test_wrong_lines_are_refused(tmp_path: Path, change: dict[str, str], told: str) -> None:
    table = written(tmp_path / "m.csv", LINE, LINE | change)
    with pytest.raises(InputError, match="Line 3 of") as caught:
        read_manifest(table)
    assert told in str(caught.value)


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match="no column 'sha256'"):
        read_manifest(written(tmp_path / "m.csv", LINE, columns=COLUMNS[:-1]))
    with pytest.raises(InputError, match="no lines after its header"):
        read_manifest(written(tmp_path / "m.csv"))
    with (tmp_path / "m.csv").open("a") as file:
        file.write("a,b,c\n")
    with pytest.raises(InputError, match=r"Line 2 of .* has not as many fields"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="Give a CSV file in UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_credits_name_every_author_once_for_each_set_and_license() -> None:
    page = credits_page(
        [
            ("things", "someone/sounds@0123", "b | c", "CC-BY"),
            ("things", "someone/sounds@0123", "A", "CC0"),
            ("things", "someone/sounds@0123", "A", "CC0"),
            ("own", "", "me", "CC0"),
        ]
    )
    assert "From <https://github.com/someone/sounds>, commit 0123." in page
    assert page.index("| A | CC0 | 2 |") < page.index("| b \\| c | CC-BY | 1 |")
    assert page.index("## own") > page.index("## things")
    assert page.count("From <") == 1


def test_the_page_has_the_sets_and_labels_of_the_files() -> None:
    page = (Path(__file__).parents[2] / "docs" / "real-sounds.md").read_text()
    tables = [
        [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in block.splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    ]
    lines = read_manifest(shipped())
    sets, labels = (rows[2:] for rows in tables)
    assert [(name, source, int(count)) for name, source, count, _ in sets] == [
        (name, f"[{repo}](https://github.com/{repo}) {commit}", count)
        for (name, repo, commit), count in Counter(
            (line.set, *line.source.split("@")) for line in lines
        ).items()
    ]
    count = Counter(line.label for line in lines)
    assert labels == [
        (label, str(count[label]), wording.training[0], "; ".join(wording.unseen))
        for label, wording in wordings().items()
    ]
