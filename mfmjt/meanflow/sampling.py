"""From noise to data in one step or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.meanflow._dtype import network_dtype
from mfmjt.meanflow._tree import Cond, stack
from mfmjt.meanflow.capture import Captured
from mfmjt.meanflow.guidance import GuidanceMode, check_mode, guide

__all__ = ["OneStep", "Sampling", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How noise becomes data.

    Attributes:
        steps: Evaluations of the network, twice that many with guidance.
        guidance: Scale w of guidance; 1 follows the conditions as they are.
        mode: See `guide`.
        instantaneous: The network learned flow matching: it is evaluated at r = t.

    Raises:
        InputError: A value out of range, or an unknown mode.
    """

    steps: int = 1
    guidance: float = 1.5
    mode: GuidanceMode = "cfg_scaled"
    instantaneous: bool = False

    def changed(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        mode: GuidanceMode | None = None,
    ) -> Sampling:
        """Return this with other values where they are given."""
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
            mode=self.mode if mode is None else mode,
        )

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if not 1 <= self.steps <= 1000:
            raise InputError(
                f"steps is {self.steps}. Give 1 to 1000; one is what the network is made for."
            )
        if not 0 <= self.guidance <= 100:
            raise InputError(f"guidance is {self.guidance}. Give 0 to 100, such as 1.5.")


@torch.no_grad()
def sample(
    f: Callable[..., Tensor],
    noise: Tensor,
    steps: int = 1,
    cond: Cond | None = None,
    null: Cond | None = None,
    guidance: float | Tensor = 1.0,
    mode: GuidanceMode = "cfg_scaled",
    instantaneous: bool = False,
) -> Tensor:
    """Follow z_r = z_t − (t − r)·u(z_t, r, t) from t = 1 to 0 in equal steps.

    Args:
        f: f(z, r, t, **cond) -> u, shaped like z; r and t are (B,). Called in the dtype of noise.
        noise: z at t = 1, (B, ...), standard normal.
        steps: Number of intervals.
        cond: Keyword arguments for f.
        null: The same without condition, for guidance. Where names and shapes agree with `cond`,
            both passes are one batch of 2B.
        guidance: Scale w, a number or as `guide` takes it; the number 1 needs no second pass.
        mode: See `guide`.
        instantaneous: f is a flow-matching network: evaluate it at r = t (Euler's method).

    Returns:
        Data, in the shape and dtype of noise.

    Raises:
        InputError: No steps, unknown mode, or guidance without `null`.
    """
    check_mode(mode)
    if steps < 1:
        raise InputError(f"steps is {steps}: sampling takes at least one. Give 1 or more.")
    cond = {} if cond is None else cond
    guided = mode != "none" and (isinstance(guidance, Tensor) or guidance != 1.0)
    both: dict[str, Any] | None = None
    if guided:
        if null is None:
            raise InputError(
                f"guidance is {guidance} and null is missing: guidance compares with the network "
                "without condition. Give null=, or guidance=1."
            )
        both = stack(cond, null)

    def velocity(z: Tensor, r: float, t: float) -> Tensor:
        z = z.to(dtype)

        def at(count: int) -> tuple[Tensor, Tensor]:
            now = torch.full((count,), t, dtype=z.dtype, device=z.device)
            return (now if instantaneous else torch.full_like(now, r)), now

        batch = z.shape[0]
        if not guided or null is None:
            return f(z, *at(batch), **cond)
        if both is not None:
            u_c, u_0 = f(torch.cat((z, z)), *at(2 * batch), **both).chunk(2)
        else:
            u_c, u_0 = f(z, *at(batch), **cond), f(z, *at(batch), **null)
        return guide(u_c, u_0, guidance, mode)

    dtype = network_dtype(noise)
    # The state is kept in float32 or wider: rounding it at every step would add up.
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for i in range(steps, 0, -1):
        t, r = i / steps, (i - 1) / steps
        z = z - velocity(z, r, t).to(z.dtype) / steps
    return z.to(noise.dtype)


class OneStep:
    """One guided step of a multimodal network, both passes in one batch.

    A network with a method `frozen(r, t)`, such as `mfmjt.MFMJT`, is made ready for the one
    interval of one step at once: what does not depend on the latent is computed here. Change the
    network's weights, and make another. On a CUDA device the step is one graph for each shape.

    Args:
        net: net(z, r, t, video=, sync=, text=, video_mask=, text_mask=) -> u.
        guidance: Scale w; 1 needs no second pass.
        mode: See `guide`.
        compile: False calls the network as it is, without freezing and without graphs.

    Raises:
        InputError: Unknown mode.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        guidance: float = 1.5,
        mode: GuidanceMode = "cfg_scaled",
        compile: bool = True,
    ) -> None:
        check_mode(mode)
        self.net = net
        self.guidance = guidance
        self.mode: GuidanceMode = mode
        self._step: Callable[..., Tensor] = self._sample
        if compile:
            freeze = getattr(net, "frozen", None)
            ready = None if freeze is None else freeze(0.0, 1.0)
            step = self._sample if ready is None else ready.step
            self._step = Captured(step, getattr(ready, "reads", None))

    @torch.no_grad()
    def __call__(
        self,
        z: Tensor,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Data for noise.

        Args:
            z: Noise (B, N, C).
            video: Features of the network's conditions, (B, N_video, C_video).
            sync: Likewise (B, N_sync, C_sync).
            text: Likewise (B, N_text, C_text).
            video_mask: (B,) bool; samples that are False have no video.
            text_mask: (B,) bool; samples that are False have no text.

        Returns:
            Data, in the shape and dtype of z.
        """
        given = {
            "video": video,
            "sync": sync,
            "text": text,
            "video_mask": video_mask,
            "text_mask": text_mask,
        }
        there = {name: value for name, value in given.items() if value is not None}
        return self._step(z, **there, guidance=self.guidance, mode=self.mode)

    def _sample(
        self,
        z: Tensor,
        *,
        guidance: float | Tensor,
        mode: GuidanceMode,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        **features: Tensor,
    ) -> Tensor:
        keep = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
        seen = keep if video_mask is None else video_mask
        read = keep if text_mask is None else text_mask
        return sample(
            self.net,
            z,
            cond={**features, "video_mask": seen, "text_mask": read},
            null={**features, "video_mask": ~keep, "text_mask": ~keep},
            guidance=guidance,
            mode=mode,
        )
