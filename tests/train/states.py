"""What a test reads of a training run: its log, and its state, put together from the shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mfmjt.train.trainer import CHECKPOINTS


def records(out: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """The records in the log, of one kind or all, without what no other run repeats."""
    lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "clips_per_s")}
        for line in lines
        if kind in line.get("kind", "")
        if "kind" in line
    ]


def undo(out: str | Path, step: int) -> None:
    """Remove the newest state, as if the run had been killed after `step`, the one before."""
    path = newest(out)
    shutil.rmtree(path)
    (path.parent / "latest").write_text(f"step-{step:09d}")


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


def curve(out: str | Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of the gradient of every record of training."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(out, "train")]


def same_state(ours: str, theirs: str) -> bool:
    """Whether two runs ended with the same state, to the last bit."""
    (a, s), (b, t) = (load_state(out) for out in (ours, theirs))
    changing = {"seconds", "config"}
    assert {k: v for k, v in s.items() if k not in changing} == {
        k: v for k, v in t.items() if k not in changing
    }
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
