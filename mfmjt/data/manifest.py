"""The manifest of the corpus of real sounds: where each recording is, and under which license.

Recordings are not part of this package. `real.csv` says which repository has them at which commit,
who made them, what is heard, and the digest of the file, so that anyone can build the corpus again.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mfmjt.errors import InputError, reason, some

__all__ = [
    "SPLITS",
    "Source",
    "check_license",
    "check_split",
    "credits_page",
    "read_lines",
    "read_manifest",
    "shipped",
]

SPLITS = ("train", "validation", "test")
"""Parts of the corpus."""
COLUMNS = ("set", "source", "path", "licence", "author", "split", "label", "caption", "sha256")
_ALLOWED = re.compile(r"(cc ?0|cc[ -]by|oga[ -]by|pd|public domain)([ -]\d\.\d)?", re.I)
_PIECES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Source:
    """One recording of a manifest.

    Attributes:
        place: Where the manifest says so, for messages: file and line.
        set: Collection that it belongs to.
        source: `owner/name@commit` of a repository on GitHub.
        path: File in that repository; `{0..4}` stands for pieces that follow each other.
        licence: Its license.
        author: Who made it.
        split: One of `SPLITS`.
        label: What sounds, in a word or two.
        caption: The same as a phrase.
        sha256: First digits, 16 or more, of the SHA-256 of the file, or of all pieces together.
    """

    place: str
    set: str
    source: str
    path: str
    licence: str
    author: str
    split: str
    label: str
    caption: str
    sha256: str

    @property
    def id(self) -> str:
        """Return the name of its clips, without their number."""
        return f"{self.set}_{hashlib.sha1((self.source + self.path).encode()).hexdigest()[:10]}"

    @property
    def about(self) -> dict[str, str]:
        """Return its columns in a table of clips."""
        return {
            "split": self.split,
            "label": self.label,
            "caption": self.caption,
            "set": self.set,
            "licence": self.licence,
            "credit": self.author,
        }

    @property
    def paths(self) -> list[str]:
        """Return its files, in order."""
        found = _PIECES.search(self.path)
        if found is None:
            return [self.path]
        first, last = map(int, found.groups())
        return [self.path.replace(found[0], str(i)) for i in range(first, last + 1)]


def shipped() -> Path:
    """Return the manifest in this package."""
    return Path(str(resources.files("mfmjt.data") / "real.csv"))


def read_manifest(path: str | os.PathLike[str]) -> list[Source]:
    """Read a manifest: CSV with the columns set, source, path, licence, author, split and so on.

    Raises:
        InputError: It cannot be read, a column or a field is missing, a license is not allowed, or
            a recording is named twice.
    """
    sources: list[Source] = []
    places: dict[str, str] = {}
    for place, line in read_lines(path, COLUMNS):
        for name in COLUMNS:
            if not line[name]:
                raise InputError(f"{place}: {name} is empty. Fill it in, or remove the line.")
        source = Source(place, **{name: line[name] for name in COLUMNS})
        check_license(source.licence, place)
        check_split(source.split, place)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40}", source.source):
            raise InputError(
                f"{place}: the source {source.source!r} is not owner/name@commit. Correct it."
            )
        if not re.fullmatch(r"[0-9a-f]{16,64}", source.sha256):
            raise InputError(
                f"{place}: sha256 is {source.sha256!r}. Give 16 to 64 hexadecimal digits, the "
                "beginning of what `sha256sum` prints."
            )
        if (first := places.setdefault(source.id, place)) != place:
            raise InputError(f"{place}: {source.path} is in {first} already. Remove one of both.")
        sources.append(source)
    return sources


def read_lines(
    path: str | os.PathLike[str], columns: Iterable[str]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the lines of a CSV file with a header, each with its place: `Line 2 of FILE`.

    Raises:
        InputError: No such file, a column is missing, a line with too few or too many fields, or
            no lines at all.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            there = list(lines.fieldnames or ())
            missing = [name for name in columns if name not in there]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}: it has {some(there)}.")
            place = ""
            for line in lines:
                place = f"Line {lines.line_num} of {path}"
                if None in line or None in line.values():
                    raise InputError(
                        f"{place} has not as many fields as the header. What has a comma in it "
                        "needs quotes."
                    )
                yield place, {name: text.strip() for name, text in line.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read: {reason(error)}. Give a CSV file in UTF-8."
        ) from error
    if not place:
        raise InputError(f"{path} has no lines after its header. Give one for each recording.")


def check_license(name: str, place: str) -> None:
    """Raise InputError for a license under which a recording must not become part of the corpus."""
    if not all(_ALLOWED.fullmatch(part.strip()) for part in name.partition("(")[0].split("/")):
        raise InputError(
            f"{place}: the license {name!r} is not allowed. Allowed are CC0, public domain, CC-BY "
            "and OGA-BY, which let a network that learned from them be used for anything; remove "
            "the line."
        )


def check_split(name: str, place: str) -> None:
    """Raise InputError for what is not one of `SPLITS`."""
    if name not in SPLITS:
        raise InputError(f"{place}: the split {name!r}: give one of {', '.join(SPLITS)}.")


def credits_page(recordings: Iterable[tuple[str, str, str, str]]) -> str:
    """Return a page of credits in Markdown.

    Args:
        recordings: Set, source, author and license of each; the source may be empty.
    """
    sets: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for name, source, author, licence in recordings:
        sets.setdefault((name, source), Counter())[author, licence] += 1
    lines = ["# Credits", "", "The recordings of this corpus are by:"]
    for (name, source), people in sets.items():
        repository, _, commit = source.partition("@")
        lines += ["", f"## {name}", ""]
        if source:
            lines += [f"From <https://github.com/{repository}>, commit {commit}.", ""]
        lines += ["| author | license | recordings |", "|---|---|---|"]
        for (author, licence), count in sorted(people.items(), key=lambda row: str(row).lower()):
            lines.append(f"| {_cell(author)} | {_cell(licence)} | {count} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
