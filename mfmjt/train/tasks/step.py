"""One training step's draws and its loss, apart from how many processes share it.

Everything that chance decides in a step is drawn for the whole batch, in one order, from one
generator; every process makes the same draws and works on its rows of them. So the batch does not
depend on the number of processes, nor on the number of passes that accumulate a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfmjt import meanflow
from mfmjt.features.store import FeatureStore
from mfmjt.meanflow._network import Network
from mfmjt.meanflow.targets import Target, Velocity, load_target
from mfmjt.train.recipe import NetworkTraining

__all__ = ["Draws", "Step", "compile_step", "draw"]


class Draws(NamedTuple):
    """What chance decides of a batch; the rows with r < t come first.

    Attributes:
        clips: Clips (B,) int64, on the CPU.
        starts: First latents of the windows (B,) int64, on the CPU; None for whole clips.
        latent_noise: Of sampling the codec's latents (B, N, C).
        video_mask: Rows (B,) that keep video and synchronization.
        text_mask: Rows (B,) that keep their text.
        r: End of the interval (B,).
        t: Its begin (B,).
        noise: Of the path from data to noise (B, N, C).
    """

    clips: Tensor
    starts: Tensor | None
    latent_noise: Tensor
    video_mask: Tensor
    text_mask: Tensor
    r: Tensor
    t: Tensor
    noise: Tensor

    def rows(self, index: slice) -> Draws:
        """Those of some rows."""
        return Draws(*(None if drawn is None else drawn[index] for drawn in self))  # type: ignore[arg-type]


def draw(
    config: NetworkTraining,
    store: FeatureStore,
    rows: int,
    window: int | None,
    intervals: int,
    generator: torch.Generator,
    chooser: torch.Generator | None = None,
) -> Draws:
    """Draw a whole batch.

    Args:
        config: Shares and distributions.
        store: What clips and windows there are.
        rows: Rows of the batch, B.
        window: Latents in a window; None for whole clips.
        intervals: Rows with r < t.
        generator: Of the device; decides everything, but for clips and windows where there is
            a `chooser`.
        chooser: Of the CPU.
    """
    device = store.device
    clips, starts, latent_noise = store.draw(rows, window, generator, chooser)
    # Filled where they are: a copy of numbers to a GPU is waited for.
    shares = (config.drop_video, config.drop_text, config.drop_all)
    drop = torch.stack([torch.full((1,), share, device=device) for share in shares])
    keep = torch.rand(3, rows, generator=generator, device=device) >= drop
    sampler = meanflow.logit_normal(config.time_mean, config.time_std)
    r, t = meanflow.time_pairs(rows, intervals, sampler, device, generator)
    whole = torch.rand(rows, generator=generator, device=device) < config.one_step
    whole = whole & (torch.arange(rows, device=device) < intervals)
    r, t = r.masked_fill(whole, 0.0), t.masked_fill(whole, 1.0)
    if config.to_data:
        ends = torch.rand(rows, generator=generator, device=device) < config.to_data
        r = r.masked_fill(ends & (torch.arange(rows, device=device) < intervals), 0.0)
    noise = torch.randn(latent_noise.shape, generator=generator, device=device)
    return Draws(clips, starts, latent_noise, keep[0] & keep[2], keep[1] & keep[2], r, t, noise)


class Step(nn.Module):
    """The loss of some rows as one module with one forward pass, which is what DDP can synchronize.

    MeanFlow calls the network twice, one time of that inside `torch.func.jvp`. Wrapped alone, the
    network would be called around DDP's hooks, and gradients would differ between processes
    without an error.

    Args:
        net: The network.
        config: Target, guidance and weight of the loss.
        teacher: A trained network, where the recipe has one. It is no part of this module.
    """

    def __init__(
        self, net: nn.Module, config: NetworkTraining, teacher: Network | None = None
    ) -> None:
        super().__init__()
        self.net, self.p, self.c, self.balance = net, config.p, config.c, config.balance
        self.target = _target(config, teacher)
        self.velocity = _velocity(config, teacher)
        self.pair = _pair(config, teacher)

    def forward(
        self, features: dict[str, Tensor], draws: Draws, intervals: int
    ) -> tuple[Tensor, meanflow.LossStats]:
        """Mean loss of the rows, and the errors of both kinds.

        Args:
            features: `latent` (B, N, C), and the conditions.
            draws: Of these rows.
            intervals: How many of them, the first, have r < t.
        """
        cond = {key: value for key, value in features.items() if key != "latent"}
        for name, kept in (("video_mask", draws.video_mask), ("text_mask", draws.text_mask)):
            cond[name] = cond[name] & kept if name in cond else kept  # a clip may lack them
        x = features["latent"] if self.pair is None else self.pair(draws.noise, cond=cond)
        return meanflow.loss_and_errors(
            self.net,
            x,
            cond,
            noise=draws.noise,
            r=draws.r,
            t=draws.t,
            p=self.p,
            c=self.c,
            intervals=intervals,
            target=self.target,
            velocity=self.velocity,
            balance=self.balance,
        )


def compile_step(step: Step, backend: str = "inductor") -> None:
    """Let `torch.compile` make one program of every call, in place.

    What DDP wraps is then compiled inside. It would rather compile what is around, and cut the
    program where its buckets of gradients end; a cut inside of forward mode loses tangents.
    """
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = False
    step.compile(backend=backend, fullgraph=True, dynamic=False)


def _target(config: NetworkTraining, teacher: Network | None) -> Target:
    options = dict(config.target_options)
    if config.target == "teacher_rollout":
        options["teacher"] = teacher
    elif config.target == "alpha_flow":
        options.setdefault("alpha", config.alpha)
    return load_target(config.target, **options)


def _velocity(config: NetworkTraining, teacher: Network | None) -> Velocity | None:
    """Return a teacher's velocity, or a guided one; rows without conditions keep the clip's."""
    if teacher is not None and config.target != "teacher_rollout" and not config.reflow:
        return meanflow.teacher_velocity(teacher)
    if config.omega == 1 and config.kappa == 0:
        return None
    return meanflow.guided_velocity(config.omega, config.kappa, _null, _has_none)


def _pair(config: NetworkTraining, teacher: Network | None) -> Callable[..., Tensor] | None:
    """Return what makes the data to pair with noise, for a rectified flow."""
    if not config.reflow or teacher is None:
        return None
    return functools.partial(
        meanflow.sample, teacher, steps=config.reflow, mode="none", instantaneous=True
    )


def _null(cond: dict[str, Any]) -> dict[str, Any]:
    masks = ("video_mask", "text_mask")
    return cond | {mask: torch.zeros_like(cond[mask]) for mask in masks}


def _has_none(cond: dict[str, Any]) -> Tensor:
    lost: Tensor = ~(cond["video_mask"] | cond["text_mask"])
    return lost
