"""Our own layout: a folder with network, codec and encoders, as the shipped nano has them."""

from __future__ import annotations

from pathlib import Path

import torch

from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.families.bundle import Bundle
from mfmjt.model import MFMJT, config_for
from mfmjt.model.checkpoint import is_ours

__all__ = ["CODEC", "NETWORK", "holds", "open_folder"]

NETWORK, CODEC, ENCODERS = "network.safetensors", "codec.safetensors", "encoders.safetensors"


def holds(folder: Path, network: Path | bool) -> bool:
    """Return whether the folder, and the network where one is named, are of this family."""
    if network is True:
        return (folder / NETWORK).exists()
    if network is False:
        return (folder / CODEC).exists()
    return is_ours(network) or not network.exists()


def open_folder(
    folder: Path, network: Path | bool, codec: str | None, dtype: torch.dtype, low_memory: bool
) -> Bundle:
    """Open network, codec and encoders; see `open_bundle`.

    Raises:
        InputError: A file is missing, damaged or of something else.
    """
    if codec is not None or dtype != torch.float32:
        raise InputError(
            f"{folder} has no codec of MMAudio's: leave out the codec and the precision."
        )

    def opened() -> MFMJT:
        if network is False:
            with torch.device("meta"):
                return MFMJT(config_for("nano"))
        return MFMJT.load(folder / NETWORK if network is True else network, as_stored=True)

    return Bundle.opened(
        opened,
        lambda: NanoCodec.load(folder / CODEC),
        lambda: NanoEncoders.load(folder / ENCODERS),
        low_memory=low_memory,
    )
