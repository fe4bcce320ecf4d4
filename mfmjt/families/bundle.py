"""A network, and the codec and encoders it was trained with: from conditions to waveforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfmjt import meanflow
from mfmjt.codec import Codec
from mfmjt.cuda_graph import Captured
from mfmjt.encoders import Encoders, Lengths
from mfmjt.errors import RunError
from mfmjt.kernels import precision
from mfmjt.meanflow import OneStep, Sampling
from mfmjt.model import MFMJT

__all__ = ["Bundle", "default_sampling"]


def default_sampling(network: MFMJT) -> Sampling:
    """Return how a network is meant to be sampled: in one step, or in 25 of flow matching.

    A network ignores the end of its interval, as one imported from MMAudio does until it is trained
    further, where the embedding of t - r ends in zeros.
    """
    last = network.r_embed.mlp[2].parameters()
    if any(p.is_meta or bool(p.any()) for p in last):
        return Sampling()
    return Sampling(steps=25, guidance=4.5, mode="cfg", instantaneous=True)


class Bundle:
    """A network, a codec and encoders that belong together.

    Args:
        network: Predicts average velocities of latents.
        codec: Turns latents into waveforms.
        encoders: Turn frames and text into the network's conditions.
        sampling: How the network is meant to be sampled; None finds it out.

    Attributes:
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
        self.window = max(2, round(config.latent_length / config.latent_rate))
        self.notes: tuple[str, ...] = tuple(
            note
            for part in (network, codec, encoders)
            for module in part.modules()
            for note in getattr(module, "notes", ())
        )
        self._one_step: OneStep | None = None
        self._captured: Captured | None = None
        self._encoders_identity = ""

    @property
    def device(self) -> torch.device:
        """Return the device of codec and encoders."""
        return next(self.encoders.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Bundle:
        """Move all parts, ready to be used; `dtype` is that of the network alone.

        On a CPU without instructions for their dtype, the network computes in float32 from weights
        in it, codec and encoders become float32; `notes` say so.
        """
        if not next(self.network.parameters()).is_meta:
            self.network.to(device, dtype).eval().requires_grad_(False)
        for part in (self.codec, self.encoders):
            part.to(device).eval().requires_grad_(False)
        if self.device.type == "cpu":
            self._avoid_slow()
        return self

    def _avoid_slow(self) -> None:
        notes = list(self.notes)
        if self.network.dtype in precision.SLOW:
            notes.append(precision.note(self.network.dtype))
        for part in (self.codec, self.encoders):
            for dtype in {p.dtype for p in part.parameters()} & precision.SLOW:
                part.float()
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

    def lengths(self, seconds: float) -> Lengths:
        """Give the latents and frames of so many seconds."""
        return self.encoders.lengths(seconds, self.network.config)

    def identity(self) -> str:
        """Return a digest of codec and encoders: of all that decides on features, but the clips."""
        return self.codec.identity()[:16] + self.encoders_identity()[:16]

    def encoders_identity(self) -> str:
        """Return a digest of the encoders, computed once."""
        self._encoders_identity = self._encoders_identity or self.encoders.identity()
        return self._encoders_identity

    def conditions(
        self, features: Mapping[str, Tensor], length: int, sampling: Sampling
    ) -> tuple[Any, ...]:
        """Compute what does not change from step to step.

        Args:
            features: Of `encoders`, under "video", "sync" and "text", `(B, tokens, dim)`; those
                left out are null. "video_mask" and "text_mask" `(B,)` bool may say of which rows.
            length: Latents that will be made.
            sampling: What the result is for.

        Returns:
            Nested tensors with B rows, or one where all rows agree, for `latents`.
        """
        if self._one_step is not None and sampling.steps == 1:
            return (dict(sorted(features.items())),)  # a prepared step computes its own
        null = {name: value[:1] for name, value in features.items()}
        null["video_mask"] = null["text_mask"] = torch.zeros(
            1, dtype=torch.bool, device=self.device
        )
        return (
            self.network.conditions(**features, latent_length=length),
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
        rows = len(noise)
        conditions = pytree.tree_map_only(
            Tensor, lambda x: x.expand(rows, *x.shape[1:]), conditions
        )
        if len(conditions) == 1:
            assert self._one_step is not None
            made = self._one_step(
                noise, **conditions[0], guidance=sampling.guidance, mode=sampling.mode
            )
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
            sampling.guidance,
            sampling.mode,
            sampling.instantaneous,
        )
        return self.network.unnormalize(made)

    def decode(self, latents: Tensor) -> Tensor:
        """Give waveforms `(B, N · hop)`, float32 on the CPU, of latents `(B, N, C)`.

        Raises:
            RunError: They are not finite.
        """
        waveforms = (self._captured or self.codec.decode)(latents).float().cpu()
        if not bool(torch.isfinite(waveforms).all()):
            raise RunError(
                "The network gave samples that are not finite. Use float32, less guidance, or "
                "another checkpoint."
            )
        return waveforms
