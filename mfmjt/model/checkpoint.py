"""Networks of ours on disk: safetensors files that hold their configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from mfmjt.checkpoints import check_depths, load_published, read_own, save_module
from mfmjt.errors import InputError, reason
from mfmjt.model.config import ModelConfig
from mfmjt.model.transformer import MFMJT

__all__ = ["build", "is_ours", "load", "save"]


def save(net: MFMJT, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write parameters and configuration to one safetensors file.

    Args:
        net: The network.
        path: File to write; it appears whole or not at all.
        dtype: Storage dtype, by default that of each parameter. `load` gives float32 again.

    Raises:
        RunError: The file cannot be written.
    """
    save_module(path, net, net.config, dtype)


def load(path: str | os.PathLike[str], as_stored: bool = False) -> MFMJT:
    """Read a network written by `save`, with float32 parameters on the CPU.

    Args:
        path: The file.
        as_stored: Leave float16 and bfloat16 as they are, for who converts them.

    Raises:
        InputError: The file is missing, damaged or of something else.
    """
    metadata, state = read_own(path, "no mfmjt network")
    try:
        sizes = json.loads(metadata["config"])
        check_depths(sizes, len(state))
        return build(ModelConfig(**sizes), state, as_stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # what is in the file decides what its sizes lead to
        why = "no 'config' in its metadata" if "config" not in metadata else reason(error)
        raise InputError(
            f"{path} is no mfmjt network: {why}. Give a file written by MFMJT.save, or import a "
            "published one, such as with load_mmaudio."
        ) from error


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a network of ours, as `save` writes them, and no published one."""
    try:
        with safe_open(path, framework="pt") as file:
            return "config" in (file.metadata() or {})
    except Exception:  # it is of another format, or damaged: who reads it says so
        return False


def build(config: ModelConfig, state: Mapping[str, Tensor], as_stored: bool = False) -> MFMJT:
    """Return a network of `config` that holds `state`, as float32 or `as_stored`.

    Built without memory first, so that a wrong file costs nothing and a right one is held once.
    """
    with torch.device("meta"):
        net = MFMJT(config)
    load_published(net, state, f"the {config.name} network", as_stored=as_stored)
    return net
