"""Which of MMAudio's files are where, under its own names or ComfyUI's."""

from __future__ import annotations

from pathlib import Path

from mfmjt.checkpoints import about, read_content, there, weights_in
from mfmjt.codec.mmaudio import codec_files
from mfmjt.errors import InputError, some
from mfmjt.model.checkpoint import MARK, NETWORK_FILES

__all__ = [
    "mode_in",
    "mode_of",
    "mode_there",
    "name_of",
    "networks_there",
    "no_network",
    "root_of",
]


def mode_of(model: str) -> str:
    """The codec of one of MMAudio's networks, "16k" or "44k"."""
    return "16k" if model.endswith("16k") else "44k"


def mode_in(network: Path) -> str:
    """Return the codec of the network in a file of any name, by the channels of its latents.

    Raises:
        InputError: The file cannot be read, or is no network of MMAudio's.
    """
    content = read_content(network)
    with about(network, NETWORK_FILES["small_16k"]):
        state, _ = weights_in(content, MARK, "an MMAudio network")
    return "16k" if state[MARK].shape[1:2] == (20,) else "44k"


def name_of(network: Path, folder: Path) -> str | None:
    """Return the name of a published network that `folder` resolves to this very file, if any."""
    return next((name for name, path in networks_there(folder).items() if path == network), None)


def mode_there(folder: Path) -> str | None:
    """The mode whose codec is, at least in part, in `folder` or in a folder inside it."""
    for mode in ("16k", "44k"):
        if any(there(folder, file) for file in codec_files(mode)):
            return mode
    return None


def networks_there(folder: Path) -> dict[str, Path]:
    """The networks in `folder` or in a folder inside it, by name."""
    found = {model: there(folder, file) for model, file in NETWORK_FILES.items()}
    return {model: path for model, path in found.items() if path}


def no_network(folder: Path) -> InputError:
    """Says that a folder holds none under a known name, and which files there might be one."""
    others = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    )
    return InputError(
        f"{folder} holds no network: neither network.safetensors nor one of MMAudio's, such as "
        f"{NETWORK_FILES['small_16k'].name}. Give the file of a network itself"
        + (f"; there are {some(others)}." if others else ".")
    )


def root_of(network: Path) -> Path:
    """The folder under which the files that go with a network are.

    MMAudio keeps networks in one folder and most other files in another beside it.
    """
    for root in (network.parent, network.parent.parent):
        if (root / "codec.safetensors").exists() or mode_there(root) is not None:
            return root
    return network.parent
