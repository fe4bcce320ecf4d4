"""Several processes that train one network, started by `torchrun`.

Without torchrun there is one process, and nothing of torch.distributed is touched. Every process
works on its rows of one global batch: row g of it belongs to part g mod (processes x parts), so
that the rows with r < t, which come first, are dealt out evenly and shapes stay static.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
import warnings
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfmjt.errors import InputError, RunError, reason
from mfmjt.processes import rank_and_world

__all__ = [
    "Processes",
    "choose_parallel",
    "gradient_sync",
    "replicate",
    "shard",
    "whole",
]

STATE_BYTES = 20
"""Of a trained parameter in fp32: weight, gradient, two moments, one average."""
PATIENCE_S = 600
"""How long processes wait for one another at the start."""


class Processes:
    """The processes of one training; use as a context manager.

    A group that is there already, of a script that was started by torchrun itself, is used and left
    alone.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; under torchrun `cuda` is each process's own GPU.

    Attributes:
        rank: Number of this process; 0 writes logs and results.
        world: Number of processes.
        device: Where this process computes.

    Raises:
        InputError: The device cannot be used.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.world = rank_and_world()
        self.launched = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
        if self.world > 1 and device.startswith("cuda:"):
            raise InputError(
                f"device={device} would put {self.world} processes on one GPU. Give device=cuda."
            )
        if device == "cuda" and self.launched:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device={device} cannot be used: {reason(error)}. Try device=cpu."
            ) from error
        self.group: Any = None
        self.owns_group = False

    def __enter__(self) -> Processes:
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.launched and not dist.is_initialized():
            backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
            store, rank, world = _meet()
            dist.init_process_group(
                backends.get(self.device.type), store=store, rank=rank, world_size=world
            )
            self.owns_group = True
        if dist.is_initialized():
            # Checkpoints are written by a thread, whose messages must not mix with the training's.
            self.group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure the others may never answer: leave without a word, torchrun ends them.
        if self.owns_group and error is None:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def rows(self, part: int = 0, parts: int = 1) -> slice:
        """Which rows of the global batch are this process's, in pass `part` of `parts`."""
        return slice(part * self.world + self.rank, None, parts * self.world)

    def check_rows(self, rows: int, intervals: int, parts: int, how: str) -> None:
        """Refuse a global batch that cannot be dealt out.

        Under FSDP all processes fetch weights together, so that all must run the network as often:
        none may lack rows with r < t, or without, where others have some.

        Args:
            rows: Rows of the global batch.
            intervals: How many of them, the first, have r < t.
            parts: Passes that accumulate one gradient.
            how: `none`, `ddp` or `fsdp`.

        Raises:
            InputError: A process would have no rows, or under FSDP none of a kind.
        """
        shares = parts * self.world
        if rows < shares:
            raise InputError(
                f"A batch of {rows} cannot be shared by {self.world} processes in {parts} passes. "
                f"Give a batch of at least {shares}."
            )
        for part in range(parts if how == "fsdp" else 0):
            kinds = set()
            for first in range(part * self.world, (part + 1) * self.world):
                mine = len(range(first, intervals, shares))
                kinds.add((mine > 0, len(range(first, rows, shares)) > mine))
            if len(kinds) > 1:
                raise InputError(
                    f"parallel=fsdp with {self.world} processes needs rows with r < t, and rows "
                    f"without, in all of them or in none; {intervals} of {rows} do not go round "
                    f"in {parts} passes. Give a larger batch, another ratio, or parallel=ddp."
                )


def _meet() -> tuple[Any, int, int]:
    """Wait for the other processes of this attempt; a store of theirs alone, rank and world.

    torchrun keeps one store for all attempts. Processes that it has started again would find there
    the addresses of those that died. So the first one names the group anew, and who is in it is
    known by what each has made up.

    Raises:
        RunError: Some did not come in time.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    mine, end = uuid.uuid4().hex, time.monotonic() + PATIENCE_S
    name, others = mine, range(1, world)
    if rank:
        store.set(f"mfmjt/{rank}", mine)
    missing = {rank} if rank else set(others)
    while missing:
        if rank and store.check(["mfmjt/group"]):
            name, members = json.loads(store.get("mfmjt/group"))
            if members.get(str(rank)) == mine:
                store.set(f"mfmjt/{name}/{rank}", "")
                break
        if not rank:
            known = {n: store.get(f"mfmjt/{n}") for n in others if store.check([f"mfmjt/{n}"])}
            members = {n: value.decode() for n, value in known.items()}
            store.set("mfmjt/group", json.dumps([mine, members]))
            missing = {n for n in missing if not store.check([f"mfmjt/{mine}/{n}"])}
        if time.monotonic() > end:
            raise RunError(
                f"Process {rank} waited {PATIENCE_S} s in vain for the others. Look at what they "
                "wrote, and whether all reach MASTER_ADDR."
            )
        time.sleep(0.02)
    return dist.PrefixStore(name, store), rank, world


def choose_parallel(how: str, processes: Processes, net: nn.Module) -> str:
    """Decide what `auto` means: DDP, and FSDP where training would fill half of the GPU.

    Returns:
        `none`, `ddp` or `fsdp`.

    Raises:
        InputError: Several processes and `none`, or one that torchrun did not start and the others.
    """
    if how == "none" and processes.world > 1:
        raise InputError(
            f"parallel=none and {processes.world} processes: each would train for itself. "
            "Give parallel=auto, or start one process."
        )
    if how in ("ddp", "fsdp") and not dist.is_initialized():
        raise InputError(
            f"parallel={how} needs processes that know of one another. Start with "
            "torchrun --nproc-per-node N -m mfmjt.train, or give parallel=auto."
        )
    if how != "auto":
        return how
    if processes.world == 1:
        return "none"
    if processes.device.type == "cuda":
        wanted = STATE_BYTES * sum(p.numel() for p in net.parameters() if p.requires_grad)
        if wanted > torch.cuda.get_device_properties(processes.device).total_memory / 2:
            return "fsdp"
    return "ddp"


def shard(net: nn.Module, processes: Processes, bf16: bool) -> None:
    """Spread a network's parameters over the processes, in place, a block at a time.

    Args:
        net: Its repeated blocks are the entries of its module lists.
        processes: Who holds them.
        bf16: Send the blocks' weights, which autocast would round anyway, in bfloat16. Gradients
            are reduced in fp32, and what a block is given stays what it is.

    Raises:
        InputError: This version of PyTorch cannot.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not torch.__version__ >= "2.13":
        raise InputError(
            f"parallel=fsdp needs torch 2.13: the hooks of {torch.__version__} refuse forward "
            "mode. Update torch, or give parallel=ddp."
        )
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    # It warns of operations in place on a block's results, of which we have none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    for blocks in [m for m in net.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the root keeps its gathered weights for a backward pass, also where none follows,
    # and a validation would leave those of the average in place.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def replicate(step: nn.Module) -> nn.Module:
    """Let every process compute the whole gradient of all: DDP around a module of one forward."""
    return nn.parallel.DistributedDataParallel(step, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which DDP leaves gradients unsynchronized unless `now`.

    FSDP reduces those of every pass: it is taken where whole gradients do not fit.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself; all of it, on every process, where FSDP has sharded it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
