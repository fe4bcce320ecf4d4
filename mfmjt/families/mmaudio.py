"""MMAudio's published files, under its own names or ComfyUI's, and networks trained from them.

SelVA's and FoleyDash's networks go with MMAudio's codec and encoders, too; they are given by file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mfmjt.checkpoints import Check, about, find_all, read_content, there, weights_in
from mfmjt.codec import BigVGANConfig, MMAudioCodec, VAEConfig
from mfmjt.codec.mmaudio import codec_files
from mfmjt.encoders import CLIPConfig, MMAudioEncoders, SynchformerConfig
from mfmjt.encoders.mmaudio import ENCODER_FILES
from mfmjt.errors import InputError, some
from mfmjt.families.bundle import Bundle
from mfmjt.families.nano import CODEC, NETWORK
from mfmjt.meanflow import Sampling
from mfmjt.model import MFMJT, config_for, load_network
from mfmjt.model.checkpoint import is_ours
from mfmjt.model.published import MARK, NETWORK_FILES, family_of

__all__ = ["Sizes", "holds", "open_folder", "open_published"]


class Sizes(NamedTuple):
    """Sizes of parts of your own under the published names; None for a published one."""

    vae: VAEConfig | None = None
    vocoder: BigVGANConfig | None = None
    clip: CLIPConfig | None = None
    synchformer: SynchformerConfig | None = None


PUBLISHED = Sizes()
_SELVA = "generator_small_16k_sup_5.pth"


def holds(folder: Path, network: Path | bool) -> bool:
    """Return whether the folder, and the network where one is named, are of this family.

    A network of ours, trained further from one of MMAudio's, goes with MMAudio's codec and encoders
    where none of ours are beside it.
    """
    if network is True and not (folder / NETWORK).exists():
        return bool(_networks(folder))
    if isinstance(network, Path) and network.exists() and not is_ours(network):
        return True
    return not (folder / CODEC).exists() and _codec(folder) is not None


def open_folder(
    folder: Path, network: Path | bool, codec: str | None, dtype: torch.dtype, low_memory: bool
) -> Bundle:
    """Open network, codec and encoders; see `open_bundle`.

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    codec = codec or _codec(folder)
    if network is False:
        assert codec is not None
        config = config_for(f"small_{codec}")

        def empty() -> MFMJT:
            with torch.device("meta"):
                return MFMJT(config)

        return _bundle(empty, folder, codec, dtype=dtype, low_memory=low_memory)
    if network is True and (folder / NETWORK).exists():
        network = folder / NETWORK
    if isinstance(network, Path) and is_ours(network):
        assert codec is not None
        find_all(folder, [*codec_files(codec), *ENCODER_FILES])
        load = partial(_ours, network)
        return _bundle(load, folder, codec, dtype=dtype, low_memory=low_memory)
    if network is True:
        return open_published(folder, dtype=dtype, low_memory=low_memory)
    known = next((name for name, path in _networks(folder).items() if path == network), None)
    return open_published(folder, known or network, dtype=dtype, low_memory=low_memory)


def _ours(path: Path) -> MFMJT:
    """Return a network of ours that MMAudio's encoders serve."""
    network = MFMJT.load(path, as_stored=True)
    if network.config.pooled_dim is not None:
        raise InputError(
            f"{path} takes video and a vector of the whole text, and no encoders here give both: "
            "MMAudio's give no vector. Call the network itself, with features of your own "
            "(text=, pooled=, video=, sync=)."
        )
    return network


def open_published(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    check: Check = "size",
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = PUBLISHED,
    low_memory: bool = False,
) -> Bundle:
    """Open what MMAudio's publishers keep; `Pipeline.from_mmaudio` says what the arguments are.

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    if model is None:
        found = _networks(Path(folder))
        if len(found) > 1:
            files = some(path.name for path in found.values())
            raise InputError(f"{folder} holds several networks: {files}. Choose one of them.")
        model = next(iter(found), "small_16k")
    # All that is missing is said at once, before the first gigabyte is read.
    config, sampling = None, None
    if model in NETWORK_FILES:
        codec = "16k" if str(model).endswith("16k") else "44k"
        needed = [NETWORK_FILES[str(model)], *codec_files(codec), *ENCODER_FILES]
        network, *_ = find_all(folder, needed, check)
        if check != "name" and sizes == PUBLISHED:
            config = str(model)
    elif os.path.isfile(network := Path(model)):
        codec, family = _codec_for(network)
        if family == "FoleyDash":  # guidance is in its weights
            sampling = Sampling(guidance=1.0)
        find_all(folder, [*codec_files(codec), *ENCODER_FILES], check)
    else:
        raise InputError(
            f"MMAudio has no network {str(model)!r}: there are {', '.join(NETWORK_FILES)}. "
            "Choose one, or give a file."
        )

    def load() -> MFMJT:
        net = load_network(network, config, as_stored=True)
        if network.name == _SELVA:
            net.notes += (
                "SelVA's generator is made for synchronization features that its own encoder "
                "selects by the text, and for no others: these are MMAudio's, of all that is seen.",
            )
        return net

    return _bundle(load, folder, codec, "name", dtype, sizes, low_memory, sampling)


def _bundle(
    network: Callable[[], MFMJT],
    folder: str | os.PathLike[str],
    codec: str,
    check: Check = "size",
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = PUBLISHED,
    low_memory: bool = False,
    sampling: Sampling | None = None,
) -> Bundle:
    def ends() -> MMAudioCodec:
        return MMAudioCodec.from_folder(folder, codec, check, sizes.vae, sizes.vocoder).cast(dtype)

    def encoders() -> MMAudioEncoders:
        found = MMAudioEncoders.from_folder(folder, check, sizes.clip, sizes.synchformer)
        return found.cast(dtype)

    return Bundle.opened(network, ends, encoders, sampling, low_memory)


def _codec(folder: Path) -> str | None:
    """Return which codec, "16k" or "44k", is, at least in part, in a folder or inside it."""
    for codec in ("16k", "44k"):
        if any(there(folder, file) for file in codec_files(codec)):
            return codec
    return None


def _codec_for(network: Path) -> tuple[str, str]:
    """Return the codec of the network in a file of any name, by its latents, and whose it is.

    Raises:
        InputError: The file cannot be read, or is no network of MMAudio's.
    """
    content = read_content(network)
    with about(network, NETWORK_FILES["small_16k"]):
        state, _ = weights_in(content, MARK, "a network of MMAudio's")
        family = family_of(state)
    return "16k" if state[MARK].shape[1:2] == (20,) else "44k", family


def _networks(folder: Path) -> dict[str, Path]:
    """Return the published networks in a folder or inside it, by name."""
    found = {model: there(folder, file) for model, file in NETWORK_FILES.items()}
    return {model: path for model, path in found.items() if path}
