"""Training of the network on a feature store: MeanFlow, or plain flow matching with `ratio=0`.

Every draw of a step (clips, windows, latents, dropped conditions, times, noise) comes from one
generator seeded with (seed, step), and is the same on every process; with a GPU, clips and windows
come from one of the host's.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mfmjt import meanflow
from mfmjt.codec import Codec, NanoCodec
from mfmjt.encoders import Encoders, NanoEncoders
from mfmjt.errors import InputError, RunError, reason
from mfmjt.families import open_bundle
from mfmjt.features.store import FeatureStore
from mfmjt.kernels import precision
from mfmjt.model import MFMJT, ModelConfig, load_network
from mfmjt.model.checkpoint import is_ours
from mfmjt.model.config import config_for
from mfmjt.model.lora import add_lora, merged_state, save_adapter
from mfmjt.train import parallel, preview
from mfmjt.train.listen import Listening
from mfmjt.train.log import TrainingLog
from mfmjt.train.parallel import Processes
from mfmjt.train.recipe import NetworkTraining
from mfmjt.train.tasks.step import Draws, Step, compile_step, draw
from mfmjt.train.trainer import Batch, Pass, Task, TrainingResult, train

__all__ = ["AUTO", "NetworkTask", "starting_network", "train_network"]

AUTO = "auto"
"""As `model`, the configuration of the network that is started from."""
NETWORK, ADAPTER = "network.safetensors", "adapter.safetensors"
FIGURES = ("loss", "flow", "interval")
FLOW_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_CLIPS = 40


def train_network(config: NetworkTraining, stop_after: float | None = None) -> TrainingResult:
    """Train a network as `config` says; see `mfmjt.train.trainer.train`.

    Args:
        config: The recipe.
        stop_after: Stop after so many seconds, as a signal would; the same call then goes on.

    Raises:
        InputError: A missing store, a device that is not there, a state that is damaged or of
            another network, a batch that the processes cannot share.
        RunError: The loss has not been finite for many steps, or the state cannot be saved.
    """
    return train(config, lambda processes: NetworkTask(config, processes), stop_after)


class NetworkTask(Task):
    """The network, the features that it is trained on, and what decodes its previews."""

    fused = True

    def __init__(self, config: NetworkTraining, processes: Processes) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        sources = [(source.store, source.weight) for source in config.data]
        sources = sources or [(config.store, 1.0)]
        self.store = FeatureStore(sources, "train", self.device, config.clips)
        # Without validations and previews there need be no such clips.
        looks = config.validate_every or config.preview_every
        looked_at = FeatureStore(sources[0][0], "validation", self.device) if looks else self.store
        self.validation = looked_at
        self.null_text = self.store.null_text
        if config.encoders is not None and not self.store.has_text:
            encoders = _encoders(config.encoders)
            for store in (self.store, self.validation):
                store.encode_text(encoders)
            self.null_text = encoders.encode_text([""])[0]
        self.network = self._network()
        self.codec = _codec(config.codec, self.network.config) if config.codec else None
        if self.codec is not None and processes.first:
            self.codec.to(self.device)
        self.listening: Listening | None = None
        if config.metrics and processes.first:
            assert self.codec is not None  # the recipe was checked
            self.listening = Listening(config, self.validation, self.codec, self._plain())
        super().__init__(config, config, self.network)
        self.title = f"train {config.model}"
        self.notes = tuple(self.network.notes)
        if self.network.config.pooled_dim is not None:
            self.notes += (
                "Feature stores hold no vector of a whole text, which this network reads: it is "
                "trained with the null one.",
            )
        if cost := precision.cost(getattr(torch, config.dtype), self.device):
            self.notes += (cost,)
        self.model = self._model()
        self.generator, self.next = torch.Generator(self.device), torch.Generator()
        # Of a GPU's random numbers the host would have to wait to know what to read.
        self.chooser = self.generator if self.device.type == "cpu" else torch.Generator()

    def _network(self) -> MFMJT:
        net = starting_network(self.config)
        if self.config.init_from is None:
            with torch.no_grad():
                if self.null_text is not None:
                    net.empty_string_feat.copy_(self.null_text)
                net.latent_mean.copy_(self.store.latent_mean.view_as(net.latent_mean))
                net.latent_std.copy_(self.store.latent_std.view_as(net.latent_std))
        net = net.to(self.device)
        for store in (self.store, self.validation):
            # Copies: the network's own may be in shards later.
            store.latent_mean = net.latent_mean.detach().flatten().clone()
            store.latent_std = net.latent_std.detach().flatten().clone()
        net.recompute_blocks(self.config.checkpointing)
        return net

    def _model(self) -> torch.nn.Module:
        """Return the network with its loss, compiled, in shards or copied to every process."""
        config, processes, net = self.config, self.processes, self.network
        how = parallel.choose_parallel(config.parallel, processes, net)
        for rows in (config.batch, config.full_batch) if config.full_every else (config.batch,):
            for ratio in (config.ratio, 0.0) if config.flow_steps else (config.ratio,):
                processes.check_rows(rows, round(ratio * rows), config.accumulate, how)
        if how == "fsdp":
            parallel.shard(net, processes, bf16=config.dtype == "bfloat16")
        step = Step(net, config, self._teacher())
        if config.compile:
            compile_step(step)
        if config.cuda_graph and (self.device.type != "cuda" or how != "none"):
            raise InputError(
                f"cuda_graph=true needs one process with a GPU; this is {processes.world} with "
                f"device={config.device}. Leave it out, or give device=cuda and one process."
            )
        return parallel.replicate(step) if how == "ddp" else step

    def _teacher(self) -> MFMJT | None:
        """Return the network that leads, whose latents must be scaled as this one's."""
        path = self.config.teacher
        if path is None:
            return None
        teacher = _read(path, dataclasses.replace(self.config, model=AUTO, overrides={}))
        teacher = teacher.to(self.device).eval().requires_grad_(False)
        for name in ("latent_mean", "latent_std"):
            ours, its = getattr(self.network, name), getattr(teacher, name)
            if ours.shape != its.shape or not torch.allclose(ours, its, rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"teacher={path} has latents of another scale: its {name} is not this "
                    "network's. Give a network trained on the same store, or start from it with "
                    "init_from."
                )
        return teacher

    # A step

    def draw(self, step: int) -> Batch:
        """Draw the batch of a step, and fetch this process's rows of it."""
        config = self.config
        rows, window = self._rows(step)
        for generator in (self.generator, self.chooser):
            generator.manual_seed((config.seed << 32) + step)
        intervals = 0 if step < config.flow_steps else round(config.ratio * rows)
        whole = draw(config, self.store, rows, window, intervals, self.generator, self.chooser)
        of = dict(zip(FIGURES, (rows, rows - intervals, intervals), strict=True))
        passes = []
        for index in self._indices():
            draws = whole.rows(index)
            features = self.store.rows(draws.clips, draws.starts, draws.latent_noise)
            mine, first = len(range(rows)[index]), len(range(intervals)[index])
            counts = zip(FIGURES, (mine, mine - first, first), strict=True)
            weights = {name: count / of[name] for name, count in counts if count}
            passes.append(Pass((features, draws, first), weights))
        self._prefetch_next(step + 1)
        return Batch(rows, tuple(name for name, count in of.items() if count), tuple(passes))

    def _rows(self, step: int) -> tuple[int, int | None]:
        """Return the number of clips of a step, and the latents of a window; None for all."""
        config = self.config
        if config.full_every > 0 and (step + 1) % config.full_every == 0:
            return config.full_batch, None
        return config.batch, config.window or None

    def _indices(self) -> list[slice]:
        """Which rows are this process's, pass by pass."""
        count = self.config.accumulate
        return [self.processes.rows(number, count) for number in range(count)]

    def _prefetch_next(self, step: int) -> None:
        """Let the store read what a step will draw while the one before computes."""
        rows, window = self._rows(step)
        self.next.manual_seed((self.config.seed << 32) + step)
        clips, starts = self.store.choose(rows, window, self.next)
        for index in self._indices():
            self.store.prefetch(clips[index], None if starts is None else starts[index], window)

    def loss(self, features: dict[str, Tensor], draws: Draws, intervals: int) -> dict[str, Tensor]:
        """Return the loss and both errors of some rows; see `Step`."""
        bf16 = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss, stats = self.model(features, draws, intervals)
        return {"loss": loss, "flow": stats.flow, "interval": stats.interval}

    def settle(self) -> None:
        """Wait until the next batch is read: its thread allocates pinned memory."""
        self.store.settle()

    # Validation, previews, export

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses on fixed clips, times and noise: flow matching, and one MeanFlow step.

        `mean_r0_t1` is MeanFlow's objective over the whole interval. Most of it is the variance of
        its target, as du/dt is taken along the velocity of one clip. `mean_error` has none: it
        compares u with the average velocity to which the network's own velocities lead.

        With them are figures of the sound, if the recipe wants some. The first process computes
        those, while others wait for its next step.
        """
        flow, mean, error, count = torch.zeros(len(FLOW_TIMES)), 0.0, 0.0, 0
        compared = meanflow.teacher_rollout(self.network)
        clips = min(VALIDATION_CLIPS, len(self.validation))
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        for rows in torch.arange(clips, device=self.device).split(self.config.full_batch):
            cond = self.validation.rows(rows)
            x = cond.pop("latent")
            noise = torch.empty_like(x).normal_(generator=generator)
            one, zero = torch.ones_like(x[:, 0, 0]), torch.zeros_like(x[:, 0, 0])
            for i, t in enumerate(FLOW_TIMES):
                flow[i] += float(self._fixed_loss(x, cond, noise, t * one, t * one)) * len(rows)
            mean += float(self._fixed_loss(x, cond, noise, zero, one)) * len(rows)
            u, average = compared(self.network, noise, zero, one, noise - x, cond)
            error += float((u - average).square().mean()) * len(rows)
            count += len(rows)
        each = {f"flow_t{t}": float(v) / count for t, v in zip(FLOW_TIMES, flow, strict=True)}
        means = {"mean_r0_t1": mean / count, "mean_error": error / count}
        found = {"flow": float(flow.mean()) / count} | means | each
        if self.config.metrics:
            state = self._state()
            found |= self.listening.measure(self._plain(state)) if self.listening else {}
        return found

    def _fixed_loss(
        self, x: Tensor, cond: dict[str, Tensor], noise: Tensor, r: Tensor, t: Tensor
    ) -> Tensor:
        """Mean square of the objective at given draws, unweighted."""
        return meanflow.loss(self.network, x, cond, noise=noise, r=r, t=t, p=0.0)

    @torch.no_grad()
    def preview(self, step: int, log: TrainingLog) -> None:
        """Generate a few validation clips in one step; write them beside the decoded originals."""
        assert self.codec is not None  # the recipe was checked
        clips = torch.arange(min(self.config.preview_clips, len(self.validation)))
        cond = self.validation.rows(clips.to(self.device))
        x = cond.pop("latent")
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        noise = torch.empty_like(x).normal_(generator=generator)
        made = meanflow.OneStep(self.network, guidance=1.5, compile=False)(noise, **cond)
        # The network has the same statistics, but in shards where it is sharded.
        mean, std = self.store.latent_mean, self.store.latent_std
        pair = [latent * std + mean for latent in (x, made)]
        if not self.processes.first:
            return
        real, fake = (self.codec.decode(latent).cpu() for latent in pair)
        folder = Path(self.config.out) / "previews"
        folder.mkdir(exist_ok=True)
        rate = self.codec.sample_rate
        for i in range(len(clips)):
            preview.save_wav(folder / f"clip{i}_step{step:07d}.wav", fake[i], rate)
            preview.save_wav(folder / f"clip{i}_real.wav", real[i], rate)
            log.audio(f"one_step/{i}", step, fake[i], rate)
        rows = [(self.validation.captions[i], [real[i], fake[i]]) for i in range(len(clips))]
        preview.save_spectrograms(
            folder / f"step{step:07d}.png", rows, ["real, through the codec", "one step"], rate
        )

    def export(self) -> Path:
        """Write `network.safetensors` in fp16, adapters merged, and the adapters alone."""
        path = Path(self.config.out) / NETWORK
        state = self._state()
        if not self.processes.first:
            return path
        try:
            self._plain(state).save(path, torch.float16)
            if self.config.lora:
                save_adapter(state, self.config.lora, path.parent / ADAPTER)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"Cannot write {path}: {reason(error)}. The training state is saved: make "
                "room, and the same command writes it."
            ) from error
        return path

    def _state(self) -> dict[str, Tensor]:
        """Return the network's tensors; every process helps to put the shards together."""
        return {k: parallel.whole(v) for k, v in self.network.state_dict().items()}

    def _plain(self, state: dict[str, Tensor] | None = None) -> MFMJT:
        """Return a network of these tensors, without copies of them, adapters merged."""
        state, lora = state or self._state(), self.config.lora
        with torch.device("meta"):
            net = MFMJT(self.network.config)
        net.load_state_dict(merged_state(state, lora) if lora else state, assign=True)
        return net


def _encoders(path: str) -> Encoders:
    """Open encoders: our own file, or those of a model's folder."""
    if os.path.isdir(path):
        return open_bundle(path, network=False).encoders.eval()
    return NanoEncoders.load(path).eval()


def _codec(path: str, config: ModelConfig) -> Codec:
    """Open the codec of a network: our own file, or that of a model's folder.

    Raises:
        InputError: It cannot be opened, or has other latents.
    """
    if os.path.isdir(path):  # MMAudio's files may be there for both of its codecs
        published = "44k" if config.latent_dim == 40 else None
        codec = open_bundle(path, network=False, codec=published).codec
    else:
        codec = NanoCodec.load(path)
    if codec.latent_dim != config.latent_dim:
        raise InputError(
            f"codec={path} has latents of {codec.latent_dim} channels, and the network "
            f"{config.latent_dim}. Give the codec that the features were made with, or null."
        )
    return codec.eval()


def starting_network(config: NetworkTraining) -> MFMJT:
    """Make the network, or read it; put adapters in where they are asked for.

    A network that is read keeps its own normalization of latents and its own null text, and is at
    first the function it was: MMAudio's velocity with the opposite sign, for every r, or
    MeanAudio's u. The latter with `overrides.video=gated` is the start of a network of video.

    Raises:
        InputError: The file cannot be used, or is of another network than `config.model`; there are
            no weights to freeze by these names; what `add_lora` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.init_from is None:
            if config.model == AUTO:
                raise InputError(
                    f"model={AUTO} takes the sizes of the network that is started from, and there "
                    "is none. Give init_from=FILE, or the name of a configuration."
                )
            net = MFMJT.from_config(config.model, **config.overrides)
        else:
            net = _read(config.init_from, config)
        if config.lora is not None:
            add_lora(net, config.lora)
        for beginning in config.frozen:
            found = [p for name, p in net.named_parameters() if name.startswith(beginning)]
            if not found:
                raise InputError(
                    f"frozen={beginning}: no weights begin so. Their names are those of the file's "
                    "tensors, such as fused_blocks.0."
                )
            for parameter in found:
                parameter.requires_grad_(False)
    return net


def _read(path: str, config: NetworkTraining) -> MFMJT:
    if not is_ours(path):
        return load_network(
            path, None if config.model == AUTO else config.model, **config.overrides
        )
    net = MFMJT.load(path)
    wanted = net.config if config.model == AUTO else config_for(config.model)
    wanted = dataclasses.replace(wanted, **config.overrides)
    if wanted.video == "gated" and not net.config.takes_video:
        new = {name: value for name, value in config.overrides.items() if name != "video"}
        net = net.with_video(**new)
    if net.config != wanted:
        raise InputError(
            f"init_from={path} is another network ({net.config.name}) than model={config.model} "
            "with these overrides. Give a network of the same sizes, or model=auto without "
            "overrides."
        )
    return net
