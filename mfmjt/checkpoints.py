"""Weight files: published ones and our own, what they hold, and what is wrong with them.

Nothing here is unpickled: `.pth` and `.pt` files are read as tensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mfmjt.errors import InputError
from mfmjt.files import atomic_path

__all__ = [
    "Check",
    "PublishedFile",
    "find",
    "find_all",
    "load_module",
    "load_published",
    "read_state_dict",
    "save_module",
]

M = TypeVar("M", bound=nn.Module)

Check = Literal["name", "size", "md5"]
"""How closely a file must resemble the published one, each including those before it."""

_UNITS = {"M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class PublishedFile:
    """A weight file that its publisher keeps and we do not ship.

    Attributes:
        name: File name as published.
        publisher: Where to get it, in words that complete "get it from".
        size: Rounded up in units of 2^20 or 2^30 bytes, such as "655M"; "" where not stated.
        md5: Hexadecimal digest; "" where not stated.
    """

    name: str
    publisher: str
    size: str = ""
    md5: str = ""


def find(folder: str | os.PathLike[str], file: PublishedFile, check: Check = "size") -> Path:
    """Path of a published file in `folder` or in a folder inside it.

    Args:
        folder: Where the user keeps the downloads.
        file: What to look for.
        check: "name" takes any file so called; "size" compares its size with the published one;
            "md5" the digest as well, which reads the whole file.

    Raises:
        InputError: The file is missing, has another size than published, or another digest.
    """
    return find_all(folder, [file], check)[0]


def find_all(
    folder: str | os.PathLike[str], files: Iterable[PublishedFile], check: Check = "size"
) -> list[Path]:
    """Paths of several published files, as `find` finds each.

    Raises:
        InputError: Files are missing, of another size or digest; all of them are named at once.
    """
    if check not in get_args(Check):
        raise InputError(f"No check {check!r}: choose one of {', '.join(get_args(Check))}.")
    folder = Path(folder)
    paths: list[Path] = []
    problems: list[str] = []
    for file in files:
        kept = (folder / file.name, *sorted(folder.glob(f"*/{file.name}")))
        path = next((p for p in kept if p.is_file()), None)
        if path is None:
            problems.append(
                f"No file {file.name} in {folder} or in a folder inside it. Get it from "
                f"{file.publisher}."
            )
            continue
        paths.append(path)
        problems += _differences(path, file, check)
    if problems:
        raise InputError(" ".join(problems))
    return paths


def _differences(path: Path, file: PublishedFile, check: Check) -> Iterator[str]:
    """What tells `path` from the published file, at most one sentence."""
    if file.size and check != "name":
        unit = _UNITS[file.size[-1]]
        digits = len(file.size.partition(".")[2][:-1])
        size = math.ceil(path.stat().st_size / unit * 10**digits) / 10**digits
        if size != float(file.size[:-1]):
            yield (
                f"{path} has {size:g}{file.size[-1]} bytes where the published file has "
                f"{file.size}: it may be cut short. Get it again from {file.publisher}."
            )
            return
    if file.md5 and check == "md5":
        with path.open("rb") as stream:
            md5 = hashlib.md5(usedforsecurity=False)
            while block := stream.read(2**24):
                md5.update(block)
        if md5.hexdigest() != file.md5:
            yield (
                f"{path} has the MD5 {md5.hexdigest()} where the published file has {file.md5}: it "
                f"is another file, or damaged. Get it again from {file.publisher}."
            )


def read_state_dict(path: str | os.PathLike[str], inside: str = "") -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a `.pth`, `.pt` or `.bin` state dict, on the CPU.

    Args:
        path: The file; memory is mapped where the format allows it.
        inside: Key under which the file keeps the state dict, where it keeps one there.

    Raises:
        InputError: No such file, not readable as tensors, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No file {path}: there is nothing to load. Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files in PyTorch's format before 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} cannot be read as weights: {reason}. "
            "Give a .safetensors, .pth or .pt file with a state dict."
        ) from error
    if inside and isinstance(state, dict) and isinstance(state.get(inside), dict):
        state = state[inside]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"{path} holds no state dict: its values are not all tensors. "
            "Give the weights of the module alone."
        )
    return state


def load_published(
    module: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    unused: Callable[[str], bool] = lambda name: False,
    also: Iterable[tuple[str, tuple[int, ...]]] = (),
) -> dict[str, Tensor]:
    """Check `state` against `module` name by name, then move it in, as float32 on the CPU.

    Args:
        module: Built on the meta device; its parameters become those of `state`.
        state: Names as in `module.state_dict()`.
        what: Whose state this should be, for the message.
        unused: Says of a name whether the publisher's file carries it and nothing needs it.
        also: Names and shapes that the file must hold beside those of the module.

    Returns:
        The entries of `also`.

    Raises:
        InputError: Entries are missing, not expected or of another shape; each is named.
    """
    beside = dict(also)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()} | beside
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [
        f"unexpected {name}" for name in state if name not in expected and not unused(name)
    ]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise InputError(
            f"This is no state dict of {what}: {'; '.join(problems)}. "
            "Give the file as its publisher keeps it."
        )
    values = {name: state[name].detach().to("cpu", torch.float32) for name in expected}
    extra = {name: values.pop(name) for name in beside}
    module.load_state_dict(values, assign=True)
    return extra


def save_module(
    path: str | os.PathLike[str], module: nn.Module, config: Any, dtype: torch.dtype
) -> None:
    """Write weights, stored as `dtype`, with a dataclass of sizes as safetensors metadata."""
    state = {name: value.to(dtype).contiguous() for name, value in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, {"config": json.dumps(asdict(config))})


def load_module(
    path: str | os.PathLike[str], kind: type[M], config: Callable[..., Any], called: str
) -> M:
    """Read what `save_module` wrote, as float32 in evaluation mode.

    Args:
        path: The file.
        kind: The module's class, made of its configuration alone.
        config: The class of that.
        called: What the file holds, for messages.

    Raises:
        InputError: No such file, not safetensors, or another module's.
    """
    try:
        with safe_open(path, "pt") as file:
            sizes = dict(json.loads((file.metadata() or {})["config"]))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        lists = {name: tuple(size) for name, size in sizes.items() if isinstance(size, list)}
        module = kind(config(**{**sizes, **lists}))
        module.load_state_dict(state)
    except FileNotFoundError as error:
        raise InputError(f"No {called} at {path}: no such file. Check the path.") from error
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Cannot load {path}: it is not a {kind.__name__} checkpoint "
            f"({str(error).splitlines()[0]}). Give a file written by `{kind.__name__}.save`."
        ) from error
    return module.eval()
