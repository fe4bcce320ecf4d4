"""Networks from published layouts, MMAudio's, MeanAudio's and FoleyDash's, to ours and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mfmjt.errors import InputError, RunError, reason
from mfmjt.files import atomic_path, check_writable
from mfmjt.model import (
    MFMJT,
    load_foleydash,
    load_meanaudio,
    load_mmaudio,
    to_meanaudio_state_dict,
    to_mmaudio_state_dict,
)
from mfmjt.model.lora import merge_adapter
from mfmjt.model.published import layout_of

__all__ = [
    "Conversion",
    "from_foleydash",
    "from_meanaudio",
    "from_mmaudio",
    "to_mmaudio",
    "to_published",
]

OURS = (".safetensors",)
PUBLISHED = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """A network that was converted.

    Attributes:
        path: The file that was written.
        name: Name of the network's configuration.
        parameters: Number of parameters written.
        notes: One line each on what the new layout cannot hold, and on which of several weights
            in the source were taken.
    """

    path: Path
    name: str
    parameters: int
    notes: tuple[str, ...] = ()


def from_mmaudio(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Write a network of MMAudio's layout as one of ours.

    Args:
        source: A published `.pth` or `.safetensors` file, the index of several, or a checkpoint of
            a training with the weights inside; averaged (EMA) weights are taken if there are such.
        to: The `.safetensors` file to write; it appears whole or not at all.
        config: Name of the configuration that every shape must agree with; None infers it.
        dtype: Storage dtype; None keeps float32.
        adapter: An `adapter.safetensors` of a training that started from this network, which is
            merged into the weights first.

    Raises:
        InputError: The source cannot be used, the first wrong parameters named, or the suffix of
            `to`.
        RunError: The file cannot be written.
    """
    return _imported(load_mmaudio, source, to, config, dtype, adapter)


def from_meanaudio(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Write a network of MeanAudio's family as one of ours; arguments are `from_mmaudio`'s."""
    return _imported(load_meanaudio, source, to, config, dtype, adapter)


def from_foleydash(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Write a network of FoleyDash's layout as one of ours; arguments are `from_mmaudio`'s."""
    return _imported(load_foleydash, source, to, config, dtype, adapter)


def _imported(
    load: Callable[..., MFMJT],
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None,
    dtype: torch.dtype | None,
    adapter: str | os.PathLike[str] | None,
) -> Conversion:
    to = _checked(source, to, OURS)
    net = load(source, config)
    if adapter is not None:
        merge_adapter(net, adapter)
    net.save(to, dtype)
    count = sum(value.numel() for value in net.state_dict().values())
    return Conversion(to, net.config.name, count, net.notes)


def to_mmaudio(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Write one of our networks in MMAudio's layout.

    Args:
        source: A file written by `MFMJT.save`.
        to: The file to write, for `torch.load(weights_only=True)` if it ends in `.pth` or `.pt`,
            or `.safetensors`; it appears whole or not at all.
        config: Name of the configuration that the source must have; None takes any.
        dtype: Storage dtype; None keeps float32.
        adapter: An `adapter.safetensors` of a training that started from this network, which is
            merged into the weights first.

    Raises:
        InputError: The source is no network, has another configuration or no such layout, or the
            suffix of `to`.
        RunError: The file cannot be written.
    """
    return _exported(source, to, config, dtype, adapter, "MMAudio")


def to_published(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Write one of our networks in the layout of its family; arguments are `to_mmaudio`'s."""
    return _exported(source, to, config, dtype, adapter, None)


def _exported(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    config: str | None,
    dtype: torch.dtype | None,
    adapter: str | os.PathLike[str] | None,
    family: str | None,
) -> Conversion:
    to = _checked(source, to, PUBLISHED)
    net = MFMJT.load(source)
    if config not in (None, net.config.name):
        raise InputError(f"{source} is a {net.config.name}, not a {config}. Leave out the name.")
    if adapter is not None:
        merge_adapter(net, adapter)
    family = family or layout_of(net.config) or "MMAudio"
    ways = {"MMAudio": to_mmaudio_state_dict, "MeanAudio": to_meanaudio_state_dict}
    state = ways[family](net)
    state = {name: value.to(dtype=dtype).contiguous() for name, value in state.items()}
    try:
        with atomic_path(to) as temporary:
            if to.suffix == ".safetensors":
                save_file(state, temporary)
            else:
                torch.save(state, temporary)
    except (SafetensorError, OSError) as error:
        raise RunError(f"Cannot write {to}: {reason(error)}. Check the disk.") from error
    notes = []
    if not any(name.startswith("r_embed.") for name in state):
        lost = sum(p.numel() for p in net.r_embed.parameters())
        notes.append(
            f"The embedding of t - r ({lost} parameters) has no place in {family}'s layout and is "
            "left out."
        )
        if any(bool(p.any()) for p in net.r_embed.mlp[2].parameters()):
            notes.append(
                "It was trained, so the result is not this network: it gives another velocity, and "
                "one step will not do."
            )
    count = sum(value.numel() for value in state.values())
    return Conversion(to, net.config.name, count, tuple(notes))


def _checked(
    source: str | os.PathLike[str], to: str | os.PathLike[str], suffixes: tuple[str, ...]
) -> Path:
    """Return the path to write, if it can be written."""
    to = Path(to)
    if to.suffix not in suffixes:
        raise InputError(
            f"The name {to} does not end in {' or '.join(suffixes)}, which tells the format. "
            "Choose another."
        )
    if to.is_dir():
        raise InputError(f"{to} is a folder. Give the name of a file in it.")
    if to.exists() and Path(source).exists() and to.samefile(source):
        raise InputError(f"The output {to} is the input itself. Choose another name.")
    check_writable(to)
    return to
