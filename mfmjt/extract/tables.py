"""Tables of clips: which file, which caption, which split; our own form, and those of data sets.

A row that cannot be used is a row all the same, with the reason: it is listed and skipped, and what
comes after it keeps its place.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfmjt.errors import InputError, reason, some
from mfmjt.extract.esc50 import CAPTIONS

__all__ = ["LAYOUTS", "MEDIA", "SUFFIXES", "Row", "read_folder", "read_table", "records"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Suffixes of the tables that can be read."""
MEDIA = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".3gp"),
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".wma"),
}
"""Suffixes of files that may hold video or sound."""
_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Row:
    """One clip of a table.

    Attributes:
        line: Number among the table's rows, from 1.
        id: Name, unique in a table.
        path: The media file, or None if there is none.
        caption: What is heard, in words; empty where nothing says it.
        split: Name of the split, such as `train`.
        reason: Why the row cannot be used, as far as the table shows; empty if it can.
    """

    line: int
    id: str
    path: Path | None
    caption: str
    split: str
    reason: str = ""


_Fields = Mapping[str, Any]
_Parsed = tuple[str, list[str], str, str]
"""Id, names under which the file may be found, caption, split."""


def _plain(row: _Fields) -> _Parsed:
    name, path = _text(row, "id"), _text(row, "path")
    return name or path, [path or name], _text(row, "caption"), _text(row, "split")


def _vggsound(row: _Fields) -> _Parsed:
    """`id,start,label,split` without a header; files are called `id_start`, six digits."""
    start = _text(row, "start")
    name = f"{_text(row, 'id')}_{int(start):06d}" if start.isdecimal() else ""
    return name, [name], _text(row, "caption"), _text(row, "split")


def _audiocaps(row: _Fields) -> _Parsed:
    """Read AudioCaps: a file for each split, and a row for each caption of a clip."""
    number, clip, start = (_text(row, key) for key in ("audiocap_id", "youtube_id", "start_time"))
    names = [f"{clip}_{start}", f"{clip}_{int(start):06d}" if start.isdecimal() else ""]
    return number, [*names, number, f"Y{clip}", clip], _text(row, "caption"), ""


def _wavcaps(row: _Fields) -> _Parsed:
    name = _text(row, "id")
    return name, [name], _text(row, "caption"), ""


def _esc50(row: _Fields) -> _Parsed:
    """Read ESC-50: folds 1 to 3 train, 4 is for validation, 5 for tests."""
    name, category = _text(row, "filename"), _text(row, "category")
    split = {"4": "validation", "5": "test"}.get(_text(row, "fold"), "train")
    return name, [name], CAPTIONS.get(category, category.replace("_", " ")), split


@dataclass(frozen=True)
class _Layout:
    parse: Callable[[_Fields], _Parsed]
    needed: tuple[tuple[str, ...], ...]  # of each, one column
    header: tuple[str, ...] | None = None  # for tables without one
    inside: str | None = None  # the list's name in a JSON file


_VGGSOUND = ("id", "start", "caption", "split")
_KNOWN = {
    "table": _Layout(_plain, (("path", "id"),)),
    "vggsound": _Layout(_vggsound, (("id",), ("start",), ("caption",)), header=_VGGSOUND),
    "audiocaps": _Layout(
        _audiocaps, (("audiocap_id",), ("youtube_id",), ("start_time",), ("caption",))
    ),
    "esc50": _Layout(_esc50, (("filename",), ("fold",), ("category",))),
    "wavcaps": _Layout(_wavcaps, (("id",), ("caption",)), inside="data"),
}
LAYOUTS = tuple(_KNOWN)
"""Layouts of tables that can be read: our own, and those of data sets."""


def read_table(
    path: str | os.PathLike[str],
    layout: str = "table",
    media: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> list[Row]:
    """Read a table of clips and find their files.

    Args:
        path: The table: `.csv`, `.tsv`, `.jsonl`, `.json` (a list of objects) or `.parquet`.
        layout: Form of the table: `table` has the columns `path` or `id`, and optionally `caption`
            and `split`; `vggsound`, `audiocaps`, `esc50` and `wavcaps` are as these sets are
            published.
        media: Folder of the files; None is the table's own. What is not found under its path is
            looked for by name, with any suffix of a sound or video, in all folders below.
        columns: Our name of a column -> the table's, where they differ.
        split: The only split that is read; for a table without splits, that of all its
            rows (None: `train`).

    Raises:
        InputError: No such table, a form that cannot be read, or a column that is missing.
    """
    path = Path(path)
    if layout not in _KNOWN:
        raise InputError(f"There is no layout {layout!r}. Choose one of {', '.join(LAYOUTS)}.")
    form = _KNOWN[layout]
    folder = path.parent if media is None else Path(media)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Say where the files are with --media.")
    files = _Files(folder)
    renamed = dict(columns or {})
    wanted = split and _SPLITS.get(split, split)
    rows: list[Row] = []
    seen: dict[tuple[str, str], int] = {}
    for line, record in enumerate(records(path, form.header, form.inside), start=1):
        fields = {**record, **{ours: record.get(theirs) for ours, theirs in renamed.items()}}
        if line == 1:
            _check_columns(path, form, fields, renamed)
        name, tried, caption, own = form.parse(fields)
        torn = None in fields  # what csv calls fields beyond the header's
        own = "" if torn else _SPLITS.get(own, own)
        own = own or wanted or "train"
        if wanted and own != wanted:
            continue
        if not re.fullmatch(r"[\w-]+", own):
            raise InputError(
                f"Row {line} of {path} has the split {own!r}, which becomes a folder. Give a "
                "single word, such as train."
            )
        found = files.find([name for name in tried if name])
        row = Row(line, name, found, caption, own)
        reason = _refused(row, tried, folder, torn)
        if not reason and seen.setdefault((own, name), line) != line:
            reason = f"The id {name} is that of row {seen[own, name]} already."
        rows.append(replace(row, reason=reason))
    if not rows:
        of = f" of the split {wanted}" if wanted else ""
        raise InputError(f"{path} has no rows{of}. Give a table with some.")
    return rows


def read_folder(folder: str | os.PathLike[str], split: str) -> list[Row]:
    """Return a row without caption for each media file in a folder and in those below it.

    Raises:
        InputError: There are none.
    """
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in MEDIA)
    if not found:
        raise InputError(f"{folder} holds neither a feature store nor videos. Give one of both.")
    names = [str(path.relative_to(folder)) for path in found]
    return [
        Row(line, name, path, "", split)
        for line, (name, path) in enumerate(zip(names, found, strict=True), start=1)
    ]


def _refused(row: Row, tried: list[str], folder: Path, torn: bool) -> str:
    if torn:
        return "The row has more fields than the header: a caption with commas needs quotes."
    if not row.id:
        return "The row names no file."
    if row.path is None:
        return f"There is no file {next(name for name in tried if name)} in {folder}."
    return ""


def _check_columns(path: Path, form: _Layout, fields: _Fields, renamed: Mapping[str, str]) -> None:
    there = [name for name in fields if isinstance(name, str)]
    for ours, theirs in renamed.items():
        if fields[ours] is None and theirs not in there:
            raise InputError(
                f"{path} has no column {theirs!r}: it has {some(there)}. Correct --column."
            )
    for choice in form.needed:
        if not set(choice) & set(there):
            raise InputError(
                f"{path} has no column {' or '.join(choice)}: it has {some(there)}. "
                f"Say which one it is with --column {choice[0]}=NAME, or choose another --layout."
            )


def records(
    path: Path, header: tuple[str, ...] | None = None, inside: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, whatever its columns.

    Args:
        path: The table, of one of `SUFFIXES`.
        header: Names of the columns, for a `.csv` or `.tsv` without them.
        inside: Name of the list in a `.json` that is an object.

    Raises:
        InputError: No such table, or a form that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no table that is known. Give one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise InputError(f"There is no table {path}. Check the name.")
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".json":
            yield from _objects(json.loads(path.read_text()), inside)
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                if suffix == ".jsonl":
                    yield from _objects([json.loads(line) for line in file if line.strip()], None)
                else:
                    mark = "\t" if suffix == ".tsv" else ","
                    for row in csv.DictReader(file, header, delimiter=mark):
                        yield dict(row)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {reason(error)}. Correct or convert it."
        ) from error


def _objects(content: Any, inside: str | None) -> Iterator[dict[str, Any]]:
    if inside is not None and isinstance(content, dict):
        content = content.get(inside)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError("The table is no list of JSON objects, one a clip. Correct it.")
    yield from content


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path} needs pyarrow, which is not installed. Run: pip install 'mfmjt[data]', or "
            "give the table as .csv."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path} cannot be read: {reason(error)}. Correct or convert it."
        ) from error


def _text(row: _Fields, key: str) -> str:
    value = row.get(key)
    return "" if value is None else " ".join(str(value).split())


class _Files:
    """The media files below a folder, by path and by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, Path] | None = None

    def find(self, names: list[str]) -> Path | None:
        for name in names:
            path = self._folder / name
            if path.is_file():
                return path
        for name in names:
            stem = Path(name)
            known = stem.suffix.lower() in MEDIA
            found = self._names().get(stem.stem if known else stem.name)
            # A name with folders is a path, and is not to be found elsewhere.
            if found is not None and stem.name == name:
                return found
        return None

    def _names(self) -> dict[str, Path]:
        if self._by_name is None:
            self._by_name = {}
            for folder, inside, files in os.walk(self._folder):
                inside.sort()
                for name in sorted(files):
                    path = Path(folder, name)
                    if path.suffix.lower() in MEDIA:
                        self._by_name.setdefault(path.stem, path)
        return self._by_name
