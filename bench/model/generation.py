"""One-step generation, and who does it: what `bench_generate` times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import TINY
from bench.providers import OURS
from mfmjt import kernels, meanflow
from mfmjt.codec import VAE, BigVGAN, MMAudioCodec, NanoCodec
from mfmjt.cuda_graph import Captured
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.model.config import CONFIGS

__all__ = ["Judge", "Plan", "Work", "plans"]


class Plan(NamedTuple):
    """What to time of a network.

    Attributes:
        network: A named configuration.
        what: "latents" or "waveform".
        batch: Clips at once.
        providers: Who.
    """

    network: str
    what: str
    batch: int
    providers: tuple[str, ...]


def plans(gpu: bool) -> dict[str, list[Plan]]:
    """Return what is timed by default, what has a bar first: on a GPU in three turns."""
    few = (OURS, "eager")
    if not gpu:
        everyone = (OURS, "eager", "mfmjt_eager", "compile")
        return {
            "headline": [
                Plan("small_16k", "latents", 1, everyone),
                Plan("nano", "latents", 1, (*everyone, "eager_25")),
                Plan("nano", "waveform", 1, few),
                Plan("nano", "latents", 8, few),
                Plan("small_44k", "latents", 1, few),
                Plan("small_16k", "latents", 4, few),
                Plan("small_16k", "latents", 1, ("eager_25",)),
                Plan("medium_44k", "latents", 1, few),
                Plan("small_16k", "waveform", 1, few),
            ]
        }
    three = (OURS, "eager", "mfmjt_eager")
    large, others = "large_44k_v2", ("nano", "small_44k", "medium_44k", "large_44k")
    return {
        "headline": [
            Plan("small_16k", "latents", 1, three),
            Plan("small_16k", "latents", 32, three),
            Plan("small_16k", "waveform", 1, few),
            Plan(large, "latents", 1, three),
            Plan("small_16k", "latents", 8, three),
            Plan("small_16k", "latents", 128, three),
        ],
        "compiled": [Plan(name, "latents", 1, ("compile",)) for name in ("small_16k", large)],
        "rest": [
            *(Plan(name, "latents", 1, three) for name in others),
            *(Plan(name, "latents", batch, few) for name in (large, "nano") for batch in (8, 32)),
            Plan("nano", "waveform", 1, few),
            *(Plan(name, "latents", 1, ("eager_25",)) for name in ("small_16k", large)),
        ],
    }


@dataclass
class Work:
    """A network, its codec and what it is called with.

    Attributes:
        net: The network, in the dtype that is timed.
        codec: Of its latents; None for latents alone.
        z: Noise (B, N, C) in float32.
        cond: Features.
    """

    net: MFMJT
    codec: NanoCodec | MMAudioCodec | None
    z: Tensor
    cond: dict[str, Tensor]

    @classmethod
    def make(cls, plan: Plan, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Work:
        """Random weights, none of them zero, and random features."""
        torch.manual_seed(0)
        with torch.device(device):  # one core of the host would take seconds for the large ones
            net = MFMJT.from_config(plan.network, **(TINY if tiny else {}))
        codec = _codec(plan.network, dtype).to(device) if plan.what == "waveform" else None
        with torch.no_grad():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        net = net.eval().requires_grad_(False).to(device, dtype)
        c, length = net.config, 20 if tiny else net.config.latent_length
        video, sync = c.lengths(length)
        sizes = {
            "video": (video, c.video_dim),
            "sync": (sync, c.sync_dim),
            "text": (c.text_length, c.text_dim),
        }
        cond = {
            name: torch.randn(plan.batch, *size, device=device, dtype=dtype)
            for name, size in sizes.items()
        }
        z = torch.randn(plan.batch, length, c.latent_dim, device=device)
        return cls(net, codec, z, cond)

    def call(self, provider: str) -> Callable[[], Tensor]:
        """Return what a provider does.

        Raises:
            InputError: There is no such provider.
        """
        latents = self._latents(provider)
        if self.codec is None:
            return lambda: latents(self.z, self.cond)
        decode: Callable[[Tensor], Tensor] = self.codec.decode
        if provider == OURS:
            decode = Captured(decode)

        @torch.no_grad()
        def waveform() -> Tensor:
            if provider.startswith(OURS):
                return decode(latents(self.z, self.cond))
            with kernels.reference():
                return decode(latents(self.z, self.cond))

        return waveform

    def _latents(self, provider: str) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        if provider in (OURS, "mfmjt_eager"):
            step = meanflow.OneStep(self.net, compile=provider == OURS)
            return lambda z, cond: step(z, **cond)
        function: Callable[..., Tensor]
        if provider == "eager":
            function = _one_step
        elif provider == "eager_25":
            function = _twenty_five_steps
        elif provider == "compile":
            on_gpu = self.z.device.type == "cuda"
            function = torch.compile(_one_step, mode="reduce-overhead" if on_gpu else "default")
        else:
            raise InputError(f"There is no provider {provider!r}. See --help.")
        net = self.net

        def call(z: Tensor, cond: dict[str, Tensor]) -> Tensor:
            with torch.no_grad(), kernels.reference():
                return function(net, z, cond)

        return call


def _codec(network: str, dtype: torch.dtype) -> NanoCodec | MMAudioCodec:
    if network == "nano":
        return NanoCodec().eval().requires_grad_(False)
    mode = "16k" if CONFIGS[network].sample_rate == 16_000 else "44k"
    codec = MMAudioCodec(mode, VAE(mode), BigVGAN(mode))
    return codec.cast(dtype).eval().requires_grad_(False)


def _off(z: Tensor) -> dict[str, Tensor]:
    no = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
    return {"video_mask": no, "text_mask": no}


def _one_step(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    u_c, u_0 = net(z, 0.0, 1.0, **cond), net(z, 0.0, 1.0, **cond, **_off(z))
    return z - meanflow.guide(u_c, u_0, 1.5, "cfg_scaled")


def _twenty_five_steps(net: MFMJT, z: Tensor, cond: dict[str, Tensor]) -> Tensor:
    features, no = (cond["video"], cond["sync"], cond["text"]), _off(z)["video_mask"]
    given = net.conditions(*features)
    null = net.conditions(*features, video_mask=no, text_mask=no)
    steps = 25
    for i in range(steps, 0, -1):
        t = i / steps
        u_c, u_0 = net(z, t, t, cond=given), net(z, t, t, cond=null)
        z = z - meanflow.guide(u_c, u_0, 4.5, "cfg") / steps
    return z


class Judge:
    """Whether a provider's latents are right: by the same weights in float32.

    Args:
        work: What is called.
        plan: Of 25 steps, and of samples, there is no claim.
        dtype: Of network and features.
    """

    def __init__(self, work: Work, plan: Plan, dtype: torch.dtype) -> None:
        self.work, self.plan, self.dtype = work, plan, dtype
        self.truth: Tensor | None = None
        self.limit = 0.0

    def error(self, provider: str, found: Tensor) -> float | None:
        """Relative error of latents; None where there is no claim.

        `limit` is then twice that of plain PyTorch in the same dtype.
        """
        if self.plan.what != "latents" or provider == "eager_25":
            return None
        if self.truth is None:
            cond = {name: value.float() for name, value in self.work.cond.items()}
            exact = Work(copy.deepcopy(self.work.net).float(), None, self.work.z, cond)
            self.truth = exact.call("eager")()
            plain = self._distance(self.work.call("eager")())
            self.limit = 2 * plain + 8 * torch.finfo(torch.float32).eps
        return self._distance(found)

    def _distance(self, found: Tensor) -> float:
        assert self.truth is not None
        return float((found.float() - self.truth).norm() / self.truth.norm())
