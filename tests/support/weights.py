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

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_EMBEDDINGS = ("empty_", "sync_pos_emb", "pos_embed", "temp_embed", "cls_token")


def normal(name: str, shape: Sequence[int], seed: int) -> Tensor:
    stream = np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32))
    drawn = np.random.Generator(stream).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(drawn))


def draw(name: str, shape: Sequence[int], seed: int) -> Tensor:
    r = normal(name, shape, seed)
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


def draw_all(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """State dict of the names that are drawn; filters are computed by who needs them."""
    return {k: draw(k, shape, seed) for k, shape in shapes.items() if not k.endswith(".filter")}


def read(part: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(published state dict, inputs and outputs) of a file in the `vectors` of `tests/<part>`."""
    path = Path(__file__).parents[1] / part / "vectors" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return draw_all(json.loads(metadata["shapes"]), int(json.loads(metadata["seed"]))), tensors
