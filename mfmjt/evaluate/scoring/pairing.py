"""Which clips are scored: the files of both sides, what is known of them, and who belongs to whom.

An item that cannot be scored is listed with the reason; nothing is put in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mfmjt.errors import InputError, short, some
from mfmjt.evaluate.scoring.benchmark import benchmark_name, cached_names
from mfmjt.extract.tables import MEDIA, SUFFIXES, records

__all__ = ["Listing", "Problem", "Protocol", "pair"]

Protocol = str
"""`default`, or `av-benchmark` for that tool's choices."""


class Problem(NamedTuple):
    """An item that is not scored.

    Attributes:
        side: `generated`, `reference`, `caption` or `video`.
        name: Its id, or the file.
        why: The reason.
    """

    side: str
    name: str
    why: str


@dataclass
class Listing:
    """The clips to score.

    Attributes:
        generated: File of each id; None for one whose features are in a cache.
        reference: The same of the real sounds.
        pairs: Ids of generated and real sounds that belong together, in order.
        known: Id of a real sound -> `caption`, `class`, `events` and `video` as far as they are
            given.
        problems: What is left out.
    """

    generated: dict[str, Path | None]
    reference: dict[str, Path | None]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def pair(
    generated: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    captions: str | os.PathLike[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    protocol: Protocol = "default",
) -> Listing:
    """Find the clips of both sides and pair them.

    Args:
        generated: Folder of sounds, in which the id of a clip is the stem of its file; or a table
            with the columns `id`, `generated` (or `path`) and, as far as they are known,
            `reference`, `caption`, `class`, `events` (seconds, separated by spaces) and `video`.
        reference: Folder or table of the real sounds; None where the first table names them.
        captions: Table with the columns `id` (or `name`) and `caption`, `class` or `events`.
        videos: Folder of videos, by stem.
        protocol: `av-benchmark` takes `.wav` and `.flac` of the folder itself, and pairs by names
            that are cut as that tool cuts them.

    Raises:
        InputError: No such folder or table, nothing in it, or no pair.
    """
    problems: list[Problem] = []
    known: dict[str, dict[str, Any]] = {}
    made = _side(Path(generated), "generated", protocol, problems, known)
    source = Path(generated if reference is None else reference)
    if reference is None and source.is_dir():
        raise InputError(
            "There is nothing to compare with. Give the real sounds with --reference, or a table "
            "with the columns generated and reference."
        )
    real = _side(source, "reference", protocol, problems, known, reference is not None)
    listing = Listing(made, real, known=known, problems=problems)
    for name in made:
        wanted = benchmark_name(name) if protocol == "av-benchmark" else name
        if wanted in real:
            listing.pairs.append((name, wanted))
        else:
            problems.append(Problem("generated", name, "there is no reference of this name"))
    paired = {name for _, name in listing.pairs}
    problems += [
        Problem("reference", name, "there is no generated sound of this name")
        for name in real
        if name not in paired
    ]
    if not listing.pairs:
        raise InputError(
            f"Of the {len(made):,} generated sounds ({some(made, most=2, each=40)}) and "
            f"{len(real):,} references ({some(real, most=2, each=40)}) none belong together: files "
            "are paired by their names without the suffix. Rename them, or give a table with the "
            "columns generated and reference."
        )
    if captions is not None:
        _add_captions(Path(captions), listing)
    if videos is not None:
        _add_videos(Path(videos), listing, protocol)
    return listing


def _side(
    source: Path,
    side: str,
    protocol: Protocol,
    problems: list[Problem],
    known: dict[str, dict[str, Any]],
    own: bool = True,
) -> dict[str, Path | None]:
    """Return the files of one side by id, in order of the ids; `own`: the table is its alone."""
    if source.is_dir():
        if protocol == "av-benchmark":
            return _benchmark_side(source, side)
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in MEDIA and p.is_file())
        named = [(path.stem, path) for path in paths]
        if not named:
            raise InputError(f"{source} holds no sounds ({side}). Give a folder with some.")
    elif source.suffix.lower() in SUFFIXES:
        named = _rows(source, (side, "path") if own else (side,), problems, known)
    else:
        raise InputError(
            f"There is no folder or table {source} of {side} sounds. Give a folder, or one of "
            f"{', '.join(SUFFIXES)}."
        )
    files: dict[str, list[Path]] = {}
    for name, path in named:
        files.setdefault(name, []).append(path)
    for name, several in files.items():
        if len(several) > 1:
            told = some((path.name for path in several), most=2, each=60)
            problems.append(Problem(side, name, f"{len(several)} files have this name: {told}"))
    single: dict[str, Path | None] = {n: p[0] for n, p in sorted(files.items()) if len(p) == 1}
    return single


def _benchmark_side(source: Path, side: str) -> dict[str, Path | None]:
    """Return what av-benchmark lists: the last of equal stems, as its dictionaries keep."""
    flat = [*source.glob("*.wav"), *source.glob("*.flac")]
    files: dict[str, Path | None] = {
        path.stem: path for path in sorted(flat, key=lambda path: path.stem)
    }
    names = files or dict.fromkeys(cached_names(source))
    if not names:
        raise InputError(
            f"{source} holds neither .wav or .flac files nor feature caches of av-benchmark "
            f"({side}). Give a folder with either."
        )
    return names


def _rows(
    table: Path,
    columns: tuple[str, ...],
    problems: list[Problem],
    known: dict[str, dict[str, Any]],
) -> list[tuple[str, Path]]:
    """Return id and file of each row; the file is in the first of `columns` that there is."""
    named, side = [], columns[0]
    for line, row in enumerate(records(table), start=1):
        if not set(columns) & row.keys():
            raise InputError(
                f"{table} has no column {' or '.join(columns)}: it has {some(map(str, row))}. Name "
                "the column of the files so."
            )
        told = next((text for column in columns if (text := _text(row, column))), "")
        name = _text(row, "id") or _text(row, "name") or Path(told).stem
        path = table.parent / told
        if not told:
            problems.append(Problem(side, name or f"row {line}", "the row names no file"))
        elif not path.is_file():
            problems.append(Problem(side, name, f"there is no file {short(path, 200)}"))
        else:
            named.append((name, path))
        video = _text(row, "video")
        _note(known, name, row, {"video": table.parent / video} if video else {})
    return named


def _note(
    known: dict[str, dict[str, Any]], name: str, row: Mapping[str, Any], more: dict[str, Any]
) -> None:
    told = {key: _text(row, key) for key in ("caption", "class", "label", "events")}
    found: dict[str, Any] = {key: value for key, value in told.items() if value}
    if "label" in found:
        found.setdefault("class", found.pop("label"))
    if "events" in row:
        try:
            found["events"] = [float(word) for word in told["events"].replace(",", " ").split()]
        except ValueError as error:
            raise InputError(
                f"The events of {name} are {short(told['events'], 60)!r}: give seconds, separated "
                "by spaces."
            ) from error
    known.setdefault(name, {}).update(found | more)


def _add_captions(table: Path, listing: Listing) -> None:
    for line, row in enumerate(records(table), start=1):
        path = _text(row, "path")
        name = _text(row, "id") or _text(row, "name") or Path(path).stem
        if not name:
            raise InputError(
                f"Row {line} of {table} names no clip: a column id or name is needed. It has "
                f"{some(str(key) for key in row)}."
            )
        if name not in listing.reference:
            listing.problems.append(Problem("caption", name, "there is no sound of this name"))
        else:
            _note(listing.known, name, row, {})
    for _, name in listing.pairs:
        if not listing.known.get(name, {}).get("caption"):
            listing.problems.append(Problem("caption", name, "there is no caption"))


def _add_videos(folder: Path, listing: Listing, protocol: Protocol) -> None:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} of videos. Give one.")
    suffixes = {".mp4"} if protocol == "av-benchmark" else MEDIA
    found = {p.stem: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes}
    for _, name in listing.pairs:
        if name in found:
            listing.known.setdefault(name, {})["video"] = found[name]
        else:
            listing.problems.append(Problem("video", name, f"there is no such video in {folder}"))


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else " ".join(str(value).split())
