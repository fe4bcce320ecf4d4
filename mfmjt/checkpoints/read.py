"""Files of weights as nested dictionaries of tensors; what is no such file is told by its content.

Nothing is unpickled but tensors, numbers and text.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mfmjt.errors import InputError, reason, short, some

__all__ = ["check_file", "is_safetensors", "read_content", "what_is_wrong"]

_HEADER = 8  # bytes that hold the length of a safetensors header
_OTHERS = (
    (b"\x1f\x8b", "is a gzip archive: unpack it"),
    (b"\xfd7zXZ\0", "is an xz archive: unpack it"),
    (b"BZh", "is a bzip2 archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is a Zstandard archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive: unpack it"),
    (b"Rar!\x1a\x07", "is a RAR archive: unpack it"),
    (b"GGUF", "is a GGUF file, which is for other programs"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, which is for other programs"),
    (b"\x93NUMPY", "is a NumPy array, not a state dict"),
)


class _Ignored:
    """Stands for a NumPy scalar or array beside weights, such as a best loss or a sampler's state.

    Nobody needs its value, and so nothing of NumPy's is run with what a file says.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_NUMPY: list[Any] = [
    (_Ignored, f"numpy.{name}")
    for name in (
        "core.multiarray.scalar",
        "_core.multiarray.scalar",
        "core.multiarray._reconstruct",
        "_core.multiarray._reconstruct",
        "dtype",
        "ndarray",
    )
]


def read_content(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """All that a file of weights holds, on the CPU.

    Args:
        path: A file in the format of safetensors or of `torch.save`, whatever its suffix, or the
            index of several (`*.index.json`). Memory is mapped where the format allows it.

    Returns:
        Tensors by name, or dictionaries of them with other values beside them, as in the file.

    Raises:
        InputError: No such file, or it cannot be read as weights; the message says what it is.
    """
    path = Path(path)
    check_file(path)
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if wrong := what_is_wrong(path):
        raise InputError(f"{path} cannot be read as weights: it {wrong}. {_WANTED}")
    try:
        content = load_file(path) if is_safetensors(path) else _read_pickle(path)
    except Exception as error:  # what is in the file decides what a parser raises
        raise InputError(f"{path} cannot be read as weights: {_why(error)}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds no state dict: it holds a {type(content).__name__}. "
            "Give the weights of the module alone."
        )
    return content


def check_file(path: Path) -> None:
    """Refuse a path at which there is no file.

    Raises:
        InputError: There is none.
    """
    if os.path.isdir(path):  # which, unlike a Path's, takes a name of any length
        raise InputError(f"{path} is a folder: weights are files. Give one of those in it.")
    if not os.path.isfile(path):
        raise InputError(f"No file {path}: there is nothing to load. Check the path.")


def what_is_wrong(path: Path) -> str:
    """Why a file cannot be one of weights, to complete "it ..."; empty where it may be one.

    Only its first bytes are looked at, and the directory of an archive.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        return f"cannot be opened ({reason(error)})"
    if size == 0:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file that it stands for: run `git lfs pull`"
    if _begins_safetensors(head):
        said = int.from_bytes(head[:_HEADER], "little")
        if said > size - _HEADER:
            return f"is damaged or cut short: {size:,} bytes do not hold its header of {said:,}"
        return ""
    if head.startswith(b"PK"):
        return _wrong_with_zip(path)
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    return _as_text(head)


def is_safetensors(path: Path) -> bool:
    """Return whether a file's first bytes are those of safetensors."""
    with path.open("rb") as stream:
        return _begins_safetensors(stream.read(_HEADER + 1))


def _begins_safetensors(head: bytes) -> bool:
    # The length of a header has zeros in front, and text has none.
    return head[_HEADER : _HEADER + 1] == b"{" and b"\0" in head[:_HEADER]


_WANTED = "Give a .safetensors, .pth or .pt file with a state dict."


def _wrong_with_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # the module raises what the bytes lead it to
        return "is a zip archive without its end: it was cut short"
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        return "is a TorchScript program, not a state dict"
    if "data.pkl" not in names:
        return "is a zip archive of other files: unpack it"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "was packed again, with compression: get it as it was published"
    return ""


def _as_text(head: bytes) -> str:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last character was cut in two
            return ""
        text = head[: error.start].decode("utf-8-sig")
    if not all(c.isprintable() or c.isspace() for c in text):
        return ""
    start = text.strip().lower()
    if start.startswith("<!doctype html") or "<html" in start:
        return "is a web page (HTML): the download gave a page about the file, or an error"
    kind = {"<": "XML", "{": "JSON", "[": "JSON"}.get(start[:1], "text")
    return f"is {kind}, perhaps an answer of the server: {short(text, 80)!r}"


def _read_pickle(path: Path) -> Any:
    # Files in PyTorch's format before 1.6 cannot be mapped; and PyTorch believes a suffix.
    archive = zipfile.is_zipfile(path)
    mapped = archive and path.suffix != ".safetensors"
    with path.open("rb") as stream, torch.serialization.safe_globals(_NUMPY):
        if not archive and stream.read(1) != b"\x80":
            raise ValueError("it is in no format of weights")
        stream.seek(0)
        source = path if mapped else stream
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _why(error: Exception) -> str:
    """Return what stood in the way and what to do, without PyTorch's advice to run the file."""
    if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds {short(held[1], 80)}, and only tensors, numbers and text are read. Where it "
            "was made, save the weights alone: torch.save(network.state_dict(), FILE)."
        )
    return f"{reason(error)}. It may be damaged or cut short. {_WANTED}"


def _read_parts(index: Path) -> dict[Any, Any]:
    """Return the tensors of all files that an index names, which must lie beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where: Mapping[str, str] = content["weight_map"]
        names = sorted(set(where.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files in other folders")
        if any(name.endswith(".index.json") for name in names):
            raise ValueError("it names an index")
    except Exception as error:  # what is in the file decides
        raise InputError(
            f"{index} is no index of weights: {reason(error)}. Give one with a weight_map, or the "
            "weights themselves."
        ) from error
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index} names files that are not beside it: {some(absent)}. Get them.")
    found: dict[Any, Any] = {}
    for name in names:
        part = read_content(index.parent / name)
        found.update(
            {key: part[key] for key, file in where.items() if file == name and key in part}
        )
    if lost := [key for key in where if key not in found]:
        raise InputError(
            f"{index} names {len(lost):,} tensors that its files do not hold, such as "
            f"{short(lost[0], 80)}. Get all parts again."
        )
    return found
