"""Networks on disk: our safetensors files, and the published MMAudio state dicts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfmjt.checkpoints import PublishedFile, load_published, read_state_dict
from mfmjt.errors import InputError
from mfmjt.files import atomic_path
from mfmjt.model.conditioning import r_embedding
from mfmjt.model.config import CONFIGS, ModelConfig, config_for
from mfmjt.model.transformer import MFMJT

__all__ = ["NETWORK_FILES", "load", "load_mmaudio", "save", "to_mmaudio_state_dict"]

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


def save(net: MFMJT, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write parameters and configuration to one safetensors file.

    Args:
        net: The network.
        path: File to write; it appears whole or not at all.
        dtype: Storage dtype, by default that of each parameter. `load` gives float32 again.

    Raises:
        RunError: The file cannot be written.
    """
    state = {name: value.detach().to(dtype=dtype).contiguous() for name, value in _state(net)}
    metadata = {"config": json.dumps(dataclasses.asdict(net.config))}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def load(path: str | os.PathLike[str]) -> MFMJT:
    """Read a network written by `save`, with float32 parameters on the CPU.

    Raises:
        InputError: The file is missing, damaged or of something else.
    """
    if not os.path.isfile(path):
        raise InputError(f"No file {path}: there is nothing to load. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = ModelConfig(**json.loads(metadata["config"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        why = f"no {error} in its metadata" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is no mfmjt network: {why}. Give a file written by MFMJT.save, or import a "
            "published one with load_mmaudio."
        ) from error
    return _build(config, load_file(path))


def load_mmaudio(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | None = None,
    **overrides: Any,
) -> MFMJT:
    """Import a published MMAudio network; u(z, t, t) is then minus its velocity at time 1 − t.

    The configuration is inferred from names and shapes, unless it is named. The embedding of t − r
    starts at zero, so u does not depend on r until it is trained.

    Args:
        source: A `.pth` or `.safetensors` file, or the state dict itself. Nothing is unpickled.
        config: Name of the configuration that every shape must agree with, such as "small_16k";
            None infers it.
        **overrides: Fields of `ModelConfig` that shapes do not tell, such as `latent_length`.

    Returns:
        The network, with float32 parameters on the CPU.

    Raises:
        InputError: Unreadable file, no such configuration, or a parameter is missing, unexpected
            or of another shape.
    """
    # Training checkpoints keep the weights beside the optimizer's state.
    given = source if isinstance(source, Mapping) else read_state_dict(source, inside="weights")
    state = {key: value for key, value in given.items() if key not in _NOT_PERSISTENT}
    sizes = _infer_config(state) if config is None else config_for(config)
    if overrides:
        sizes = dataclasses.replace(sizes, **overrides)
    for key, value in state.items():
        if ".attn.qkv." in key and value.shape[0] == 3 * sizes.hidden_dim:
            # (heads, head_dim, 3, ...) to (3, heads, head_dim, ...)
            parts = value.unflatten(0, (sizes.num_heads, sizes.head_dim, 3))
            state[key] = parts.movedim(2, 0).flatten(0, 2)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the same file always gives the same network
        fresh = r_embedding(sizes.hidden_dim).state_dict()
    return _build(sizes, state | {f"{_OURS}{key}": value for key, value in fresh.items()})


def to_mmaudio_state_dict(net: MFMJT) -> dict[str, Tensor]:
    """The published layout of `net`'s parameters: the inverse of `load_mmaudio`, bit for bit.

    The published network has no second time, so the embedding of t − r is left out: the result
    equals `net` only where that embedding is zero.
    """
    config = net.config
    state = {}
    for key, value in _state(net):
        if key.startswith(_OURS):
            continue
        if ".attn.qkv." in key:
            parts = value.unflatten(0, (3, config.num_heads, config.head_dim))
            value = parts.movedim(0, 2).flatten(0, 2)
        state[key] = value.detach().clone()
    return state


def _state(net: MFMJT) -> list[tuple[str, Tensor]]:
    return list(net.state_dict().items())


def _build(config: ModelConfig, state: Mapping[str, Tensor]) -> MFMJT:
    """A network of `config` that holds `state`.

    Built without memory first, so that a wrong file costs nothing and a right one is held once.
    """
    with torch.device("meta"):
        net = MFMJT(config)
    load_published(net, state, f"the {config.name} network")
    return net


def _infer_config(state: Mapping[str, Tensor]) -> ModelConfig:
    def shape(key: str) -> torch.Size:
        if key not in state:
            raise InputError(
                f"This is no state dict of an MMAudio network: missing {key}. "
                "Give the file as its publisher keeps it."
            )
        return state[key].shape

    def count(stack: str) -> int:
        found = (re.match(rf"{stack}\.(\d+)\.", key) for key in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    hidden = shape("audio_input_proj.0.weight")[0]
    head_dim = shape("fused_blocks.0.attn.q_norm.weight")[0]
    fused_depth = count("fused_blocks")
    latent_dim = shape("latent_mean")[-1]
    sizes: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_dim": hidden,
        "num_heads": max(1, hidden // head_dim),
        "depth": count("joint_blocks") + fused_depth,
        "fused_depth": fused_depth,
        "text_length": shape("empty_string_feat")[0],
        "video_dim": shape("empty_clip_feat")[-1],
        "sync_dim": shape("empty_sync_feat")[-1],
        "text_dim": shape("empty_string_feat")[-1],
        "v2": "clip_input_proj.2.w1.weight" in state,
    }
    for config in CONFIGS.values():
        if all(getattr(config, field) == value for field, value in sizes.items()):
            return config
    # Not a published size: lengths and rates of the autoencoder with as many channels.
    base = CONFIGS["small_44k" if latent_dim == CONFIGS["small_44k"].latent_dim else "small_16k"]
    config = dataclasses.replace(base, name="custom", **sizes)
    width = shape("fused_blocks.0.ffn.w1.weight")[0]
    if config.mlp_hidden != width:
        config = dataclasses.replace(config, mlp_ratio=1.5 * width / hidden)
    return config
