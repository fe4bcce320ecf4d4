"""Training states as a test reads them: put together from their shards, without the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mfmjt.train.loop import CHECKPOINTS


def newest(out: str | Path) -> Path:
    folder = Path(out) / CHECKPOINTS
    return folder / (folder / "latest").read_text().strip()


def load_state(out: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest state of a run: whole tensors, and the rest."""
    path = newest(out)
    record = json.loads((path / "state.json").read_text())
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for name in record["files"]:
        with safe_open(path / name, framework="pt") as file:
            where = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118
                pieces.setdefault(key, []).append(
                    (where[key]["saved_offsets"], file.get_tensor(key))
                )
    tensors = {}
    for key, parts in pieces.items():
        ends = [[o + n for o, n in zip(at, part.shape, strict=True)] for at, part in parts]
        whole = torch.full([max(e) for e in zip(*ends, strict=True)], torch.nan)
        for (at, part), end in zip(parts, ends, strict=True):
            if part.numel():
                whole[tuple(slice(a, b) for a, b in zip(at, end, strict=True))] = part
        tensors[key] = whole
    return tensors, record["state"]
