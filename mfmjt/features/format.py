"""Parts of a store: safetensors files that are mapped, with a checksum of all they hold.

A mapped tensor is the file's own pages: opening a store of a terabyte reads only its headers,
nothing is copied before it is used, and all processes share what is in the system's page cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path

__all__ = ["FORMAT", "INDEX", "Part", "will_need", "write_part"]

FORMAT = "mfmjt-features-1"
INDEX = "index.json"
CHECKSUM = "sha256"
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_PREFIX = 8  # bytes that hold the header's length


class Part:
    """One file of a store, mapped into memory.

    Args:
        path: A safetensors file.

    Attributes:
        path: The same.
        metadata: The header's text by name.
        tensors: Its tensors by name, read-only.

    Raises:
        InputError: There is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header, begin, size = _header(path)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            # Private pages of our own process: nothing can be written to the file through them.
            data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            self.tensors: dict[str, Tensor] = {}
            for name, entry in header.items():
                first, end = entry["data_offsets"]
                dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
                fits = first >= 0 and end - first == math.prod(shape) * dtype.itemsize
                if not fits:
                    raise ValueError(f"{name} does not fit into the file")
                self.tensors[name] = data[begin + first : begin + end].view(dtype).view(shape)
        except FileNotFoundError as error:
            raise InputError(f"The part {path} is missing. {_AGAIN}") from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"The part {path} is damaged: {reason(error)}. {_AGAIN}") from error

    def check(self) -> None:
        """Read the whole file and compare it with its checksum.

        Raises:
            InputError: The checksum differs, or there is none.
        """
        stored = self.metadata.get(CHECKSUM)
        if stored is None:
            raise InputError(f"The part {self.path} has no checksum. {_AGAIN}")
        if stored != _checksum(self.tensors, self.metadata):
            raise InputError(f"The part {self.path} is damaged: its checksum differs. {_AGAIN}")


_AGAIN = "Remove it, and the command that made the store makes it again."


def write_part(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a part, whole or not at all; the same content gives the same file, byte for byte.

    safetensors' own writer puts the metadata into another order every time.

    Args:
        path: The file.
        tensors: Contiguous tensors on the CPU.
        metadata: Text by name.

    Raises:
        RunError: The disk is full or cannot be written.
    """
    text = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(text.items()))}
    # Wide numbers first, so that each is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = next(known for known, dtype in _DTYPES.items() if dtype == tensor.dtype)
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % _PREFIX)
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(start).to_bytes(_PREFIX, "little") + start)
                for name in order:
                    file.write(_bytes(tensors[name]))
        except OSError as error:
            raise RunError(
                f"Cannot write {path}: {error.strerror}. Make room, and the same command goes on."
            ) from error


def will_need(*tensors: Tensor) -> None:
    """Tell the system to read these pieces of mapped files now.

    Page faults alone would fetch one after the other, a few pages at a time.
    """
    advice = getattr(mmap, "MADV_WILLNEED", None)
    if advice is None:  # a system without it
        return
    for tensor in tensors:
        begin = tensor.data_ptr()
        skipped = begin % mmap.PAGESIZE
        length = skipped + tensor.numel() * tensor.element_size()
        # Advice that is not taken costs nothing but time.
        _libc.madvise(ctypes.c_void_p(begin - skipped), ctypes.c_size_t(length), advice)


_libc = ctypes.CDLL(None)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, where the data begin, and the file's size, checked against the header."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_PREFIX), "little")
        if size < _PREFIX or length > size - _PREFIX:
            raise ValueError(f"it has {size} bytes and is cut short")
        header = json.loads(file.read(length))
    begin = _PREFIX + length
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if begin + max(ends, default=0) != size:
        raise ValueError(f"it has {size} bytes of {begin + max(ends, default=0)}")
    return header, begin, size


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    text = {name: value for name, value in metadata.items() if name != CHECKSUM}
    digest.update(json.dumps(text, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
