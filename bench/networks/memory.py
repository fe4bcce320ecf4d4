"""Count what training needs of memory, on tensors without any: no time, and no GPU.

    state   bytes of weights, gradients, two moments and one average, in float32
    kept    for the backward pass: `fixed_bytes` whatever the batch, weights in bfloat16 by
            autocast; `sample_bytes` of each clip, with whole blocks kept or only their inputs

Adapters (with `peft`) change the state; what is kept of a clip is as much with them, or more. A
CUDA context, workspaces of libraries, temporaries of an op and fragmentation are not counted. One
file, DIR/memory.jsonl, is written anew.

Examples:
  python -m bench memory --out /tmp/memory
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import parser
from bench.networks.given import Workload, count, start
from bench.rows import Row
from mfmjt import meanflow
from mfmjt.model import CONFIGS, MFMJT
from mfmjt.model.lora import LoRA, add_lora

__all__ = ["kept", "main", "state"]

RATIO, BATCH = 0.25, 4
GIB = 2**30


def state(name: str, lora: LoRA | None = None, **overrides: Any) -> Row:
    """Return the number of parameters and the bytes of their state.

    Args:
        name: A configuration.
        lora: Adapters; None trains all weights.
        **overrides: Fields of the configuration.
    """
    with torch.device("meta"):
        net = MFMJT.from_config(name, **overrides)
        if lora is not None:
            add_lora(net, lora)
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return {"parameters": total, "trained": trained, "state_bytes": 4 * total + 16 * trained}


def kept(name: str, recompute: bool, **overrides: Any) -> Row:
    """Return the bytes kept for the backward pass: `fixed_bytes`, and `sample_bytes` of a clip.

    Args:
        name: A configuration.
        recompute: Keep only the inputs of blocks.
        **overrides: Fields of the configuration.
    """

    def saved(batch: int) -> int:
        with FakeTensorMode():
            work = Workload.make(name, batch, **overrides)
            work.net.recompute_blocks(recompute)
            with torch.autocast("cpu", torch.bfloat16):
                loss = lambda: meanflow.loss(work.net, work.x, work.cond, ratio=RATIO)  # noqa: E731
                return count(work, loss)["saved_bytes"]

    few, many = saved(BATCH), saved(2 * BATCH)
    sample = (many - few) // BATCH
    return {"fixed_bytes": few - BATCH * sample, "sample_bytes": sample}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and count; return the exit status."""
    usage = parser("memory", __doc__, out="")
    usage.add_argument("--network", action="append", help="only this one [all published]")
    options = usage.parse_args(argv)
    rows = start(options.out / "memory.jsonl", ratio=RATIO)
    for name in options.network or [name for name in CONFIGS if name != "nano"]:
        for lora in (None, LoRA()):
            row = {"what": "state", "network": name, "lora_rank": lora.rank if lora else None}
            row = rows.add({**row, **state(name, lora)})
            rank, millions = row["lora_rank"] or "full", row["trained"] / 1e6
            gib = row["state_bytes"] / GIB
            print(f"{name:14} rank {rank:4}  {millions:8.1f} M trained, state {gib:6.2f} GiB")
        for recompute in (False, True):
            row = {"what": "kept", "network": name, "checkpointing": recompute}
            row = rows.add({**row, **kept(name, recompute)})
            fixed, clip = row["fixed_bytes"] / GIB, row["sample_bytes"] / GIB
            about = f"{name:14} checkpointing {recompute!s:5}"
            print(f"{about}  fixed {fixed:6.2f} GiB, a clip {clip:7.4f} GiB", flush=True)
    return 0
