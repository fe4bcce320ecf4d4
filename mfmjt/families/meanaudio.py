"""The published files of MeanAudio and its relatives, and networks trained from them.

FdAudio, DriftAudio and FluxAudio have MeanAudio's layout, codec and encoders; Resonate is FluxAudio
at 44.1 kHz with T5 alone. All of them make sound of text.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mfmjt.checkpoints import Check, about, read_content, there, weights_in
from mfmjt.codec import BigVGANConfig, MMAudioCodec, VAEConfig
from mfmjt.codec.mmaudio import codec_files
from mfmjt.encoders import CLAPText, MeanAudioEncoders
from mfmjt.encoders.clap import ROBERTA
from mfmjt.encoders.meanaudio import find_encoders
from mfmjt.encoders.t5 import FLAN_T5
from mfmjt.encoders.text_model import TextModel, folders_of
from mfmjt.errors import InputError, some
from mfmjt.families.bundle import Bundle
from mfmjt.families.nano import NETWORK
from mfmjt.model import MFMJT, load_meanaudio
from mfmjt.model.checkpoint import is_ours
from mfmjt.model.published import MARK, MEANAUDIO_FILES, NETWORK_FILES, family_of

__all__ = ["holds", "kept_elsewhere", "open_folder", "open_published"]

_LAYERS = (MARK, "text_input_proj.0.weight", "text_cond_proj.0.weight")
"""Weights of the layers for latents, text tokens and the vector of a text."""
_CHANNELS_16K = 20  # of latents; the codec of 44.1 kHz has 40


def holds(folder: Path, network: Path | bool) -> bool:
    """Return whether the folder, and the network where one is named, are of this family."""
    if isinstance(network, Path):
        return network.name in [file.name for file in MEANAUDIO_FILES.values()] or _of_text(network)
    if network and (ours := folder / NETWORK).exists():
        return _of_text(ours)
    return network and bool(_networks(folder))


def open_folder(
    folder: Path, network: Path | bool, codec: str | None, dtype: torch.dtype, low_memory: bool
) -> Bundle:
    """Open network, codec and encoders; see `open_bundle`.

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    if not isinstance(network, Path):
        return open_published(folder, dtype=dtype, low_memory=low_memory)
    # The publishers' own code keeps networks in `weights`; text models may lie beside that.
    if folder.name == "weights" and not folders_of(FLAN_T5, folder):
        folder = folder.parent
    return open_published(folder, network, dtype=dtype, low_memory=low_memory)


def open_published(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    check: Check = "size",
    dtype: torch.dtype = torch.float32,
    vae: VAEConfig | None = None,
    vocoder: BigVGANConfig | None = None,
    low_memory: bool = False,
) -> Bundle:
    """Open what the publishers of MeanAudio and its relatives keep.

    Args:
        folder: Holds the files and the folders of T5 and RoBERTa, itself or in folders inside it.
        model: The file of a network, published or ours, wherever it is; None takes the one in the
            folder, the first of `MEANAUDIO_FILES` if there are several.
        check: As for `mfmjt.Pipeline.from_mmaudio`.
        dtype: Of the codec's and encoders' arithmetic.
        vae: Sizes of an autoencoder of your own under the published name.
        vocoder: The same of a vocoder.
        low_memory: As for `mfmjt.Pipeline`.

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    path, note = (Path(model), "") if model is not None else _chosen(Path(folder))
    latent_dim, text_dim, pooled_dim = _widths(path)
    codec = "16k" if latent_dim == _CHANNELS_16K else "44k"
    clap = _needs_clap(pooled_dim, text_dim)
    # All that is missing is said at once, before the first gigabyte is read.
    find_encoders(folder, check, clap=clap, also=codec_files(codec))

    def network() -> MFMJT:
        load = MFMJT.load if is_ours(path) else load_meanaudio
        net = load(path, as_stored=True)
        net.notes += (note,) if note else ()
        return net

    def ends() -> MMAudioCodec:
        return MMAudioCodec.from_folder(folder, codec, "name", vae, vocoder).cast(dtype)

    def encoders() -> MeanAudioEncoders:
        found = MeanAudioEncoders.from_folder(folder, "name", clap=clap, text_dim=text_dim)
        return found.cast(dtype)

    return Bundle.opened(network, ends, encoders, low_memory=low_memory)


def kept_elsewhere(folder: Path) -> list[TextModel]:
    """Return the text models that a folder of this family needs and that are not with it."""
    found = _networks(folder)
    if not found:
        return []
    _, text_dim, pooled_dim = _widths(found[0])
    models = [FLAN_T5, ROBERTA] if _needs_clap(pooled_dim, text_dim) else [FLAN_T5]
    return [model for model in models if not folders_of(model, folder)]


def _chosen(folder: Path) -> tuple[Path, str]:
    """Return the file of the network to take, and a note on others that are there.

    Raises:
        InputError: There are networks of MMAudio's beside it.
    """
    path, *others = _networks(folder)
    of_mmaudio = [file for file in NETWORK_FILES.values() if there(folder, file) is not None]
    if of_mmaudio:
        files = some([path.name, *(other.name for other in others + of_mmaudio)])
        raise InputError(
            f"{folder} holds networks of MeanAudio's and of MMAudio's: {files}. Give the file of "
            "one of them."
        )
    left = some(other.name for other in others)
    return path, f"{folder} holds several networks: {path.name} was taken, not {left}." * bool(left)


def _widths(path: Path) -> tuple[int, int, int]:
    """Return the channels of latents, of text tokens and of the vector of a text.

    Raises:
        InputError: The file cannot be read, or is no network of this family.
    """
    content = read_content(path)
    with about(path, MEANAUDIO_FILES["meanaudio_s_full"]):
        state = weights_in(content, MARK, "a network of MeanAudio's").tensors
        if any(name not in state or state[name].ndim < 2 for name in _LAYERS):
            raise InputError("This is no network of MeanAudio's: its input layers are others.")
    latents, text, pooled = (state[name].shape[1] for name in _LAYERS)
    return latents, text, pooled


def _needs_clap(pooled_dim: int, text_dim: int) -> bool:
    """Return whether CLAP gives the vector of a text to a network, and not T5's tokens their mean.

    Raises:
        InputError: Neither has the width that the network takes.
    """
    if pooled_dim not in (CLAPText.dim, text_dim):
        raise InputError(
            f"The network takes a vector of {pooled_dim} for a text: known are CLAP's "
            f"{CLAPText.dim} and the {text_dim} of T5's mean. Give a network with one of them."
        )
    return pooled_dim == CLAPText.dim


def _of_text(path: Path) -> bool:
    """Return whether a file holds a network of this family, published or ours."""
    try:
        if is_ours(path):
            return not MFMJT.load(path).config.takes_video
        return family_of(weights_in(read_content(path), MARK, "a network").tensors) == "MeanAudio"
    except InputError:  # who opens it says what it is
        return False


def _networks(folder: Path) -> list[Path]:
    """Return the networks in a folder or inside it: ours, then the published ones."""
    ours = [path for path in [folder / NETWORK] if path.exists() and _of_text(path)]
    files = MEANAUDIO_FILES.values()
    return ours + [path for file in files if (path := there(folder, file)) is not None]
