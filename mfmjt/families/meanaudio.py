"""The published files of MeanAudio and its relatives, and networks trained from them.

FdAudio, DriftAudio and FluxAudio have MeanAudio's layout, codec and encoders; Resonate is FluxAudio
at 44.1 kHz with T5 alone. All of them make sound of text.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mfmjt.checkpoints import Check, read_content, there, weights_in
from mfmjt.codec import BigVGANConfig, MMAudioCodec, VAEConfig
from mfmjt.codec.mmaudio import codec_files
from mfmjt.encoders import MeanAudioEncoders
from mfmjt.errors import InputError, some
from mfmjt.families.bundle import Bundle
from mfmjt.families.nano import NETWORK
from mfmjt.model import MFMJT, ModelConfig, load_meanaudio
from mfmjt.model.checkpoint import is_ours
from mfmjt.model.published import MARK, MEANAUDIO_FILES, family_of

__all__ = ["holds", "open_folder", "open_published"]

_CLAP_DIM = 512
_CHANNELS_16K = 20  # of latents; the codec of 44.1 kHz has 40


def holds(folder: Path, network: Path | bool) -> bool:
    """Return whether the folder, and the network where one is named, are of this family."""
    if isinstance(network, Path):
        return network.name in [file.name for file in MEANAUDIO_FILES.values()] or _of_text(network)
    return network and bool(_networks(folder))


def open_folder(
    folder: Path, network: Path | bool, codec: str | None, dtype: torch.dtype
) -> Bundle:
    """Open network, codec and encoders; see `open_bundle`.

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    return open_published(folder, network if isinstance(network, Path) else None, dtype=dtype)


def open_published(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    check: Check = "size",
    dtype: torch.dtype = torch.float32,
    vae: VAEConfig | None = None,
    vocoder: BigVGANConfig | None = None,
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

    Raises:
        InputError: Files are missing, damaged or others; the message names all of them and says
            where their publishers keep them.
    """
    path, others = Path(model or ""), []
    if model is None:
        path, *others = _networks(Path(folder))
    network = MFMJT.load(path) if is_ours(path) else load_meanaudio(path)
    if others:
        left = some(other.name for other in others)
        network.notes += (f"{folder} holds several networks: {path.name} was taken, not {left}.",)
    config = network.config
    codec = "16k" if config.latent_dim == _CHANNELS_16K else "44k"
    encoders = MeanAudioEncoders.from_folder(
        folder,
        check,
        clap=_needs_clap(config),
        text_dim=config.text_dim,
        also=codec_files(codec),
    )
    waveforms = MMAudioCodec.from_folder(folder, codec, check, vae, vocoder)
    return Bundle(network, waveforms.cast(dtype), encoders.cast(dtype))


def _needs_clap(config: ModelConfig) -> bool:
    """Return whether CLAP gives the vector of a text to a network, and not T5's tokens their mean.

    Raises:
        InputError: Neither has the width that the network takes.
    """
    if config.pooled_dim not in (_CLAP_DIM, config.text_dim):
        raise InputError(
            f"{config.name} takes a vector of {config.pooled_dim} for a text: known are CLAP's "
            f"{_CLAP_DIM} and the {config.text_dim} of T5's mean. Give a network with one of them."
        )
    return config.pooled_dim == _CLAP_DIM


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
