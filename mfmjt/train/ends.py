"""What the trainings of the codec and of the encoders share: averaging, schedule, log, resume."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path

__all__ = ["Average", "Log", "Trainer", "cosine_warmup", "render_array"]


def cosine_warmup(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear up over `warmup` steps, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Average:
    """Exponential moving average of a module's parameters, short-sighted at first.

    Args:
        module: The module being trained; its copy is `Average.module`.
        decay: Weight of the past once warmed up; before that `(1 + n) / (10 + n)`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in module.parameters()], weight)


class Log:
    """Losses as JSON lines in a file, and as plain text on the screen.

    Args:
        path: The `.jsonl` file.
        steps: Length of the run, for the estimate of the time left.
        keep: Steps already done; later lines of an interrupted run are dropped.
    """

    def __init__(self, path: Path, steps: int, keep: int) -> None:
        self.path, self.steps = path, steps
        self.first, self.began = keep, time.monotonic()
        lines = path.read_text().splitlines() if keep and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= keep]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append one record; `kind` is `"train"` or `"validation"`."""
        seconds = time.monotonic() - self.began
        record = {"step": step, "kind": kind, "seconds": round(seconds, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(record | {k: round(v, 5) for k, v in values.items()}) + "\n")
        left = seconds / max(1, step - self.first) * (self.steps - step)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{step}/{self.steps}  {kind}  {figures}  left {left:.0f} s", flush=True)  # noqa: T201


class Trainer:
    """The step around a loss: AdamW, schedule, clipping, average, log, checkpoint, exact resume.

    Every draw of a step comes from generators seeded by `(seed, step)`, so that a resumed run
    repeats an uninterrupted one exactly and a checkpoint needs no generator state.

    Args:
        module: What is trained.
        out: Folder of `log.jsonl` and `checkpoint.pt`.
        steps: Optimiser steps of the whole run.
        lr: Peak learning rate.
        warmup: Steps to reach it.
        decay: Of the moving average.
        seed: Of every draw.
        resume: Continue from the checkpoint in `out` if there is one.

    Raises:
        InputError: The checkpoint in `out` is not of this run.
    """

    def __init__(
        self,
        module: nn.Module,
        out: Path,
        *,
        steps: int,
        lr: float,
        warmup: int,
        decay: float,
        seed: int,
        resume: bool,
    ) -> None:
        self.module, self.steps, self.lr, self.warmup, self.seed = module, steps, lr, warmup, seed
        out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = out / "checkpoint.pt"
        self.average = Average(module, decay)
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
        self.step = 0
        if resume and self.checkpoint.exists():
            self._load()
        self.log = Log(out / "log.jsonl", steps, self.step)

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.module.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.updates = self.step = int(state["step"])
        except (KeyError, RuntimeError, ValueError, EOFError) as error:
            raise InputError(
                f"Cannot resume from {self.checkpoint}: it is not a checkpoint of this model. "
                "Choose another folder or start without resuming."
            ) from error

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        with atomic_path(self.checkpoint) as path:
            torch.save(state, path)

    def run(
        self,
        loss: Callable[[np.random.Generator, torch.Generator], dict[str, Tensor]],
        validate: Callable[[nn.Module], dict[str, float]],
        *,
        log_every: int,
        save_every: int,
    ) -> None:
        """Train to the last step.

        Args:
            loss: Draws a batch and returns named terms; `"loss"` is the one to descend.
            validate: Figures of a module on validation data; given the averaged one.
            log_every: Steps between lines of the log.
            save_every: Steps between checkpoints, each with a validation.

        Raises:
            RunError: The loss is no longer finite.
        """
        sums: dict[str, float] = {}
        count = 0
        while self.step < self.steps:
            rng = np.random.default_rng([self.seed, self.step])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            for group in self.optimiser.param_groups:
                group["lr"] = self.lr * cosine_warmup(self.step, self.steps, self.warmup)
            self.module.train()
            terms = loss(rng, generator)
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            if not math.isfinite(float(norm)):
                raise RunError(
                    f"Training diverged at step {self.step}: the gradient is not finite. "
                    "Resume from the last checkpoint with a lower learning rate."
                )
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.average.update(self.module)
            self.step += 1
            count += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            if self.step % log_every == 0 or self.step == self.steps:
                self.log.write(self.step, "train", {k: v / count for k, v in sums.items()})
                sums, count = {}, 0
            if self.step % save_every == 0 or self.step == self.steps:
                self.log.write(self.step, "validation", validate(self.average.module))
                self.save()


def render_array(
    path: Path | None,
    count: int,
    shape: tuple[int, ...],
    dtype: str,
    render: Callable[[int], np.ndarray[Any, Any]],
    workers: int,
) -> np.ndarray[Any, Any]:
    """`count` rendered items in one array, made once and kept on disk.

    Args:
        path: `.npy` file, reused if it has the right shape; None renders into memory.
        count: Number of items.
        shape: Shape of one.
        dtype: NumPy dtype name.
        render: Item from its index; a top-level function or a partial of one.
        workers: Processes; 0 or 1 renders in this one.

    Returns:
        `(count, *shape)`; memory-mapped if on disk.
    """
    whole = (count, *shape)
    if path is not None and path.exists():
        kept: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
        if kept.shape == whole and kept.dtype == np.dtype(dtype):
            return kept

    def fill(array: np.ndarray[Any, Any]) -> None:
        for index, item in enumerate(_rendered(count, render, workers)):
            array[index] = item

    if path is None:
        array = np.empty(whole, dtype)
        fill(array)
        return array
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=whole)
        fill(mapped)
        mapped.flush()
    return np.load(path, mmap_mode="r")


def _rendered(
    count: int, render: Callable[[int], np.ndarray[Any, Any]], workers: int
) -> Iterator[np.ndarray[Any, Any]]:
    if workers <= 1:
        yield from map(render, range(count))
        return
    # Spawned rather than forked: a fork after torch has started its threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(render, range(count), chunksize=8)
