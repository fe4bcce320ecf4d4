"""From a name, a folder, a file or a repository of Hugging Face's hub to a `Bundle`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from mfmjt.checkpoints import hub
from mfmjt.errors import InputError, some
from mfmjt.families import meanaudio, mmaudio, nano
from mfmjt.families.bundle import Bundle
from mfmjt.model.published import NETWORK_FILES

__all__ = ["FAMILIES", "PRETRAINED", "Family", "open_bundle"]

PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""Holds a folder for each model that ships."""
_DOWNLOADED = ["*.safetensors", "*.pth", "*.pt", "*.bin", "*.txt", "*.txt.gz"]
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class Family(Protocol):
    """How the files of one kind of model are laid out, and opened.

    `network` is the file of a network, True for the one in the folder, or False for codec and
    encoders alone, beside an empty network on the meta device that has their configuration.
    """

    def holds(self, folder: Path, network: Path | bool) -> bool:
        """Return whether the folder, and the network where one is named, are of this family."""
        ...

    def open_folder(
        self,
        folder: Path,
        network: Path | bool,
        codec: str | None,
        dtype: torch.dtype,
        low_memory: bool,
    ) -> Bundle:
        """Open them."""
        ...


FAMILIES: list[Family] = [meanaudio, mmaudio, nano]
"""Asked in this order whether a folder is theirs."""


def open_bundle(
    name: str | os.PathLike[str] = "nano",
    network: str | os.PathLike[str] | bool = True,
    codec: str | None = None,
    dtype: torch.dtype = torch.float32,
    low_memory: bool = False,
) -> Bundle:
    """Open a network, a codec and encoders that belong together, on the CPU.

    The network's weights may be in 16 bits, as they are stored, until `Bundle.to`.

    Args:
        name: "nano", which ships; a folder with `network.safetensors`, `codec.safetensors` and
            `encoders.safetensors`, or with the published files of MMAudio (docs/mmaudio.md) or of
            MeanAudio and its relatives (docs/meanaudio.md) and either a published network or a
            `network.safetensors` of ours; the file of a network in such a folder, published or
            ours, under any name; or such a repository of Hugging Face's hub, as owner/name.
        network: Another network for the same codec and encoders; False opens these alone.
        codec: Of MMAudio's codecs, "16k" or "44k", where both are there and no network decides.
        dtype: Precision of MMAudio's codec and encoders, or of MeanAudio's.
        low_memory: As for `mfmjt.Pipeline`.

    Raises:
        InputError: There is no such model, or its files are not what they should be.
    """
    folder, file = _located(name)
    wanted = file if network is True and file is not None else network
    wanted = wanted if isinstance(wanted, bool) else Path(wanted)
    for family in FAMILIES:
        if family.holds(folder, wanted):
            bundle = family.open_folder(folder, wanted, codec, dtype, low_memory)
            if low_memory:
                bundle.save_memory()  # of a family that opens all parts all the same
            return bundle
    if codec is not None:  # MMAudio's, of which all files that are missing are named
        return mmaudio.open_folder(folder, wanted, codec, dtype, low_memory)
    if wanted is not False:
        raise _no_network(folder)
    raise InputError(
        f"{folder} holds neither codec.safetensors nor a codec of MMAudio's. Give a folder with "
        "codec and encoders, or nano."
    )


def _located(name: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Return the folder that a name stands for, and the file of a network if it is one."""
    path = Path(name)
    if os.path.isfile(path):  # which, unlike a Path's, takes a name of any length
        # MMAudio keeps networks in one folder and most other files in another beside it.
        for root in (path.parent, path.parent.parent):
            if any(family.holds(root, False) for family in FAMILIES):
                return root, path
        return path.parent, path
    if os.path.isdir(path):
        return path, None
    shipped = sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())
    if str(name) in shipped:
        return PRETRAINED / name, None
    if hub.is_repository(name):
        folder = hub.download(str(name), _DOWNLOADED)
        for model in meanaudio.kept_elsewhere(folder):
            hub.download(model.name, model.files)  # into the cache, where it is looked for
        return folder, None
    raise InputError(
        f"There is no model {name}: it is neither a file, nor a folder, nor one that ships "
        f"({', '.join(shipped)}). Give one of these."
    )


def _no_network(folder: Path) -> InputError:
    """Say that a folder holds no network under a known name, and which files might be one."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in _WEIGHTS)
    return InputError(
        f"{folder} holds no network: neither network.safetensors nor one of MMAudio's or "
        f"MeanAudio's, such as {NETWORK_FILES['small_16k'].name}. Give the file of a network itself"
        + (f"; there are {some(others)}." if others else ".")
    )
