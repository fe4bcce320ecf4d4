"""The corpus of real sounds: from recordings in many forms to one folder for training.

Each recording becomes clips of at most 8 s, 16 kHz and one channel, without the digital silence
that pads it, the largest sample of each clip scaled to 0.95.
"""

from __future__ import annotations

import csv
import hashlib
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mfmjt.data.manifest import (
    check_license,
    check_split,
    credits_page,
    read_lines,
    read_manifest,
)
from mfmjt.data.recordings import COLUMNS, SAMPLE_RATE, SOUND, TABLE
from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path
from mfmjt.media import read_audio
from mfmjt.progress import ProgressBar

__all__ = ["CREDITS", "Entry", "from_clips", "from_sources", "write"]

CREDITS = "CREDITS.md"
"""File of credits in the corpus."""
LONGEST = 8 * SAMPLE_RATE
"""Samples of a clip at most; what a recording has beyond that is a clip if it lasts 2 s or more."""
SILENCE = 1e-4
"""Largest sample of what is silent, as a part of the recording's largest: -80 dB."""
LEAD, TAIL = SAMPLE_RATE // 50, SAMPLE_RATE // 10
"""Samples kept before the first and after the last that is not silent."""
PEAK = 0.95
READY = ("path", "id", "caption", "split", "licence", "credit", "set", "label")
"""Columns of a table of ready clips."""


@dataclass(frozen=True)
class _File:
    """A file in a folder, or in a clone of a Git repository, where `blob` is its object."""

    folder: Path
    path: str
    blob: str = ""


@dataclass(frozen=True)
class Entry:
    """A recording: where its files are, and what is said about it.

    Attributes:
        place: Line of its table, for messages.
        id: Name of its clips.
        numbered: Whether the first clip has a number behind this name, as all others have.
        files: Its files, which follow each other.
        sha256: First digits of their digest; empty where it is not known.
        source: Repository and commit; empty where they are not known.
        about: Its split, label, caption, set, licence and credit.
    """

    place: str
    id: str
    numbered: bool
    files: tuple[_File, ...]
    sha256: str
    source: str
    about: dict[str, str]


def from_sources(manifest: Path, sources: Path, sets: Collection[str] = ()) -> list[Entry]:
    """Return the recordings of a manifest, all of which must be there.

    Args:
        manifest: What `read_manifest` reads.
        sources: Folder with the repositories, each called `owner+name`: a clone, of which the
            manifest's commit is read whatever is checked out, or a folder of plain files.
        sets: Only these; empty means all.

    Raises:
        InputError: The manifest is wrong or has no such set, or a file is missing.
    """
    lines = read_manifest(manifest)
    known = dict.fromkeys(line.set for line in lines)
    for name in sets:
        if name not in known:
            raise InputError(f"{manifest} has no set {name!r}. Choose from {', '.join(known)}.")
    repositories: dict[str, dict[str, _File]] = {}
    entries = []
    for line in lines:
        if sets and line.set not in sets:
            continue
        if line.source not in repositories:
            repositories[line.source] = _repository(line.place, line.source, sources)
        there = repositories[line.source]
        for path in line.paths:
            if path not in there:
                raise InputError(
                    f"{line.place}: there is no {path} in {_folder(line.source, sources)}. It "
                    f"should be https://github.com/{line.source.replace('@', ' at commit ')}."
                )
        files = tuple(there[path] for path in line.paths)
        entries.append(
            Entry(line.place, line.id, True, files, line.sha256, line.source, line.about)
        )
    return entries


def from_clips(table: Path, manifest: Path, sets: Collection[str] = ()) -> list[Entry]:
    """Return the recordings of a table of ready clips.

    A clip of a recording in the manifest, by its id, has label, caption, split and credit from
    there. Other clips of the manifest's sets are left out: they hold no everyday sound.

    Args:
        table: CSV with the columns path, id, caption, split, licence, credit, set and label.
        manifest: What `read_manifest` reads.
        sets: Only these; empty means all.

    Raises:
        InputError: The table or the manifest is wrong, or a file is missing.
    """
    lines = {line.id: line for line in read_manifest(manifest)}
    known = {line.set for line in lines.values()}
    entries: list[Entry] = []
    places: dict[str, str] = {}
    for place, row in read_lines(table, READY):
        check_license(row["licence"], place)
        line = lines.get(row["id"].rpartition("_")[0])
        if (sets and row["set"] not in sets) or (line is None and row["set"] in known):
            continue
        check_split(row["split"], place)
        if (first := places.setdefault(row["id"], place)) != place:
            raise InputError(f"{place}: the id {row['id']!r} is that of {first}. Give it another.")
        if not (table.parent / row["path"]).is_file():
            raise InputError(
                f"{place}: there is no file {table.parent / row['path']}. Put it there, or remove "
                "the line."
            )
        about = line.about if line else {name: row[name] for name in COLUMNS if name in row}
        source = line.source if line else ""
        files = (_File(table.parent, row["path"]),)
        entries.append(Entry(place, row["id"], False, files, "", source, about))
    if not entries:
        raise InputError(f"{table} has no clip of the sets {', '.join(sets) or 'that are used'}.")
    return entries


def write(entries: Iterable[Entry], folder: Path) -> Counter[str]:
    """Write a folder for `mfmjt.data.recordings.Recordings`, and its credits.

    The files appear whole and together at the end, or not at all.

    Args:
        entries: Recordings, in the order in which they are written.
        folder: Made if it is not there.

    Returns:
        The number of clips of each split.

    Raises:
        InputError: A recording cannot be decoded or is silent, or its digest is another.
        RunError: The folder cannot be written.
    """
    entries = list(entries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Cannot make {folder}: {reason(error)}. Choose another folder.") from error
    splits: Counter[str] = Counter()
    end = 0
    with ExitStack() as files:
        credits, table, sound = (
            files.enter_context(atomic_path(folder / name)) for name in (CREDITS, TABLE, SOUND)
        )
        raw = files.enter_context(tempfile.TemporaryFile(dir=folder))
        lines = csv.DictWriter(
            files.enter_context(table.open("w", encoding="utf-8", newline="")), COLUMNS
        )
        lines.writeheader()
        bar = files.enter_context(ProgressBar("Reading", len(entries), unit="recordings"))
        for done, entry in enumerate(entries, start=1):
            for number, clip in enumerate(_clips(entry)):
                name = f"{entry.id}_{number:03d}" if number or entry.numbered else entry.id
                raw.write(clip.tobytes())
                lines.writerow({"id": name, "start": end, "samples": len(clip), **entry.about})
                end += len(clip)
                splits[entry.about["split"]] += 1
            bar.update(done)
        raw.flush()
        samples = np.lib.format.open_memmap(sound, "w+", np.int16, (end,))
        samples[:] = np.memmap(raw, np.int16, "r", shape=(end,))
        samples.flush()
        rows = [(e.about["set"], e.source, e.about["credit"], e.about["licence"]) for e in entries]
        credits.write_text(credits_page(rows), encoding="utf-8")
    return splits


def _clips(entry: Entry) -> Iterator[NDArray[np.int16]]:
    """Yield the clips of a recording."""
    wave = _decoded(entry)
    if not np.isfinite(wave).all():
        raise InputError(f"{entry.place}: {_names(entry)} has samples that are NaN or infinite.")
    loud = np.flatnonzero(np.abs(wave) > SILENCE * np.abs(wave).max(initial=0.0))
    if not len(loud):
        raise InputError(f"{entry.place}: {_names(entry)} is silent. Remove the line.")
    wave = wave[max(0, loud[0] - LEAD) : loud[-1] + TAIL]
    for start in range(0, len(wave), LONGEST):
        clip = wave[start : start + LONGEST]
        if start and len(clip) < LONGEST // 4:
            break
        scale = 32767 * PEAK / max(float(np.abs(clip).max()), 1e-9)
        yield np.round(clip * scale).astype(np.int16)


def _decoded(entry: Entry) -> NDArray[np.float32]:
    """Return the samples of a recording, after its digest is checked."""
    contents = _contents(entry.files)
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    if not digest.startswith(entry.sha256):
        raise InputError(
            f"{entry.place}: {_names(entry)} is another file than the manifest's: its SHA-256 "
            f"begins with {digest[: len(entry.sha256)]}, not {entry.sha256}. Get it again from "
            f"{entry.source}."
        )
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for file, content in zip(entry.files, contents, strict=True):
            path = Path(folder) / f"recording{Path(file.path).suffix}"
            path.write_bytes(content)
            try:
                parts.append(read_audio(path, SAMPLE_RATE))
            except InputError as error:
                raise InputError(
                    f"{entry.place}: {_names(entry)} cannot be decoded as sound. Get it again, or "
                    "remove the line."
                ) from error
    return np.concatenate(parts)


def _names(entry: Entry) -> str:
    first, more = entry.files[0], len(entry.files) - 1
    return f"{first.folder / first.path}{f' and {more} more' if more else ''}"


def _folder(source: str, sources: Path) -> Path:
    return sources / source.partition("@")[0].replace("/", "+")


def _repository(place: str, source: str, sources: Path) -> dict[str, _File]:
    """Return the files of a repository by their paths in it."""
    folder = _folder(source, sources)
    name, _, commit = source.partition("@")
    if not folder.is_dir():
        raise InputError(
            f"{place}: there is no folder {folder}. Clone it: git clone https://github.com/{name} "
            f"{folder}"
        )
    if not ((folder / ".git").exists() or (folder / "HEAD").is_file()):
        paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return {path: _File(folder, path) for path in paths}
    try:
        listed = _git(folder, "ls-tree", "-r", "-z", "--full-tree", commit)
    except RunError as error:
        raise InputError(
            f"{place}: {folder} does not have the commit {commit}. Get it: git -C {folder} fetch "
            f"origin {commit}"
        ) from error
    lines = (line.split("\t", 1) for line in listed.decode(errors="replace").split("\0") if line)
    return {path: _File(folder, path, head.split()[2]) for head, path in lines}


def _contents(files: tuple[_File, ...]) -> list[bytes]:
    if not files[0].blob:
        return [(file.folder / file.path).read_bytes() for file in files]
    told = _git(files[0].folder, "cat-file", "--batch", given="".join(f"{f.blob}\n" for f in files))
    contents = []
    for file in files:
        head, _, told = told.partition(b"\n")
        if head.endswith(b"missing"):
            raise RunError(f"{file.folder} lacks {file.path}. Clone it again, with all objects.")
        size = int(head.split()[2])
        contents.append(told[:size])
        told = told[size + 1 :]
    return contents


def _git(folder: Path, *arguments: str, given: str = "") -> bytes:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            input=given.encode(),
            check=True,
            capture_output=True,
        ).stdout
    except FileNotFoundError as error:
        raise RunError(f"{folder} is a Git repository, and there is no git. Install it.") from error
    except subprocess.CalledProcessError as error:
        raise RunError(
            f"git cannot read {folder}: {error.stderr.decode(errors='replace').strip()}"
        ) from error
