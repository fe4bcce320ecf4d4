"""What the trainings of the codec and of the encoders share: schedule, log, checkpoint, resume."""

from __future__ import annotations

import contextlib
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
from mfmjt.progress import ProgressBar
from mfmjt.train.checkpoint import load_optimizer, load_state, optimizer_tensors, save_state
from mfmjt.train.ema import EMA

__all__ = ["Log", "Trainer", "cosine_warmup", "render_array"]


def cosine_warmup(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear up over `warmup` steps, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Log:
    """Losses and figures as JSON lines.

    Args:
        path: The `.jsonl` file.
        keep: Steps already done; later lines of an interrupted run are dropped.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.began = time.monotonic()
        lines = path.read_text().splitlines() if keep and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= keep]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> str:
        """Append one record, `kind` `"train"` or `"validation"`; return its figures as text."""
        seconds = round(time.monotonic() - self.began, 1)
        figures = {name: round(value, 5) for name, value in values.items()}
        with self.path.open("a") as file:
            record = {"step": step, "kind": kind, "seconds": seconds} | figures
            file.write(json.dumps(record) + "\n")
        return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Trainer:
    """The step around a loss: AdamW, schedule, clipping, average, log, checkpoint, exact resume.

    Every draw of a step comes from generators seeded by `(seed, step)`, so that a resumed run
    repeats an uninterrupted one exactly and a checkpoint needs no generator state.

    Args:
        module: What is trained.
        out: Folder of `log.jsonl` and `checkpoint.safetensors`.
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
        self.checkpoint = out / "checkpoint.safetensors"
        self.names = [name for name, _ in module.named_parameters()]
        self.ema = EMA(list(module.parameters()), (decay,))
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98))
        self.step = 0
        if resume and self.checkpoint.exists():
            self._load()
        self.log = Log(out / "log.jsonl", self.step)

    def _load(self) -> None:
        tensors, state = load_state(self.checkpoint)
        try:
            with torch.no_grad():
                for (name, weight), average in zip(
                    self.module.named_parameters(), self.ema.averages[0], strict=True
                ):
                    weight.copy_(tensors[f"weight.{name}"])
                    average.copy_(tensors[f"average.{name}"])
            load_optimizer(self.optimiser, self.names, tensors)
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"Cannot resume from {self.checkpoint}: it is a checkpoint of another model. "
                "Choose another folder or start without resuming."
            ) from error
        self.step = self.ema.updates = int(state["step"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = optimizer_tensors(self.optimiser, self.names)
        weights = self.module.named_parameters()
        for (name, weight), average in zip(weights, self.ema.averages[0], strict=True):
            tensors |= {f"weight.{name}": weight, f"average.{name}": average}
        save_state(self.checkpoint, tensors, {"step": self.step})

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the module has its averaged weights and is in evaluation mode."""
        self.ema.swap()
        self.module.eval()
        try:
            yield
        finally:
            self.ema.swap()

    def run(
        self,
        title: str,
        loss: Callable[[np.random.Generator, torch.Generator], dict[str, Tensor]],
        validate: Callable[[], dict[str, float]],
        *,
        log_every: int,
        save_every: int,
    ) -> None:
        """Train to the last step.

        Args:
            title: What to call the run on the screen.
            loss: Draws a batch and returns named terms; `"loss"` is the one to descend.
            validate: Figures on validation data; called while the module has its averaged weights.
            log_every: Steps between lines of the log.
            save_every: Steps between checkpoints, each with a validation.

        Raises:
            RunError: The gradient is no longer finite.
        """
        recent: list[dict[str, float]] = []
        with ProgressBar(title, self.steps, self.step) as progress:
            while self.step < self.steps:
                terms = self._advance(loss)
                recent.append(terms)
                progress.update(self.step, f"loss {terms['loss']:.3g},")
                last = self.step == self.steps
                if self.step % log_every == 0 or last:
                    means = {k: sum(row[k] for row in recent) / len(recent) for k in terms}
                    self.log.write(self.step, "train", means)
                    recent = []
                if self.step % save_every == 0 or last:
                    with self.averaged():
                        figures = self.log.write(self.step, "validation", validate())
                    progress.message(f"{title} {self.step}: {figures}")
                    self.save()

    def _advance(
        self, loss: Callable[[np.random.Generator, torch.Generator], dict[str, Tensor]]
    ) -> dict[str, float]:
        """One optimiser step; the value of each term."""
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
        self.ema.update()
        self.step += 1
        return {name: float(value.detach()) for name, value in terms.items()}


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
