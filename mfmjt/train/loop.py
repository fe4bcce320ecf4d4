"""Train the network on a feature store: MeanFlow, or plain flow matching with `ratio=0`.

Every draw of a step (clips, windows, latents, dropped conditions, times, noise) comes from one
generator seeded with (seed, step). A state is therefore only weights, averages, the optimiser and
the step, and on the CPU a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt import meanflow
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError, RunError
from mfmjt.files import atomic_path
from mfmjt.model import MFMJT
from mfmjt.train import preview
from mfmjt.train.checkpoint import load_optimizer, load_state, optimizer_tensors, save_state
from mfmjt.train.config import NetworkTraining, as_json
from mfmjt.train.ema import EMA
from mfmjt.train.memory import keep_memory
from mfmjt.train.progress import Progress
from mfmjt.train.store import FeatureStore

__all__ = ["TrainingResult", "lr_factor", "train"]

STATE = "state.safetensors"
NETWORK = "network.safetensors"
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

    Args:
        config: The recipe.
        stop_after: Stop after so many seconds, as a signal would; the same call then goes on.

    Raises:
        InputError: A missing store, a device that is not there, a state of another network.
        RunError: The loss has not been finite for many steps.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    return _Run(config).run(stop_after)


class _Run:
    """The state of a training and what moves it."""

    def __init__(self, config: NetworkTraining) -> None:
        self.config = config
        self.out = Path(config.out)
        try:
            self.device = torch.device(config.device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device={config.device} cannot be used: {error}. Try device=cpu."
            ) from error
        self.store = FeatureStore(config.store, "train", self.device)
        self.validation = FeatureStore(config.store, "validation", self.device)
        self.validation.latent_mean = self.store.latent_mean
        self.validation.latent_std = self.store.latent_std
        self.encoders = NanoEncoders.load(config.encoders).eval()
        self.store.encode_text(self.encoders)
        self.validation.encode_text(self.encoders)
        self.codec = NanoCodec.load(config.codec).eval()

        self.net = self._network()
        self.names = [n for n, p in self.net.named_parameters() if p.requires_grad]
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.ema = EMA(self.params, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator(self.device)
        self.sampler = meanflow.logit_normal(config.time_mean, config.time_std)
        self.step = self.skipped = self.in_a_row = 0
        self.elapsed = 0.0
        self.stopped = False
        self.began = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)

    def _network(self) -> MFMJT:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = MFMJT.from_config(config.model, **config.overrides)
        if config.init_from is not None:
            start = MFMJT.load(config.init_from)
            if start.config != net.config:
                raise InputError(
                    f"init_from={config.init_from} is another network ({start.config.name}) than "
                    f"model={config.model} with these overrides. Give a network of the same sizes."
                )
            net.load_state_dict(start.state_dict())
        with torch.no_grad():
            net.empty_string_feat.copy_(self.encoders.encode_text([""])[0])
            net.latent_mean.copy_(self.store.latent_mean.view_as(net.latent_mean))
            net.latent_std.copy_(self.store.latent_std.view_as(net.latent_std))
        return net.to(self.device).train()

    # The loop

    def run(self, stop_after: float | None) -> TrainingResult:
        """Train to the end or until stopped."""
        config = self.config
        resumed = self._resume()
        network = self.out / NETWORK
        end = math.inf if stop_after is None else time.monotonic() + stop_after
        self.log = _Log(self.out, self.step, config.tensorboard)
        self.log.note({"step": self.step, "config": as_json(config)} | resumed)
        title = f"train {config.model}"
        with (
            _stop_signals(self),
            self.log,
            Progress(title, config.steps, self.step) as self.progress,
        ):
            if resumed:
                self.progress.message(f"Going on from step {self.step} in {self.out}.")
            while not self.stopped and self.share() < 1 and time.monotonic() < end:
                self._advance()
            finished = self.share() >= 1
            self._save()
            self._export(network)
        return TrainingResult(self.step, finished, network, self.skipped, self.seconds())

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.elapsed + time.monotonic() - self.began

    def share(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further."""
        share = self.step / self.config.steps
        if self.config.max_minutes:
            share = max(share, self.seconds() / (60 * self.config.max_minutes))
        return share

    def _advance(self) -> None:
        config = self.config
        whole = config.full_every > 0 and (self.step + 1) % config.full_every == 0
        rows, window = (config.full_batch, None) if whole else (config.batch, config.window)
        factor = lr_factor(self.step, self.share(), config.warmup, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        figures = self._backward(rows, window)
        good = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        if good:
            self.optimizer.step()
            self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
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

    def _backward(self, rows: int, window: int | None) -> dict[str, float]:
        """Draw a batch, compute the loss and its gradients; return what is logged of them."""
        config, generator = self.config, self.generator
        generator.manual_seed((config.seed << 32) + self.step)
        batch = self.store.draw(rows, window, generator)
        x, cond = batch.pop("latent"), batch
        keep = torch.rand(3, rows, generator=generator, device=self.device) >= torch.tensor(
            [[config.drop_video], [config.drop_text], [config.drop_all]], device=self.device
        )
        cond["video_mask"], cond["text_mask"] = keep[0] & keep[2], keep[1] & keep[2]
        ratio = 0.0 if self.step < config.flow_steps else config.ratio
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss, stats = self._loss(x, cond, *self._times(rows, ratio))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, config.clip or math.inf, foreach=True)
        values = torch.stack((loss.detach(), *stats, norm)).tolist()  # one wait for the device
        return dict(zip(("loss", "flow", "interval", "grad_norm"), values, strict=True))

    def _times(self, rows: int, ratio: float) -> tuple[Tensor, Tensor]:
        """Draw r and t (B,); the first round(ratio B) rows have r < t."""
        intervals = round(ratio * rows)
        r, t = meanflow.time_pairs(rows, intervals, self.sampler, self.device, self.generator)
        whole = torch.rand(rows, generator=self.generator, device=self.device)
        whole = (whole < self.config.one_step) & (
            torch.arange(rows, device=self.device) < intervals
        )
        return r.masked_fill(whole, 0.0), t.masked_fill(whole, 1.0)

    def _loss(
        self, x: Tensor, cond: dict[str, Tensor], r: Tensor, t: Tensor
    ) -> tuple[Tensor, meanflow.LossStats]:
        p, c = self.config.p, self.config.c
        return meanflow.loss(
            self.net, x, cond, r=r, t=t, p=p, c=c, generator=self.generator, return_stats=True
        )

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
        clips = torch.arange(min(self.config.preview_clips, len(self.validation)))
        batch = self.validation.rows(clips.to(self.device))
        x, cond = batch.pop("latent"), batch
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        noise = torch.empty_like(x).normal_(generator=generator)
        with self._averaged():
            made = meanflow.OneStep(self.net, guidance=1.5)(noise, **cond)
            pair = [self.net.unnormalize(latent).cpu() for latent in (x, made)]
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

    def _save(self) -> None:
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        for k, average in enumerate(self.ema.averages):
            tensors |= {f"ema.{k}.{n}": a for n, a in zip(self.names, average, strict=True)}
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "updates": self.ema.updates,
            "seconds": self.seconds(),
            "config": as_json(self.config),
        }
        save_state(self.out / STATE, tensors, state)

    def _resume(self) -> dict[str, Any]:
        """Take up the saved state, if any; return what the recipe has changed since."""
        path = self.out / STATE
        if not path.exists():
            return {}
        tensors, state = load_state(path)
        mine, theirs = as_json(self.config), state["config"]
        changed = {k: [theirs.get(k), v] for k, v in mine.items() if theirs.get(k) != v}
        for key in ("model", "overrides", "ema"):
            if key in changed:
                raise InputError(
                    f"{path} was trained with {key}={changed[key][0]}, not {changed[key][1]}. "
                    "Give another out=, or the same setting."
                )
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        load_optimizer(self.optimizer, self.names, tensors)
        for k, average in enumerate(self.ema.averages):
            for name, tensor in zip(self.names, average, strict=True):
                tensor.copy_(tensors[f"ema.{k}.{name}"])
        self.ema.updates = state["updates"]
        self.step, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.elapsed = state["seconds"]
        return {"resumed": True, "changed": changed}

    def _export(self, path: Path) -> None:
        with self._averaged():
            self.net.save(path, torch.float16)
        self.progress.message(f"Wrote {path}.")


class _Log:
    """`log.jsonl`, and TensorBoard where it is installed and wanted.

    Records after the step a run resumes from are dropped, so that the file is one curve.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        path = out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if step and json.loads(line)["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
            except ImportError:
                pass
        self._reset()
        self.recent = math.nan

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.clips, self.since = 0, time.monotonic()

    def note(self, record: dict[str, Any]) -> None:
        """Write a record as it is."""
        self.file.write(json.dumps(record) + "\n")

    def collect(self, figures: dict[str, float], rows: int, good: bool) -> None:
        """Take up a step's figures; those of skipped steps would spoil the means."""
        self.clips += rows
        for key, value in figures.items() if good else ():
            if not math.isnan(value):  # an error of which the batch had no rows
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.counts[key] = self.counts.get(key, 0) + 1
        if good:
            loss = figures["loss"]
            self.recent = loss if math.isnan(self.recent) else self.recent * 0.95 + 0.05 * loss

    def clips_per_s(self) -> float:
        """Clips trained a second since the last record."""
        return self.clips / max(1e-9, time.monotonic() - self.since)

    def flush(self, step: int, lr: float, skipped: int, seconds: float) -> None:
        """Write the means since the last record."""
        values = {k: v / self.counts[k] for k, v in self.sums.items()}
        values |= {"lr": lr, "skipped": skipped}
        speed = {"clips_per_s": round(self.clips_per_s(), 2), "seconds": round(seconds, 2)}
        self.scalars("train", step, values, speed)
        self._reset()

    def scalars(
        self, kind: str, step: int, values: dict[str, float], more: dict[str, float] | None = None
    ) -> None:
        """Write one record of figures."""
        values = values | (more or {})
        self.note({"step": step, "kind": kind} | values)
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)

    def audio(self, name: str, step: int, waveform: Tensor, rate: int) -> None:
        """Hand a waveform (S,) to TensorBoard."""
        if self.board is not None:
            self.board.add_audio(name, waveform[None].clamp(-1, 1), step, rate)


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
