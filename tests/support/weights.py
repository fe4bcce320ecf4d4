"""Weights by rule, so that a network of any size has the same ones here and at its publisher's.

The published implementations of the codec and the encoders were run with these weights; what they
took and gave is in `tests/*/vectors/`, with the names and shapes of all parameters and the seed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_EMBEDDINGS = ("empty_", "sync_pos_emb", "pos_embed", "temp_embed", "cls_token")


def normal(name: str, shape: Sequence[int], seed: int) -> Tensor:
    stream = np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32))
    drawn = np.random.Generator(stream).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(drawn))


def _draw_of(network: str, name: str, r: Tensor) -> Tensor | None:
    """Return a parameter for which a network has a rule of its own; else None."""
    width = math.sqrt(math.prod(r.shape[1:]))
    if network == "VGGish":
        if name.endswith("pca_eigen_vectors"):
            return 0.5 * r / width
        if name.endswith("weight") and r.ndim >= 2:
            return 1.25 * r / width
    if network == "Cnn14" or network.startswith("CLAP"):
        if name.endswith("bn0.running_mean"):
            return -30 + 5 * r
        if name.endswith("bn0.running_var"):
            return 300 * (1 + 0.1 * r.clamp(-3, 3))
        if name.endswith("running_mean"):
            return 0.05 * r
        if name.endswith("running_var"):
            return 1 + 0.1 * r.clamp(-3, 3)
    if network == "Cnn14" and name.startswith("conv_block") and ".conv" in name:
        return 1.6 * r / width
    if network == "Cnn14" and name == "fc1.weight":
        return math.sqrt(2) * r / width
    if network.startswith("Synchformer") and name.endswith(
        ("pos_emb_cfg.pos_emb", "position_embeddings")
    ):
        return 0.05 * r
    return None


def draw(name: str, shape: Sequence[int], seed: int, network: str = "") -> Tensor:
    r = normal(name, shape, seed)
    if (own := _draw_of(network, name, r)) is not None:
        return own
    if name.endswith(("latent_std", "data_std")):
        return 1.5 + 0.3 * r.clamp(-3, 3)
    if name.endswith(("latent_mean", "data_mean")):
        return 0.5 * r
    if name.endswith("weight_g"):
        gain = 0.05 if "conv_post" in name else 0.3 if "resblocks" in name else 1.0
        return gain * (1 + 0.1 * r)
    if name.endswith("weight_v"):
        return r
    if name.endswith((".alpha", ".beta")):
        return 0.1 * r
    if any(part in name for part in _EMBEDDINGS) or name.endswith("bias"):
        return 0.05 * r
    if r.ndim <= 1:
        return 1 + 0.1 * r
    return r / math.sqrt(math.prod(shape[1:])) * (0.3 if "adaLN_modulation" in name else 1.0)


def draw_all(
    shapes: Mapping[str, Sequence[int]], seed: int = 0, network: str = ""
) -> dict[str, Tensor]:
    """State dict of the names that are drawn; filters are computed by who needs them."""
    drawn = (name for name in shapes if not name.endswith(".filter"))
    return {name: draw(name, shapes[name], seed, network) for name in drawn}


def about(part: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, inputs and outputs) of a file in the `vectors` of `tests/<part>`."""
    path = Path(__file__).parents[1] / part / "vectors" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read(part: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(published state dict, inputs and outputs) of a file in the `vectors` of `tests/<part>`."""
    metadata, tensors = about(part, name)
    network = metadata.get("network", "")
    return draw_all(metadata["shapes"], int(metadata["seed"]), network), tensors
