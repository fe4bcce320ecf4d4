"""Weights by rule, and the reference outputs that belong to them (see vectors/README.md)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"
TINY = {"latent_length": 25, "video_length": 8, "sync_length": 24}


def draw(name: str, shape: list[int], seed: int) -> Tensor:
    stream = np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32))
    r = torch.from_numpy(np.random.Generator(stream).standard_normal(shape, dtype=np.float32))
    if name.endswith("latent_std"):
        return 1.5 + 0.3 * r.clamp(-3, 3)
    if name.endswith("latent_mean"):
        return 0.5 * r
    if "empty_" in name or "sync_pos_emb" in name or name.endswith("bias"):
        return 0.05 * r
    if r.ndim <= 1:
        return 1 + 0.1 * r
    return r / math.sqrt(math.prod(shape[1:])) * (0.3 if "adaLN_modulation" in name else 1.0)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(published state dict, inputs and outputs)."""
    with safe_open(VECTORS / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    seed = int(json.loads(metadata["seed"]))
    shapes = json.loads(metadata["shapes"])
    return {key: draw(key, shape, seed) for key, shape in shapes.items()}, tensors
