"""What training needs of memory, counted on tensors without any: no time, and no GPU.

    state   bytes of weights, gradients, two moments and one average, in float32
    fixed   bytes kept for the backward pass whatever the batch: weights in bfloat16, by autocast
    sample  bytes kept for each clip, each memory once; with whole blocks kept or their inputs alone

Adapters (with `peft`) change the state; what is kept of a clip is as much with them, or more. One
file, DIR/memory.jsonl, is written anew. What is not counted: a CUDA context, workspaces of
libraries, what lives within one op, and fragmentation.

    python -m bench.model.bench_memory --out /tmp/memory
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.machine import environment
from bench.rows import Rows
from mfmjt import meanflow
from mfmjt.model import CONFIGS, MFMJT
from mfmjt.model.lora import LoRA, add_lora

__all__ = ["kept", "main", "state"]

RATIO, BATCH = 0.25, 4
GIB = 2**30


def state(name: str, lora: LoRA | None = None, **overrides: Any) -> dict[str, Any]:
    """Parameters and the bytes of their state.

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


def kept(name: str, recompute: bool, **overrides: Any) -> dict[str, int]:
    """What is kept for the backward pass: `fixed_bytes`, and `sample_bytes` of each clip.

    Args:
        name: A configuration.
        recompute: Keep only the inputs of blocks.
        **overrides: Fields of the configuration.
    """
    few, many = (_saved(name, recompute, batch, overrides) for batch in (BATCH, 2 * BATCH))
    sample = (many - few) // BATCH
    return {"fixed_bytes": few - BATCH * sample, "sample_bytes": sample}


def _saved(name: str, recompute: bool, batch: int, overrides: dict[str, Any]) -> int:
    found: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        net = MFMJT.from_config(name, **overrides)
        net.recompute_blocks(recompute)
        c = net.config
        x = torch.randn(batch, c.latent_length, c.latent_dim)
        cond = {
            "video": torch.randn(batch, c.video_length, c.video_dim),
            "sync": torch.randn(batch, c.sync_length, c.sync_dim),
            "text": torch.randn(batch, c.text_length, c.text_dim),
        }
        free = [*net.parameters(), *cond.values(), x]
        known = {tensor.untyped_storage()._cdata for tensor in free}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                found[storage._cdata] = storage  # held, or another would get its address
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            meanflow.loss(net, x, cond, ratio=RATIO)
        return sum(storage.nbytes() for storage in found.values())


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and count; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model.bench_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--network", action="append", help="only this one [all published]")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "memory.jsonl"
    path.unlink(missing_ok=True)
    rows = Rows(path)
    rows.add({"what": "environment", "ratio": RATIO, **environment(torch.device("cpu"))})
    for name in options.network or [name for name in CONFIGS if name != "nano"]:
        for lora in (None, LoRA()):
            found = state(name, lora)
            rank = lora.rank if lora else None
            rows.add({"what": "state", "network": name, "lora_rank": rank, **found})
            millions = found["trained"] / 1e6
            print(
                f"{name:14} rank {rank or 'full':4}  {millions:8.1f} M trained, "
                f"state {found['state_bytes'] / GIB:6.2f} GiB"
            )
        for recompute in (False, True):
            bytes_of = kept(name, recompute)
            rows.add({"what": "kept", "network": name, "checkpointing": recompute, **bytes_of})
            print(
                f"{name:14} checkpointing {recompute!s:5}  "
                f"fixed {bytes_of['fixed_bytes'] / GIB:6.2f} GiB, "
                f"a clip {bytes_of['sample_bytes'] / GIB:7.4f} GiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
