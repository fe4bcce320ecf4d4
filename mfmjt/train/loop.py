"""Train the network on a feature store: MeanFlow, or plain flow matching with `ratio=0`.

Every draw of a step (clips, windows, latents, dropped conditions, times, noise) comes from one
generator seeded with (seed, step), and is the same on every process; with a GPU, clips and windows
come from one of the host's. A state is therefore only weights, averages, the optimiser and the
step, and on the CPU a run resumed by as many processes repeats an uninterrupted one bit for bit; by
another number, but for the order of sums.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from mfmjt import meanflow
from mfmjt.codec import NanoCodec
from mfmjt.cuda_graph import CapturedStep
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError, RunError, reason
from mfmjt.features.store import FeatureStore
from mfmjt.memory import keep_memory
from mfmjt.model import MFMJT
from mfmjt.model.lora import merged_state, save_adapter
from mfmjt.progress import ProgressBar
from mfmjt.train import distributed, preview
from mfmjt.train.config import NetworkTraining, as_json
from mfmjt.train.distributed import Processes
from mfmjt.train.ema import EMA
from mfmjt.train.log import TrainingLog
from mfmjt.train.sharded import CheckpointFolder
from mfmjt.train.start import starting_network
from mfmjt.train.step import Draws, Step, compile_step, draw

__all__ = ["TrainingResult", "lr_factor", "train"]

CHECKPOINTS = "checkpoints"
NETWORK, ADAPTER = "network.safetensors", "adapter.safetensors"
FIGURES = ("loss", "flow", "interval", "grad_norm")
FLOW_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_CLIPS = 40
PATIENCE = 50  # steps in a row that may be skipped before the run is given up


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended.

    Attributes:
        step: Optimiser steps done, earlier runs included.
        finished: Whether the recipe's end was reached; else the same call goes on.
        network: The exported network: the averaged weights so far.
        skipped: Steps left out because their loss or gradient was not finite.
        seconds: Training time, earlier runs included.
    """

    step: int
    finished: bool
    network: Path
    skipped: int
    seconds: float


def lr_factor(step: int, share: float, warmup: int, schedule: str) -> float:
    """Return the learning rate over its peak at `step`, when `share` of the run is done."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    if schedule == "constant":
        return rise
    fall = 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return rise * max(0.0, fall)


def train(config: NetworkTraining, stop_after: float | None = None) -> TrainingResult:
    """Train as `config` says, going on from the state in `config.out` where there is one.

    SIGTERM and Ctrl-C end the run after the present step with its state saved; a second Ctrl-C
    ends it at once. Whenever it ends, the averaged weights are written, in fp16, to
    `network.safetensors` in the folder.

    Under torchrun every process calls this; a signal to one of them ends all after the same step.

    Args:
        config: The recipe.
        stop_after: Stop after so many seconds, as a signal would; the same call then goes on.

    Raises:
        InputError: A missing store, a device that is not there, a state that is damaged or of
            another network, a batch that the processes cannot share.
        RunError: The loss has not been finite for many steps, or the state cannot be saved.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    with Processes(config.device) as processes:
        return _Run(config, processes).run(stop_after)


class _Part(NamedTuple):
    """What a pass works on: some rows of a batch.

    Attributes:
        features: Their latents and conditions.
        draws: What was drawn for them.
        rows: Their number.
        intervals: How many of them, the first, have r < t.
    """

    features: dict[str, Tensor]
    draws: Draws
    rows: int
    intervals: int


class _Batch(NamedTuple):
    """A process's share of a batch.

    Attributes:
        rows: Rows of the batch, of all processes.
        intervals: How many of them have r < t.
        parts: This process's, pass by pass.
    """

    rows: int
    intervals: int
    parts: tuple[_Part, ...]


class _Run:
    """The state of a training and what moves it."""

    def __init__(self, config: NetworkTraining, processes: Processes) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.out = Path(config.out)
        sources = [(source.store, source.weight) for source in config.data]
        sources = sources or [(config.store, 1.0)]
        self.store = FeatureStore(sources, "train", self.device)
        # Without validations and previews there need be no such clips.
        looks = config.validate_every or config.preview_every
        looked_at = FeatureStore(sources[0][0], "validation", self.device) if looks else self.store
        self.validation = looked_at
        self.null_text = self.store.null_text
        if config.encoders is not None and not self.store.has_text:
            encoders = NanoEncoders.load(config.encoders).eval()
            for store in (self.store, self.validation):
                store.encode_text(encoders)
            self.null_text = encoders.encode_text([""])[0]
        self.codec = NanoCodec.load(config.codec).eval() if config.codec else None

        self.net = self._network()
        self.net.recompute_blocks(config.checkpointing)
        how = distributed.choose_parallel(config.parallel, processes, self.net)
        for rows in (config.batch, config.full_batch) if config.full_every else (config.batch,):
            for ratio in (config.ratio, 0.0) if config.flow_steps else (config.ratio,):
                processes.check_rows(rows, round(ratio * rows), config.accumulate, how)
        if how == "fsdp":
            distributed.shard(self.net, processes, bf16=config.dtype == "bfloat16")
        step = Step(self.net, config)
        if config.compile:
            compile_step(step)
        self.model = distributed.replicate(step) if how == "ddp" else step
        if config.cuda_graph and (self.device.type != "cuda" or how != "none"):
            raise InputError(
                f"cuda_graph=true needs one process with a GPU; this is {processes.world} with "
                f"device={config.device}. Leave it out, or give device=cuda and one process."
            )

        self.names = [n for n, p in self.net.named_parameters() if p.requires_grad]
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.ema = EMA(self.params, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=config.cuda_graph,
        )
        if config.cuda_graph:
            # A number would be recorded; a place for one is read anew by every replay.
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=self.device)
        for p in self.params:
            # What it would make at its first step, made now, to have where to load a state to.
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.work: Callable[..., Tensor] = self._work
        if config.cuda_graph:
            self.work = CapturedStep(self._work, self.device, self.store.settle)
        self.generator, self.next = torch.Generator(self.device), torch.Generator()
        # Of a GPU's random numbers the host would have to wait to know what to read.
        self.chooser = self.generator if self.device.type == "cpu" else torch.Generator()
        self.step = self.skipped = self.in_a_row = 0
        self.elapsed = self.clock = 0.0
        self.stopped = self.ending = False
        self.end = math.inf
        self.began = time.monotonic()
        if processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints = CheckpointFolder(
            self.out / CHECKPOINTS, processes.group, processes.first
        )

    def _network(self) -> MFMJT:
        net = starting_network(self.config)
        self.notes = net.notes
        if self.config.init_from is None:
            with torch.no_grad():
                if self.null_text is not None:
                    net.empty_string_feat.copy_(self.null_text)
                net.latent_mean.copy_(self.store.latent_mean.view_as(net.latent_mean))
                net.latent_std.copy_(self.store.latent_std.view_as(net.latent_std))
        net = net.to(self.device).train()
        for store in (self.store, self.validation):
            # Copies: the network's own may be in shards later.
            store.latent_mean = net.latent_mean.detach().flatten().clone()
            store.latent_std = net.latent_std.detach().flatten().clone()
        return net

    # The loop

    def run(self, stop_after: float | None) -> TrainingResult:
        """Train to the end or until stopped."""
        config, first = self.config, self.processes.first
        resumed = self._resume()
        network = self.out / NETWORK
        if stop_after is not None:
            self.end = time.monotonic() + stop_after
        self.log = TrainingLog(self.out, self.step, config.tensorboard, first)
        about = {"step": self.step, "processes": self.processes.world, "config": as_json(config)}
        self.log.note(about | resumed)
        with (
            _stop_signals(self),
            self.log,
            ProgressBar(
                f"train {config.model}", config.steps, self.step, quiet=not first
            ) as self.progress,
        ):
            if resumed:
                self.progress.message(f"Going on from step {self.step} in {self.out}.")
            for text in () if resumed else self.notes:
                self.progress.message(f"Note: {text}")
            self._agreed(self.processes.sum(self._flags()))
            while not self._stops() and self.share() < 1:
                self._advance()
            finished = self.share() >= 1
            self._save()
            self.checkpoints.wait()
            self._export(network)
        return TrainingResult(self.step, finished, network, self.skipped, self.seconds())

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.elapsed + time.monotonic() - self.began

    def share(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further."""
        share = self.step / self.config.steps
        if self.config.max_minutes:
            share = max(share, self.clock / (60 * self.config.max_minutes))
        return share

    def _flags(self) -> Tensor:
        """What processes have to agree on beside a step: the time, and whether to stop.

        Clocks and signals differ between processes; whoever decided by their own would leave the
        others waiting.
        """
        stops = self.stopped or time.monotonic() >= self.end
        own = [float(stops), self.seconds() if self.processes.first else 0.0]
        # Filled where they are: a copy of numbers to a GPU is waited for.
        return torch.stack([torch.full((), n, dtype=torch.double, device=self.device) for n in own])

    def _agreed(self, flat: Tensor) -> list[float]:
        """The figures in front of summed-up flags; the one wait for the device in a step."""
        *values, ending, self.clock = flat.tolist()
        self.ending = ending > 0
        return values

    def _stops(self) -> bool:
        # One process need not ask the others, and a signal then waits for no further step.
        alone = self.processes.world == 1
        return self.ending or (alone and (self.stopped or time.monotonic() >= self.end))

    def _rows(self, step: int) -> tuple[int, int | None]:
        """How many clips a step takes, and windows of how many latents; None for whole clips."""
        config = self.config
        if config.full_every > 0 and (step + 1) % config.full_every == 0:
            return config.full_batch, None
        return config.batch, config.window or None

    def _advance(self) -> None:
        config = self.config
        rows, window = self._rows(self.step)
        factor = lr_factor(self.step, self.share(), config.warmup, config.schedule)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(config.lr * factor)
            else:
                group["lr"] = config.lr * factor
        batch = self._draw(rows, window)
        values = self._agreed(self.work(batch, self._flags()))
        figures = dict(zip(FIGURES, values, strict=True))
        if batch.intervals == batch.rows:
            figures["flow"] = math.nan
        if not batch.intervals:
            figures["interval"] = math.nan
        good = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        self.step += 1
        self._count_skipped(good)
        self.log.collect(figures, rows, good)
        if self.progress.due():
            note = f"loss {self.log.recent:.4f}, {self.log.clips_per_s():.0f} clips/s"
            self.progress.update(self.step, note, self.share())
        self.progress.done = self.step
        if self.step % config.log_every == 0:
            self.log.flush(self.step, config.lr * factor, self.skipped, self.seconds())
        last = self.share() >= 1
        if config.validate_every and (self.step % config.validate_every == 0 or last):
            self._validate()
        if config.preview_every and (self.step % config.preview_every == 0 or last):
            self._preview()
        if self.step % config.checkpoint_every == 0:
            self._save()

    def _draw(self, rows: int, window: int | None) -> _Batch:
        """Draw a batch and fetch this process's rows of it."""
        config, parts = self.config, self.config.accumulate
        for generator in (self.generator, self.chooser):
            generator.manual_seed((config.seed << 32) + self.step)
        intervals = 0 if self.step < config.flow_steps else round(config.ratio * rows)
        batch = draw(config, self.store, rows, window, intervals, self.generator, self.chooser)
        mine = []
        for part in range(parts):
            index = self.processes.rows(part, parts)
            draws = batch.rows(index)
            features = self.store.rows(draws.clips, draws.starts, draws.latent_noise)
            mine.append(
                _Part(features, draws, len(range(rows)[index]), len(range(intervals)[index]))
            )
        self._foretell()
        return _Batch(rows, intervals, tuple(mine))

    def _foretell(self) -> None:
        """Let the store read what the next step will draw while this one computes."""
        rows, window = self._rows(self.step + 1)
        self.next.manual_seed((self.config.seed << 32) + self.step + 1)
        clips, starts = self.store.choose(rows, window, self.next)
        for part in range(self.config.accumulate):
            index = self.processes.rows(part, self.config.accumulate)
            self.store.prefetch(clips[index], None if starts is None else starts[index], window)

    def _work(self, batch: _Batch, flags: Tensor) -> Tensor:
        """A step from drawn rows to new weights, of which nothing waits for the device.

        Returns:
            `FIGURES` and what processes agree on, summed up over them.
        """
        config, world, bf16 = self.config, self.processes.world, self.config.dtype == "bfloat16"
        self.optimizer.zero_grad(set_to_none=True)
        figures = [torch.zeros((), device=self.device) for _ in range(3)]
        for n, part in enumerate(batch.parts):
            with distributed.gradient_sync(self.model, n == len(batch.parts) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss, stats = self.model(part.features, part.draws, part.intervals)
                # The mean over these rows counts as much as they are of the batch; gradients are
                # then averaged over processes, not added up.
                weight = part.rows / batch.rows
                (loss * (weight * world)).backward()
            figures[0] += loss.detach() * weight
            if others := part.rows - part.intervals:
                figures[1] += stats.flow * (others / (batch.rows - batch.intervals))
            if part.intervals:
                figures[2] += stats.interval * (part.intervals / batch.intervals)
        norm = torch.nn.utils.clip_grad_norm_(self.params, config.clip or math.inf, foreach=True)
        figures.append(distributed.whole(norm) / world)  # the same everywhere, and added up
        flat = self.processes.sum(torch.cat((torch.stack(figures).double(), flags)))
        good = flat[0].isfinite() & flat[3].isfinite()
        # A batch that is not finite is left out where that is known: on the device.
        self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        self.optimizer.step()
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

    # Validation, previews

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The first average in place of the weights."""
        self.ema.swap()
        self.net.eval()
        try:
            yield
        finally:
            self.ema.swap()
            self.net.train()

    def _validate(self) -> None:
        """Log losses on fixed clips, times and noise: flow matching, and one MeanFlow step."""
        flow, mean, count = torch.zeros(len(FLOW_TIMES)), 0.0, 0
        clips = min(VALIDATION_CLIPS, len(self.validation))
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self._averaged():
            for rows in torch.arange(clips, device=self.device).split(self.config.full_batch):
                batch = self.validation.rows(rows)
                x, cond = batch.pop("latent"), batch
                noise = torch.empty_like(x).normal_(generator=generator)
                one, zero = torch.ones_like(x[:, 0, 0]), torch.zeros_like(x[:, 0, 0])
                with torch.no_grad():
                    for i, t in enumerate(FLOW_TIMES):
                        loss = self._fixed_loss(x, cond, noise, t * one, t * one)
                        flow[i] += float(loss) * len(rows)
                    mean += float(self._fixed_loss(x, cond, noise, zero, one)) * len(rows)
                count += len(rows)
        values = {f"flow_t{t}": float(v) / count for t, v in zip(FLOW_TIMES, flow, strict=True)}
        values = {"flow": float(flow.mean()) / count, "mean_r0_t1": mean / count} | values
        self.log.scalars("validation", self.step, values)
        self.progress.message(
            f"step {self.step}: validation flow {values['flow']:.4f}, "
            f"mean flow {values['mean_r0_t1']:.4f}"
        )

    def _fixed_loss(
        self, x: Tensor, cond: dict[str, Tensor], noise: Tensor, r: Tensor, t: Tensor
    ) -> Tensor:
        """Mean square of the objective at given draws, unweighted."""
        return meanflow.loss(self.net, x, cond, noise=noise, r=r, t=t, p=0.0)

    @torch.no_grad()
    def _preview(self) -> None:
        """Generate a few validation clips in one step; write them beside the decoded originals."""
        assert self.codec is not None  # the recipe was checked
        clips = torch.arange(min(self.config.preview_clips, len(self.validation)))
        batch = self.validation.rows(clips.to(self.device))
        x, cond = batch.pop("latent"), batch
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        noise = torch.empty_like(x).normal_(generator=generator)
        with self._averaged():
            made = meanflow.OneStep(self.net, guidance=1.5, compile=False)(noise, **cond)
        # The network has the same statistics, but in shards where it is sharded.
        mean, std = self.store.latent_mean, self.store.latent_std
        pair = [(latent * std + mean).cpu() for latent in (x, made)]
        if not self.processes.first:
            return
        real, fake = (self.codec.decode(latent) for latent in pair)
        folder = self.out / "previews"
        folder.mkdir(exist_ok=True)
        rate = self.codec.sample_rate
        for i in range(len(clips)):
            preview.save_wav(folder / f"clip{i}_step{self.step:07d}.wav", fake[i], rate)
            preview.save_wav(folder / f"clip{i}_real.wav", real[i], rate)
            self.log.audio(f"one_step/{i}", self.step, fake[i], rate)
        rows = [(self.validation.captions[i], [real[i], fake[i]]) for i in range(len(clips))]
        preview.save_spectrograms(
            folder / f"step{self.step:07d}.png", rows, ["real, through the codec", "one step"], rate
        )

    # State

    def _tensors(self) -> dict[str, Tensor]:
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
            "config": as_json(self.config),
        }
        self.checkpoints.save(self.step, self._tensors(), state)

    def _resume(self) -> dict[str, Any]:
        """Take up the saved state, if any; return what the recipe has changed since."""
        path = self.checkpoints.find(self.config.resume)
        if path is None:
            return {}
        state = self.checkpoints.read(path)
        mine, theirs = as_json(self.config), state["config"]
        changed = {k: [theirs.get(k), v] for k, v in mine.items() if theirs.get(k) != v}
        for key in ("model", "overrides", "ema", "lora"):
            if key in changed:
                raise InputError(
                    f"{path} was trained with {key}={changed[key][0]}, not {changed[key][1]}. "
                    "Give another out=, or the same setting."
                )
        self.checkpoints.load(path, self._tensors(), state["step"])
        self.ema.updates = state["updates"]
        for slots in self.optimizer.state.values():
            slots["step"].fill_(state["updates"])
        self.step, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.elapsed = state["seconds"]
        return {"resumed": True, "changed": changed}

    def _export(self, path: Path) -> None:
        with self._averaged():
            # Every process helps to put the shards together.
            state = {k: distributed.whole(v) for k, v in self.net.state_dict().items()}
            if self.processes.first:
                lora = self.config.lora
                with torch.device("meta"):
                    net = MFMJT(self.net.config)
                net.load_state_dict(merged_state(state, lora) if lora else state, assign=True)
                try:
                    net.save(path, torch.float16)
                    if lora:
                        save_adapter(state, lora, path.parent / ADAPTER)
                except (OSError, SafetensorError) as error:
                    raise RunError(
                        f"Cannot write {path}: {reason(error)}. The training state is saved: make "
                        "room, and the same command writes it."
                    ) from error
        self.progress.message(f"Wrote {path}.")


@contextmanager
def _stop_signals(run: _Run) -> Iterator[None]:
    """Let SIGTERM and the first Ctrl-C stop the run after the present step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if run.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopped = True

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
