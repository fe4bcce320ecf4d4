"""The training loop: draw, loss, backward, clip, step, average, log, save, resume, export.

What is trained is a `Task`: it draws a step's batch, computes the loss of a part of it, validates
and exports. Everything that chance decides in a step depends on the recipe and the number of the
step alone. A state is therefore only weights, averages, the optimizer and the step, and on the CPU
a run resumed by as many processes repeats an uninterrupted one bit for bit; by another number, but
for the order of sums.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfmjt.cuda_graph import CapturedStep
from mfmjt.errors import InputError, RunError
from mfmjt.memory import keep_memory
from mfmjt.progress import ProgressBar
from mfmjt.train import optim, parallel
from mfmjt.train.checkpoint import CheckpointFolder
from mfmjt.train.log import TrainingLog
from mfmjt.train.optim import EMA
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import Loop, as_json

__all__ = ["Batch", "Pass", "Task", "Trainer", "TrainingResult", "train"]

CHECKPOINTS = "checkpoints"
FIXED = ("model", "overrides", "ema", "lora", "train_encoder")
"""Settings that a state cannot be taken up with another value of."""
PATIENCE = 50  # steps in a row that may be skipped before the run is given up


class Pass(NamedTuple):
    """What one forward pass works on.

    Attributes:
        inputs: Arguments of `Task.loss`.
        weights: How much each figure of these rows counts in the mean over the batch, by its name;
            a figure of which they have no rows is absent.
    """

    inputs: tuple[Any, ...]
    weights: dict[str, float]


class Batch(NamedTuple):
    """This process's share of a batch.

    Attributes:
        rows: Rows of the batch, of all processes.
        figures: Names of what is measured on it, `loss` first.
        passes: What this process computes of it, one after the other.
    """

    rows: int
    figures: tuple[str, ...]
    passes: tuple[Pass, ...]


class Task(ABC):
    """What is trained; a subclass says how.

    Args:
        recipe: All settings, a dataclass: they are logged, and kept in every state.
        loop: Those of the loop.
        net: What is trained: its parameters are stepped and averaged, all of it is saved.

    Attributes:
        title: What to call the training on the screen.
        fused: Whether AdamW is PyTorch's fused one, which skips a step without asking the host.
        model: The module around one forward pass, which DDP wraps.
        notes: What the user should know before the first step.
    """

    title = ""
    fused = False

    def __init__(self, recipe: Any, loop: Loop, net: nn.Module) -> None:
        self.recipe, self.loop, self.net = recipe, loop, net
        self.model: nn.Module = net
        self.notes: tuple[str, ...] = ()

    def rate(self, step: int, share: float) -> float:
        """Return the learning rate over its peak at `step`, when `share` of the run is done."""
        return optim.schedule(step, share, self.loop.warmup, self.loop.schedule)

    @abstractmethod
    def draw(self, step: int) -> Batch:
        """Draw the batch of a step, and fetch this process's rows of it."""

    @abstractmethod
    def loss(self, *inputs: Any) -> Mapping[str, Tensor]:
        """Return the figures of one pass, scalars by name; `loss` is the one to descend."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return figures on validation data; the net has its averaged weights and is in `eval`."""

    def preview(self, step: int, log: TrainingLog) -> None:  # noqa: B027
        """Show what the net makes of validation data; it is as for `validate`."""

    @abstractmethod
    def export(self) -> Path:
        """Write the net, which is as for `validate`; return the file. Every process calls this."""

    def settle(self) -> None:  # noqa: B027
        """Wait until no thread of the task uses the GPU."""


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended.

    Attributes:
        step: Optimizer steps done, earlier runs included.
        finished: Whether the recipe's end was reached; else the same call goes on.
        file: What was exported: the averaged weights so far.
        skipped: Steps left out because their loss or gradient was not finite.
        seconds: Training time, earlier runs included.
    """

    step: int
    finished: bool
    file: Path
    skipped: int
    seconds: float

    def __str__(self) -> str:
        skipped = f" ({self.skipped} steps were not finite)" if self.skipped else ""
        if self.finished:
            return f"Trained {self.step} steps{skipped}. Wrote {self.file}."
        return f"Stopped at step {self.step}{skipped}. The same command goes on from there."


def train(
    loop: Loop, make: Callable[[Processes], Task], stop_after: float | None = None
) -> TrainingResult:
    """Train what `make` returns, going on from the state in `loop.out` where there is one.

    SIGTERM and Ctrl-C end the run after the present step with its state saved; a second Ctrl-C
    ends it at once. Whenever it ends, the averaged weights are exported.

    Under torchrun every process calls this; a signal to one of them ends all after the same step.

    Args:
        loop: The settings of the loop.
        make: Makes the task, once the processes know of one another.
        stop_after: Stop after so many seconds, as a signal would; the same call then goes on.

    Raises:
        InputError: A device that is not there, a state that is damaged or of another net; what
            `make` raises.
        RunError: The loss has not been finite for many steps, or the state cannot be saved.
    """
    if loop.threads:
        torch.set_num_threads(loop.threads)
    keep_memory()
    with Processes(loop.device) as processes:
        return Trainer(make(processes), processes).run(stop_after)


class Trainer:
    """The state of a training and what moves it."""

    def __init__(self, task: Task, processes: Processes) -> None:
        self.task, self.loop, self.net = task, task.loop, task.net.train()
        self.processes, self.device = processes, processes.device
        self.names = [n for n, p in self.net.named_parameters() if p.requires_grad]
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.ema = EMA(self.params, self.loop.ema)
        self.optimizer = optim.adamw(self.params, self.loop, task.fused)
        self.work: Callable[..., Tensor] = self._work
        if self.loop.cuda_graph:
            self.work = CapturedStep(self._work, self.device, task.settle)
        self.step = self.skipped = self.in_a_row = 0
        self.elapsed = self.clock = 0.0
        self.stopped = self.ending = False
        self.end = math.inf
        self.began = time.monotonic()
        self.out = Path(self.loop.out)
        if processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints = CheckpointFolder(
            self.out / CHECKPOINTS, processes.group, processes.first
        )

    def run(self, stop_after: float | None = None) -> TrainingResult:
        """Train to the end or until stopped."""
        loop, first = self.loop, self.processes.first
        resumed = self._resume()
        if stop_after is not None:
            self.end = time.monotonic() + stop_after
        self.log = TrainingLog(self.out, self.step, loop.tensorboard, first)
        recipe = as_json(self.task.recipe)
        about = {"step": self.step, "processes": self.processes.world, "config": recipe}
        self.log.note(about | resumed)
        with (
            _stop_signals(self),
            self.log,
            ProgressBar(self.task.title, loop.steps, self.step, quiet=not first) as self.progress,
        ):
            if resumed:
                self.progress.message(f"Going on from step {self.step} in {self.out}.")
            for text in () if resumed else self.task.notes:
                self.progress.message(f"Note: {text}")
            self._agreed(self.processes.sum(self._flags()))
            while not self._stops() and self.share() < 1:
                self._advance()
            finished = self.share() >= 1
            self._save()
            self.checkpoints.wait()
            with self.averaged():
                file = self.task.export()
            self.progress.message(f"Wrote {file}.")
        return TrainingResult(self.step, finished, file, self.skipped, self.seconds())

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.elapsed + time.monotonic() - self.began

    def share(self) -> float:
        """Return how much of the run is done, by steps or by time, whichever is further."""
        share = self.step / self.loop.steps
        if self.loop.max_minutes:
            share = max(share, self.clock / (60 * self.loop.max_minutes))
        return share

    def _flags(self) -> Tensor:
        """Return what processes have to agree on beside a step: the time, and whether to stop.

        Clocks and signals differ between processes; whoever decided by their own would leave the
        others waiting.
        """
        stops = self.stopped or time.monotonic() >= self.end
        own = [float(stops), self.seconds() if self.processes.first else 0.0]
        # Filled where they are: a copy of numbers to a GPU is waited for.
        return torch.stack([torch.full((), n, dtype=torch.double, device=self.device) for n in own])

    def _agreed(self, flat: Tensor) -> list[float]:
        """Return the figures in front of summed-up flags; the one wait for the device in a step."""
        *values, ending, self.clock = flat.tolist()
        self.ending = ending > 0
        return values

    def _stops(self) -> bool:
        # One process need not ask the others, and a signal then waits for no further step.
        alone = self.processes.world == 1
        return self.ending or (alone and (self.stopped or time.monotonic() >= self.end))

    def _advance(self) -> None:
        """Make one step, and what is due after it."""
        loop = self.loop
        lr = loop.lr * self.task.rate(self.step, self.share())
        optim.set_lr(self.optimizer, lr)
        batch = self.task.draw(self.step)
        values = self._agreed(self.work(batch, self._flags()))
        figures = dict(zip((*batch.figures, "grad_norm"), values, strict=True))
        good = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        self.step += 1
        self._count_skipped(good)
        self.log.collect(figures, batch.rows, good)
        if self.progress.due():
            note = f"loss {self.log.recent:.4f}, {self.log.clips_per_s():.0f} clips/s"
            self.progress.update(self.step, note, self.share())
        self.progress.done = self.step
        last = self.share() >= 1
        if self.step % loop.log_every == 0 or last:
            self.log.flush(self.step, lr, self.skipped, self.seconds())
        if loop.validate_every and (self.step % loop.validate_every == 0 or last):
            with self.averaged():
                found = self.task.validate()
            self.log.scalars("validation", self.step, found)
            text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            self.progress.message(f"step {self.step}: validation {text}")
        if loop.preview_every and (self.step % loop.preview_every == 0 or last):
            with self.averaged():
                self.task.preview(self.step, self.log)
        if self.step % loop.checkpoint_every == 0:
            self._save()

    def _work(self, batch: Batch, flags: Tensor) -> Tensor:
        """Make a step from a drawn batch to new weights, of which nothing waits for the device.

        Returns:
            The figures, the norm of the gradient and the flags, summed up over processes.
        """
        world = self.processes.world
        self.optimizer.zero_grad(set_to_none=True)
        figures = {name: torch.zeros((), device=self.device) for name in batch.figures}
        for n, given in enumerate(batch.passes):
            with parallel.gradient_sync(self.task.model, n == len(batch.passes) - 1):
                terms = self.task.loss(*given.inputs)
                # The mean over these rows counts as much as they are of the batch; gradients are
                # then averaged over processes, not added up.
                (terms["loss"] * (given.weights["loss"] * world)).backward()
            for name, weight in given.weights.items():
                figures[name] += terms[name].detach() * weight
        norm = nn.utils.clip_grad_norm_(self.params, self.loop.clip or math.inf, foreach=True)
        norm = parallel.whole(norm) / world  # the same everywhere, and added up
        values = torch.stack([*figures.values(), norm]).double()
        flat = self.processes.sum(torch.cat((values, flags)))
        good = flat[0].isfinite() & flat[len(figures)].isfinite()
        optim.step_where(self.optimizer, good)
        self.ema.update(good)
        return flat

    def _count_skipped(self, good: bool) -> None:
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        if not good and self.in_a_row == 1:
            self.progress.message(f"Step {self.step}: the loss is not finite; step skipped.")
        if self.in_a_row >= PATIENCE:
            raise RunError(
                f"The loss has not been finite for {PATIENCE} steps, at step {self.step}. "
                "Resume from the last state with a lower lr=, or begin again with more warmup=."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the net has its averaged weights, if any, and is in evaluation mode."""
        self.ema.swap()
        self.net.eval()
        try:
            yield
        finally:
            self.ema.swap()
            self.net.train()

    # State

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, or this process's shards of it."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for name, p in zip(self.names, self.params, strict=True):
            for slot in ("exp_avg", "exp_avg_sq"):
                tensors[f"{slot}.{name}"] = self.optimizer.state[p][slot]
        for k, average in enumerate(self.ema.averages):
            tensors |= {f"ema{k}.{n}": a for n, a in zip(self.names, average, strict=True)}
        return tensors

    def _save(self) -> None:
        """Begin to write the state, unless it is on disk."""
        if self.checkpoints.step == self.step:
            return
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "updates": self.ema.updates,
            "seconds": self.seconds(),
            "processes": self.processes.world,
            "config": as_json(self.task.recipe),
        }
        self.checkpoints.save(self.step, self.tensors(), state)

    def _resume(self) -> dict[str, Any]:
        """Take up the saved state, if any; return what the recipe has changed since."""
        path = self.checkpoints.find(self.loop.resume) if self.loop.resume else None
        if path is None:
            return {}
        state = self.checkpoints.read(path)
        mine, theirs = as_json(self.task.recipe), state["config"]
        changed = {k: [theirs.get(k), v] for k, v in mine.items() if theirs.get(k) != v}
        for key in FIXED:
            if key in changed:
                raise InputError(
                    f"{path} was trained with {key}={changed[key][0]}, not {changed[key][1]}. "
                    "Give another out=, or the same setting."
                )
        self.checkpoints.load(path, self.tensors(), state["step"])
        self.ema.updates = state["updates"]
        for slots in self.optimizer.state.values():
            slots["step"].fill_(state["updates"])
        self.step, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.elapsed = state["seconds"]
        return {"resumed": True, "changed": changed}


@contextmanager
def _stop_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM and the first Ctrl-C stop the run after the present step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if trainer.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stopped = True

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
