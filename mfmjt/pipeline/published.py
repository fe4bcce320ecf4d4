"""Which of MMAudio's published files are where."""

from __future__ import annotations

from pathlib import Path

from mfmjt.codec.mmaudio import codec_files
from mfmjt.model.checkpoint import NETWORK_FILES

__all__ = ["mode_of", "mode_there", "networks_there", "root_of"]


def mode_of(model: str) -> str:
    """The codec of one of MMAudio's networks, "16k" or "44k"."""
    return "16k" if model.endswith("16k") else "44k"


def mode_there(folder: Path) -> str | None:
    """The mode whose codec is, at least in part, in `folder` or in a folder inside it."""
    for mode in ("16k", "44k"):
        if any(_there(folder, file.name) for file in codec_files(mode)):
            return mode
    return None


def networks_there(folder: Path) -> dict[str, Path]:
    """The networks in `folder` or in a folder inside it, by name."""
    found = {model: _there(folder, file.name) for model, file in NETWORK_FILES.items()}
    return {model: paths[0] for model, paths in found.items() if paths}


def root_of(network: Path) -> Path:
    """The folder under which the files that go with a network are.

    MMAudio keeps networks in one folder and most other files in another beside it.
    """
    for root in (network.parent, network.parent.parent):
        if mode_there(root) is not None:
            return root
    return network.parent


def _there(folder: Path, name: str) -> list[Path]:
    return [p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()]
