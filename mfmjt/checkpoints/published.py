"""Weight files that their publishers keep: where they are, and whether they are those."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mfmjt.checkpoints.read import what_is_wrong
from mfmjt.errors import InputError, short

__all__ = ["Check", "PublishedFile", "find_all", "there"]

Check = Literal["name", "size", "md5"]
"""How closely a file must resemble the published one, each including those before it."""

_UNITS = {"M": 2**20, "G": 2**30}


_PRECISIONS = ("", "_fp16", "_bf16", "_fp32")


@dataclass(frozen=True)
class PublishedFile:
    """A weight file that its publisher keeps and we do not ship.

    Attributes:
        name: File name as published.
        publisher: Where to get it: an address.
        size: Rounded up in units of 2^20 or 2^30 bytes, such as "655M"; "" where not stated.
        md5: Hexadecimal digest; "" where not stated.
        also: Names, without suffix, under which others have published the same tensors as
            safetensors, such as ComfyUI's; `_fp16`, `_bf16` or `_fp32` may follow.
        sha256: Hexadecimal digest or its first digits; "" where not stated.
        license: Of the weights; "" where it is told elsewhere.
    """

    name: str
    publisher: str
    size: str = ""
    md5: str = ""
    also: tuple[str, ...] = ()
    sha256: str = ""
    license: str = ""

    @property
    def source(self) -> str:
        """Where the file is, and under which license."""
        return f"{self.publisher}, license {self.license}" if self.license else self.publisher

    @property
    def names(self) -> list[str]:
        """All names that it may have, the publisher's first."""
        stems = dict.fromkeys((Path(self.name).stem, *self.also))
        return [self.name, *(f"{s}{p}.safetensors" for s in stems for p in _PRECISIONS)]


def there(folder: str | os.PathLike[str], file: PublishedFile) -> Path | None:
    """Return a published file in `folder` or in folders two levels inside it, if it is there."""
    for name in file.names:
        for pattern in ("", "*/", "*/*/"):
            for path in sorted(Path(folder).glob(f"{pattern}{name}")):
                if path.is_file():
                    return path
    return None


def find_all(
    folder: str | os.PathLike[str], files: Iterable[PublishedFile], check: Check = "size"
) -> list[Path]:
    """Paths of published files in `folder` or in the folders inside it.

    Args:
        folder: Where the user keeps the downloads.
        files: What to look for.
        check: "name" takes any file so called; "size" compares its size with the published one;
            "md5" the digest as well (MD5 or SHA-256), which reads the whole file. Files under
            another publisher's name are only asked whether they can be weights.

    Raises:
        InputError: Files are missing, none of weights, or of another size or digest than the
            published one; all of them are named at once.
    """
    if check not in get_args(Check):
        raise InputError(f"No check {check!r}: choose one of {', '.join(get_args(Check))}.")
    paths: list[Path] = []
    problems: dict[str, list[str]] = {}
    for file in files:
        path = there(folder, file)
        if path is None:
            problems.setdefault(file.source, []).append(f"no file {file.name}")
        else:
            paths.append(path)
            if wrong := "" if check == "name" else _difference(path, file, check):
                name = short(path.relative_to(folder), 60)
                problems.setdefault(file.source, []).append(f"{name} {wrong}")
    if problems:
        told = "; ".join(f"{', '.join(of)} (get it from {at})" for at, of in problems.items())
        raise InputError(f"In {short(folder, 120)} and the folders inside it: {told}.")
    return paths


def _difference(path: Path, file: PublishedFile, check: Check) -> str:
    """Return how `path` differs from the published file, after its name; empty if it does not."""
    if wrong := what_is_wrong(path):
        return f"cannot be read: it {wrong}"
    if path.name != file.name:
        return ""
    if file.size:
        unit = _UNITS[file.size[-1]]
        digits = len(file.size.partition(".")[2][:-1])
        size = math.ceil(path.stat().st_size / unit * 10**digits) / 10**digits
        if size != float(file.size[:-1]):
            return f"has {size:g}{file.size[-1]} bytes, not {file.size}: cut short?"
    for name, stated in (("MD5", file.md5), ("SHA-256", file.sha256)):
        if stated and check == "md5":
            with path.open("rb") as stream:
                digest = hashlib.new(name.replace("-", ""), usedforsecurity=False)
                while block := stream.read(2**24):
                    digest.update(block)
            if not (found := digest.hexdigest()).startswith(stated):
                return f"has the {name} {found}, not {stated}"
    return ""
