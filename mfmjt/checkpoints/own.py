"""Our own files: weights and the sizes of their module, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfmjt.checkpoints.read import check_file, is_safetensors, what_is_wrong
from mfmjt.errors import InputError, reason
from mfmjt.files import atomic_path

__all__ = ["check_depths", "fingerprint", "load_module", "read_own", "save_module"]

M = TypeVar("M", bound=nn.Module)


def read_own(path: str | os.PathLike[str], what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, mapped, as they are stored.

    Args:
        path: The file.
        what: That it is not what it should be, such as "no mfmjt network".

    Raises:
        InputError: No such file, or it is none of safetensors; the message says what it is.
    """
    path = Path(path)
    check_file(path)
    wrong = what_is_wrong(path)
    if not wrong and not is_safetensors(path):
        wrong = "is a file of torch.save, not of safetensors"
    try:
        if not wrong:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return dict(file.metadata() or {}), tensors
    except Exception as error:  # what is in the file decides what a parser raises
        wrong = f"is damaged or cut short ({reason(error)})"
    raise InputError(f"{path} is {what}: it {wrong}. Give a .safetensors file that is whole.")


def save_module(
    path: str | os.PathLike[str],
    module: nn.Module,
    config: Any,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights and the sizes of their module to one safetensors file, whole or not at all.

    Args:
        path: The file.
        module: Whose state dict is written.
        config: A dataclass of its sizes, kept as "config" in the file's metadata.
        dtype: Of stored floating-point values; None keeps their own.
        metadata: Further strings.

    Raises:
        RunError: The file cannot be written.
    """
    state = {
        name: value.detach().to(dtype=dtype if value.is_floating_point() else None).contiguous()
        for name, value in module.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, {**(metadata or {}), "config": json.dumps(asdict(config))})


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
    if not os.path.exists(path):
        raise InputError(f"No {called} at {path}: no such file. Check the path.")
    metadata, tensors = read_own(path, f"not a {kind.__name__} checkpoint")
    try:
        sizes = dict(json.loads(metadata["config"]))
        sizes |= {name: tuple(size) for name, size in sizes.items() if isinstance(size, list)}
        check_depths(sizes, len(tensors))
        # Sizes of no weight, such as a window, are small, and small ones cost little.
        largest = max(1024, *(n for value in tensors.values() for n in value.shape))
        for name, size in sizes.items():
            all_of_it = size if isinstance(size, tuple) else (size,)
            numbers = [n for n in all_of_it if not isinstance(n, str)]
            if name != "sample_rate" and max(numbers, default=0) > largest:
                raise ValueError("its sizes are not those of its tensors")
        module = kind(config(**sizes))
        module.load_state_dict({name: value.float() for name, value in tensors.items()})
    except Exception as error:  # what is in the file decides what its sizes lead to
        raise InputError(
            f"{path} is not a {kind.__name__} checkpoint: {reason(error)}. Give a file written by "
            f"`{kind.__name__}.save`."
        ) from error
    return module.eval()


def fingerprint(module: nn.Module) -> str:
    """Return a digest of the weights: names, shapes, dtypes and the sums of their bits.

    The sums are exact, so they are the same on every device; they run at the speed of memory.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, value in module.state_dict().items():
        total = value.contiguous().view(bits[value.element_size()]).sum(dtype=torch.int64)
        digest.update(repr((name, tuple(value.shape), str(value.dtype), int(total))).encode())
    return digest.hexdigest()


def check_depths(sizes: Mapping[str, Any], most: int) -> None:
    """Refuse sizes of a file with more blocks than it has tensors, which would take hours to make.

    Raises:
        ValueError: There are more.
    """
    for name, size in sizes.items():
        if "depth" in name or "layers" in name:
            depth = sum(size) if isinstance(size, tuple) else size
            if depth > most:
                raise ValueError(f"{name} is {size}, and there are {most} tensors")
