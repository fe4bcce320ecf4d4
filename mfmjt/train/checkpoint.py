"""A training state as one file: tensors in safetensors, everything else as JSON in its header.

One file is written beside the old one and renamed onto it, so that a run killed at any moment
leaves the earlier state or the later, never a mixture. Nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mfmjt.errors import InputError, reason
from mfmjt.files import atomic_path

__all__ = ["load_optimizer", "load_state", "optimizer_tensors", "save_state"]

FORMAT = "mfmjt-training-1"


def save_state(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `tensors` (any device) and the JSON-serialisable `state` to `path`, atomically."""
    flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(flat, temporary, metadata={"format": FORMAT, "state": json.dumps(state)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        InputError: The file is damaged or is no training state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(
                    f"Cannot resume from {path}: it is no training state of this version. "
                    "Choose another output folder, or remove the file to begin again."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata["state"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"Cannot resume from {path}: {reason(error)}. Remove the file to begin the training "
            "again."
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return an optimiser's per-parameter tensors under `optimizer.<slot>.<parameter name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{slot}.{names[index]}": value
        for index, slots in state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    position = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, slot, name = key.split(".", 2)
            state.setdefault(position[name], {})[slot] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
