"""What a test reads of a training run: its log, and its state, put together from the shards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mfmjt.train.loop import CHECKPOINTS


def records(out: Path) -> list[dict[str, Any]]:
    """The log of a run without what no other run repeats."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@contextlib.contextmanager
def stopped(owner: Any, name: str, call: int) -> Iterator[None]:
    """Run the block up to the `call`-th call of the function `owner.name`, which fails."""

    class Stop(Exception):
        pass

    real, calls = getattr(owner, name), []

    def interrupt(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise Stop
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(Stop):
            yield


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
