"""Networks on disk: our safetensors files, and the published MMAudio state dicts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mfmjt.checkpoints import (
    PublishedFile,
    about,
    check_depths,
    load_published,
    read_content,
    read_own,
    save_module,
    weights_in,
)
from mfmjt.errors import InputError, reason
from mfmjt.model.conditioning import r_embedding
from mfmjt.model.config import CONFIGS, ModelConfig, config_for
from mfmjt.model.transformer import MFMJT

__all__ = [
    "MARK",
    "NETWORK_FILES",
    "is_ours",
    "load",
    "load_mmaudio",
    "save",
    "to_mmaudio_state_dict",
]

_PUBLISHER = "https://huggingface.co/hkchengrex/MMAudio/tree/main/weights"
NETWORK_FILES = {
    name: PublishedFile(f"mmaudio_{name}.pth", _PUBLISHER, size, md5)
    for name, size, md5 in (
        ("small_16k", "601M", "af93cde404179f58e3919ac085b8033b"),
        ("small_44k", "601M", "babd74c884783d13701ea2820a5f5b6d"),
        ("medium_44k", "2.4G", "5a56b6665e45a1e65ada534defa903d0"),
        ("large_44k", "3.9G", "fed96c325a6785b85ce75ae1aafd2673"),
        ("large_44k_v2", "3.9G", "01ad4464f049b2d7efdaa4c1a59b8dfe"),
    )
}
"""The published networks by the name of their configuration."""
_NOT_PERSISTENT = {"t_embed.freqs", "latent_rot", "clip_rot"}
"""Tables that older checkpoints carry and every network computes itself."""
_OURS = "r_embed."
MARK = "audio_input_proj.0.weight"
"""A parameter that networks have and no other part of a model or of a training."""


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


def load(path: str | os.PathLike[str]) -> MFMJT:
    """Read a network written by `save`, with float32 parameters on the CPU.

    Raises:
        InputError: The file is missing, damaged or of something else.
    """
    metadata, state = read_own(path, "no mfmjt network")
    try:
        sizes = json.loads(metadata["config"])
        check_depths(sizes, len(state))
        return _build(ModelConfig(**sizes), state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # what is in the file decides what its sizes lead to
        why = "no 'config' in its metadata" if "config" not in metadata else reason(error)
        raise InputError(
            f"{path} is no mfmjt network: {why}. Give a file written by MFMJT.save, or import a "
            "published one with load_mmaudio."
        ) from error


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a network of ours, as `save` writes them, and no published one."""
    try:
        with safe_open(path, framework="pt") as file:
            return "config" in (file.metadata() or {})
    except Exception:  # it is of another format, or damaged: who reads it says so
        return False


def load_mmaudio(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | None = None,
    **overrides: Any,
) -> MFMJT:
    """Import a published MMAudio network; u(z, t, t) is then minus its velocity at time 1 − t.

    The configuration is inferred from names and shapes, unless it is named. The embedding of t − r
    starts at zero, so u does not depend on r until it is trained.

    Args:
        source: A `.pth` or `.safetensors` file, the index of several, or the state dict itself;
            both may keep it inside, behind a prefix, and beside other things, as checkpoints of
            trainings do. Averaged (EMA) weights are taken where there are such. Nothing is
            unpickled.
        config: Name of the configuration that every shape must agree with, such as "small_16k";
            None infers it.
        **overrides: Fields of `ModelConfig` that shapes do not tell, such as `latent_length`.

    Returns:
        The network, with float32 parameters on the CPU; its `notes` say which of several weights
        were taken.

    Raises:
        InputError: Unreadable file, no such configuration, or a parameter is missing, unexpected
            or of another shape.
    """
    if not isinstance(source, Mapping):
        content = read_content(source)
        with about(source, NETWORK_FILES.get(config or "", NETWORK_FILES["small_16k"])):
            return load_mmaudio(content, config, **overrides)
    given, notes = weights_in(source, MARK, "an MMAudio network")
    state = {key: value for key, value in given.items() if key not in _NOT_PERSISTENT}
    sizes = _infer_config(state) if config is None else config_for(config)
    if overrides:
        sizes = dataclasses.replace(sizes, **overrides)
    qkv = (3 * sizes.hidden_dim, sizes.hidden_dim)
    for key, value in state.items():
        if ".attn.qkv." in key and tuple(value.shape) in (qkv, qkv[:1]):
            # (heads, head_dim, 3, ...) to (3, heads, head_dim, ...)
            parts = value.unflatten(0, (sizes.num_heads, sizes.head_dim, 3))
            state[key] = parts.movedim(2, 0).flatten(0, 2)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the same file always gives the same network
        fresh = r_embedding(sizes.hidden_dim).state_dict()
    net = _build(sizes, state | {f"{_OURS}{key}": value for key, value in fresh.items()})
    net.notes = notes
    return net


def to_mmaudio_state_dict(net: MFMJT) -> dict[str, Tensor]:
    """Return `net`'s parameters in the published layout: `load_mmaudio` reversed, bit for bit.

    The published network has no second time, so the embedding of t − r is left out: the result
    equals `net` only where that embedding is zero.
    """
    config = net.config
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith(_OURS):
            continue
        if ".attn.qkv." in key:
            parts = value.unflatten(0, (3, config.num_heads, config.head_dim))
            value = parts.movedim(0, 2).flatten(0, 2)
        state[key] = value.detach().clone()
    return state


def _build(config: ModelConfig, state: Mapping[str, Tensor]) -> MFMJT:
    """Return a network of `config` that holds `state`.

    Built without memory first, so that a wrong file costs nothing and a right one is held once.
    """
    with torch.device("meta"):
        net = MFMJT(config)
    load_published(net, state, f"the {config.name} network")
    return net


def _infer_config(state: Mapping[str, Tensor]) -> ModelConfig:
    def shape(key: str, axes: int) -> torch.Size:
        found = state[key].shape if key in state else ()
        if len(found) != axes or 0 in found:
            wrong = f"{key} has shape {tuple(found)}" if key in state else f"missing {key}"
            raise InputError(
                f"This is no state dict of an MMAudio network: {wrong}. "
                "Give the file as its publisher keeps it."
            )
        return torch.Size(found)

    def count(stack: str) -> int:
        found = (re.match(rf"{stack}\.(\d+)\.", key) for key in state)
        return len({match[1] for match in found if match})

    hidden = shape(MARK, 3)[0]
    if hidden != shape("t_embed.mlp.2.weight", 2)[1]:
        raise InputError(
            "This is no state dict of an MMAudio network: its layers do not fit each other. "
            "Give the file as its publisher keeps it."
        )
    head_dim = shape("fused_blocks.0.attn.q_norm.weight", 1)[0]
    fused_depth = count("fused_blocks")
    latent_dim = shape("latent_mean", 3)[-1]
    sizes: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_dim": hidden,
        "num_heads": max(1, hidden // head_dim),
        "depth": count("joint_blocks") + fused_depth,
        "fused_depth": fused_depth,
        "text_length": shape("empty_string_feat", 2)[0],
        "video_dim": shape("empty_clip_feat", 2)[-1],
        "sync_dim": shape("empty_sync_feat", 2)[-1],
        "text_dim": shape("empty_string_feat", 2)[-1],
        "v2": "clip_input_proj.2.w1.weight" in state,
    }
    for config in CONFIGS.values():
        if all(getattr(config, field) == value for field, value in sizes.items()):
            return config
    # Not a published size: lengths and rates of the autoencoder with as many channels.
    base = CONFIGS["small_44k" if latent_dim == CONFIGS["small_44k"].latent_dim else "small_16k"]
    config = dataclasses.replace(base, name="custom", **sizes)
    width = shape("fused_blocks.0.ffn.w1.weight", 3)[0]
    if config.mlp_hidden != width:
        config = dataclasses.replace(config, mlp_ratio=1.5 * width / hidden)
    return config
