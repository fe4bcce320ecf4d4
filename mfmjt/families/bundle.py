"""A network, and the codec and encoders it was trained with: from conditions to waveforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfmjt import meanflow
from mfmjt.codec import Codec
from mfmjt.cuda_graph import Captured
from mfmjt.encoders import Encoders, Lengths
from mfmjt.errors import RunError
from mfmjt.families.on_demand import OnDemand
from mfmjt.kernels import precision
from mfmjt.meanflow import OneStep, Sampling
from mfmjt.memory import release
from mfmjt.model import MFMJT

__all__ = ["NEGATIVE", "Bundle", "default_sampling"]

NEGATIVE = "negative_"
"""Begins the names of features of a negative prompt, which stands for the null text in guidance."""
Part = Literal["network", "codec", "encoders"]
"""What a bundle is made of, by the names of its attributes."""
PARTS: tuple[Part, ...] = get_args(Part)


def default_sampling(network: MFMJT) -> Sampling:
    """Return how a network is meant to be sampled: in one step, or in 25 of flow matching.

    A network ignores the end of its interval, as one imported from MMAudio does until it is trained
    further, where its second embedding ends in zeros. MeanAudio learned to follow the guided
    velocity, and so takes no guidance.
    """
    last = network.r_embed.mlp[2].parameters()
    if not any(p.is_meta or bool(p.any()) for p in last):
        return Sampling(steps=25, guidance=4.5, mode="cfg", instantaneous=True)
    return Sampling() if network.config.takes_video else Sampling(guidance=1.0, mode="cfg")


class Bundle:
    """A network, a codec and encoders that belong together.

    Args:
        network: Predicts average velocities of latents.
        codec: Turns latents into waveforms.
        encoders: Turn frames and text into the network's conditions.
        sampling: How the network is meant to be sampled; None finds it out.

    Attributes:
        null_prompt: What guidance leads away from where there is no negative prompt: the empty
            text for MeanAudio and its relatives, None for the network's own null tokens.
        duration: Seconds of sound for a prompt alone, unless asked otherwise: the length of the
            clips that the network was trained on, in whole seconds.
        window: Whole seconds, 2 or more, that the network makes in one go.
        notes: One line each on what was odd about the files that the parts were read from, and on a
            precision that the CPU lacks.
    """

    def __init__(
        self, network: MFMJT, codec: Codec, encoders: Encoders, sampling: Sampling | None = None
    ) -> None:
        self.network, self.codec, self.encoders = network, codec, encoders
        self.sampling = sampling or default_sampling(network)
        config = network.config
        self.null_prompt = None if config.takes_video else ""
        self.duration = max(2, round(config.latent_length / config.latent_rate))
        self.window = self.duration
        self.notes: tuple[str, ...] = tuple(
            note
            for part in (network, codec, encoders)
            for module in part.modules()
            for note in getattr(module, "notes", ())
        )
        self._one_step: OneStep | None = None
        self._captured: Captured | None = None
        self._encoders_identity = ""
        at = next(encoders.parameters()).device
        self._device, self._dtype = torch.device("cpu") if at.type == "meta" else at, network.dtype
        self._on_demand: dict[Part, OnDemand] = {}

    @classmethod
    def opened(
        cls,
        network: Callable[[], MFMJT],
        codec: Callable[[], Codec],
        encoders: Callable[[], Encoders],
        sampling: Sampling | None = None,
        low_memory: bool = False,
    ) -> Bundle:
        """Open parts that belong together.

        Args:
            network: Opens the network. Whatever dtype its weights are stored in, it becomes float32
                where `to` names no other.
            codec: Opens the codec.
            encoders: Opens the encoders.
            sampling: As for `Bundle`.
            low_memory: Open one after the other, only to see that they are as they should be.
                `need` opens each again.
        """
        net = network()
        sampling = sampling or default_sampling(net)
        if not low_memory:
            bundle = cls(net, codec(), encoders(), sampling)
            bundle._dtype = torch.float32
            return bundle
        kept: dict[Part, OnDemand] = {"network": OnDemand(net, network)}
        kept["codec"] = OnDemand(made := codec(), codec)  # the network's weights have gone by now
        kept["encoders"] = OnDemand(read := encoders(), encoders)
        bundle = cls(net, made, read, sampling)
        bundle._on_demand, bundle._dtype = kept, torch.float32
        return bundle

    @property
    def device(self) -> torch.device:
        """Return the device that the parts are on, or come to when they are needed."""
        return self._device

    @property
    def low_memory(self) -> bool:
        """Return whether the weights of one part at a time are on the device."""
        return bool(self._on_demand)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Bundle:
        """Move all parts, ready to be used; `dtype` is that of the network alone.

        On a CPU without instructions for their dtype, the network computes in float32 from weights
        in it, codec and encoders become float32; `notes` say so.
        """
        self._device, self._dtype = torch.device(device), dtype or self._dtype
        self._note_precision()
        for part in PARTS:
            self._settle(part)
        return self

    def save_memory(self) -> None:
        """Have parts that came without files on the CPU, and on the device when they are needed."""
        self._on_demand = self._on_demand or {p: OnDemand(getattr(self, p)) for p in PARTS}

    def need(self, part: Part | None) -> None:
        """Have the weights of a part on the device and, to save memory, of no other."""
        for other, weights in self._on_demand.items():
            if other != part:
                weights.drop()
        if part in self._on_demand:
            self._on_demand[part].load()
            self._settle(part)

    def _settle(self, part: Part) -> None:
        """Put the weights of a part, if it has them, where and into what they are to be."""
        module: nn.Module = getattr(self, part)
        device = None if next(module.parameters()).is_meta else self._device
        if part == "network":
            _convert(module, device, self._dtype)
        else:
            module.to(device)
            if self._too_slow(module):
                module.float()
        module.eval().requires_grad_(False)

    def _too_slow(self, module: nn.Module) -> set[torch.dtype]:
        """Return dtypes of codec or encoders that the CPU has no instructions for."""
        if self._device.type != "cpu":
            return set()
        return {parameter.dtype for parameter in module.parameters()} & precision.SLOW

    def _note_precision(self) -> None:
        notes = list(self.notes)
        if note := precision.cost(self._dtype, self._device):
            notes.append(note)
        for dtype in self._too_slow(self.codec) | self._too_slow(self.encoders):
            name = str(dtype).removeprefix("torch.")
            notes.append(
                f"This CPU has no instructions for {name}: codec and encoders run in float32."
            )
        self.notes = tuple(dict.fromkeys(notes))

    def compile(self) -> None:
        """Prepare the network for one step, and both it and the codec for CUDA graphs."""
        self._captured = Captured(self.codec.decode)
        if not self.sampling.instantaneous:
            self._one_step = OneStep(self.network)

    def guidance(self, sampling: Sampling) -> float:
        """Return the strength of guidance: 1, which needs no second evaluation, if there is none.

        MeanAudio and its relatives count all that is below 1 for none.
        """
        if sampling.mode == "none" or (self.null_prompt is not None and sampling.guidance < 1):
            return 1.0
        return sampling.guidance

    def lengths(self, seconds: float) -> Lengths:
        """Give the latents and frames of so many seconds."""
        return self.encoders.lengths(seconds, self.network.config)

    def identity(self) -> str:
        """Return a digest of codec and encoders: of all that decides on features, but the clips."""
        self.need("codec")
        codec = self.codec.identity()
        return codec[:16] + self.encoders_identity()[:16]

    def encoders_identity(self) -> str:
        """Return a digest of the encoders, computed once."""
        if not self._encoders_identity:
            self.need("encoders")
            self._encoders_identity = self.encoders.identity()
        return self._encoders_identity

    def conditions(
        self, features: Mapping[str, Tensor], length: int, sampling: Sampling
    ) -> tuple[Any, ...]:
        """Compute what does not change from step to step.

        Args:
            features: Of `encoders`, under "video", "sync" and "text", `(B, tokens, dim)`; those
                left out are null. "video_mask" and "text_mask" `(B,)` bool may say of which rows.
                With "negative_" before its name, that of a text which guidance leads away from.
            length: Latents that will be made.
            sampling: What the result is for.

        Returns:
            Nested tensors with B rows, or one where all rows agree, for `latents`.
        """
        if self._one_step is not None and sampling.steps == 1:
            return (dict(sorted(features.items())),)  # a prepared step computes its own
        self.need("network")
        given = {name: value for name, value in features.items() if not name.startswith(NEGATIVE)}
        null = {name: value[:1] for name, value in given.items()}
        null["video_mask"] = null["text_mask"] = torch.zeros(
            1, dtype=torch.bool, device=self.device
        )
        if negative := {
            name.removeprefix(NEGATIVE): value
            for name, value in features.items()
            if name.startswith(NEGATIVE)
        }:
            null = {**null, **negative, "text_mask": null["text_mask"].logical_not()}
        return (
            self.network.conditions(**given, latent_length=length),
            self.network.conditions(**null, latent_length=length),
        )

    @torch.no_grad()
    def latents(
        self,
        noise: Tensor,
        conditions: tuple[Any, ...],
        sampling: Sampling,
        stepped: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Make latents of noise; the only place above `meanflow` that samples.

        Args:
            noise: Standard normal `(B, N, C)` on the network's device.
            conditions: A result of `conditions`, with B rows or one.
            sampling: How.
            stepped: Called after each step.

        Returns:
            `(B, N, C)` in the codec's space.
        """
        self.need("network")
        rows = len(noise)
        conditions = pytree.tree_map_only(
            Tensor, lambda x: x.expand(rows, *x.shape[1:]), conditions
        )
        if len(conditions) == 1:
            assert self._one_step is not None
            features, guidance = conditions[0], self.guidance(sampling)
            if guidance == 1:  # modes of one request share features, and not all are guided
                features = {k: v for k, v in features.items() if not k.startswith(NEGATIVE)}
            made = self._one_step(noise, **features, guidance=guidance, mode=sampling.mode)
            stepped()
            return self.network.unnormalize(made)

        def velocity(z: Tensor, r: Tensor, t: Tensor, cond: Any) -> Tensor:
            u = self.network(z, r, t, cond=cond)
            stepped()
            return u

        cond, null = ({"cond": given} for given in conditions)
        made = meanflow.sample(
            velocity,
            noise,
            sampling.steps,
            cond,
            null,
            self.guidance(sampling),
            sampling.mode,
            sampling.instantaneous,
        )
        return self.network.unnormalize(made)

    def decode(self, latents: Tensor) -> Tensor:
        """Give waveforms `(B, N · hop)`, float32 on the CPU, of latents `(B, N, C)`.

        Raises:
            RunError: They are not finite.
        """
        self.need("codec")
        waveforms = (self._captured or self.codec.decode)(latents).float().cpu()
        if not bool(torch.isfinite(waveforms).all()):
            raise RunError(
                "The network gave samples that are not finite. Use float32, less guidance, or "
                "another checkpoint."
            )
        return waveforms


def _convert(module: nn.Module, device: torch.device | None, dtype: torch.dtype) -> None:
    """Do as `module.to` does, with the memory of mapped files given back after each layer."""
    for layer in reversed(list(module.modules())):  # what is inside comes before its outside
        held = [(value, value.detach()) for value in layer.parameters(recurse=False)]
        layer.to(device, dtype)
        for value, before in held:
            if value.data_ptr() != before.data_ptr():
                release(before)
