"""What the trainings on the procedural set share: settings, schedule, and what is rendered once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mfmjt.files import atomic_path
from mfmjt.kernels import precision
from mfmjt.train import optim
from mfmjt.train.recipe import Loop
from mfmjt.train.trainer import Batch, Pass, Task

__all__ = ["ProceduralTask", "ProceduralTraining", "render_array", "whole_batch"]


@dataclass(frozen=True)
class ProceduralTraining:
    """Settings of a training on procedural clips.

    Attributes:
        out: Folder of the log, the training states, what is rendered and what is exported.
        steps: Optimizer steps.
        batch: Clips per step.
        lr: Peak learning rate.
        warmup: Steps to reach it.
        ema: Decay of the averaged weights, which are the ones exported.
        clips: Training clips rendered.
        validation_clips: Validation clips.
        seed: Of the data and of every draw.
        workers: Processes that render; 0 renders in this one.
        threads: Of PyTorch; 0 leaves its default.
        bf16: Run the networks (not the spectra) in bfloat16, if the CPU has instructions for it.
        resume: Continue from the newest state in `out`.
        log_every: Steps between records in the log.
        save_every: Steps between training states and validations.
    """

    out: Path = Path("output")
    steps: int = 1000
    batch: int = 8
    lr: float = 1.5e-3
    warmup: int = 100
    ema: float = 0.995
    clips: int = 1000
    validation_clips: int = 48
    seed: int = 0
    workers: int = 2
    threads: int = 0
    bf16: bool = True
    resume: bool = True
    log_every: int = 25
    save_every: int = 250

    def loop(self) -> Loop:
        """Return the settings of the loop."""
        return Loop(
            out=str(self.out),
            threads=self.threads,
            resume="latest" if self.resume else None,
            steps=self.steps,
            lr=self.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup=self.warmup,
            ema=(self.ema,),
            log_every=self.log_every,
            checkpoint_every=self.save_every,
            validate_every=self.save_every,
            tensorboard=False,
        )


class ProceduralTask(Task):
    """A training on procedural clips.

    Args:
        recipe: Its settings.
        net: What is trained.

    Attributes:
        bf16: Whether the networks run in bfloat16.
    """

    def __init__(self, recipe: ProceduralTraining, net: nn.Module) -> None:
        super().__init__(recipe, recipe.loop(), net)
        self.bf16 = recipe.bf16 and torch.bfloat16 not in precision.SLOW
        if recipe.bf16 and not self.bf16:
            self.notes = ("This CPU has no instructions for bfloat16: training in float32.",)

    def rate(self, step: int, share: float) -> float:
        """Fall from the end of the warm-up on, to 2 %."""
        warmup, steps = self.loop.warmup, self.loop.steps
        done = max(0, step - warmup) / max(1, steps - warmup)
        return optim.schedule(step, done, warmup, "cosine", floor=0.02)

    def generators(self, step: int) -> tuple[np.random.Generator, torch.Generator]:
        """Return the sources of every draw of a step."""
        rng = np.random.default_rng([self.recipe.seed, step])
        return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def whole_batch(rows: int, figures: tuple[str, ...], *inputs: Any) -> Batch:
    """Return a batch of one pass."""
    return Batch(rows, figures, (Pass(inputs, dict.fromkeys(figures, 1.0)),))


def render_array(
    path: Path | None,
    count: int,
    shape: tuple[int, ...],
    dtype: str,
    render: Callable[[int], np.ndarray[Any, Any]],
    workers: int,
) -> np.ndarray[Any, Any]:
    """Return `count` rendered items in one array, made once and kept on disk.

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
