"""From noise to data in one step or many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.meanflow._network import Cond, Network, network_dtype, stack
from mfmjt.meanflow.guidance import GuidanceMode, check_mode, guide

__all__ = ["Sampling", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How noise becomes data: those parameters of `sample` by their names.

    `sample(f, noise, cond=cond, null=null, **dataclasses.asdict(sampling))` uses it.

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
        mode: str | None = None,
    ) -> Sampling:
        """Return this with other values where they are given, checked like any."""
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
            mode=self.mode if mode is None else cast(GuidanceMode, mode),
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
    f: Network,
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
    if guided and null is None:
        raise InputError(
            f"guidance is {guidance} and null is missing: guidance compares with the network "
            "without condition. Give null=, or guidance=1."
        )
    both = stack(cond, null) if guided and null is not None else None
    dtype = network_dtype(noise)

    def velocity(z: Tensor, r: float, t: float) -> Tensor:
        def u(z: Tensor, cond: Cond) -> Tensor:
            now = torch.full((z.shape[0],), t, dtype=dtype, device=z.device)
            return f(z, now if instantaneous else torch.full_like(now, r), now, **cond)

        z = z.to(dtype)
        if not guided or null is None:
            return u(z, cond)
        if both is not None:
            u_c, u_0 = u(torch.cat((z, z)), both).chunk(2)
        else:
            u_c, u_0 = u(z, cond), u(z, null)
        return guide(u_c, u_0, guidance, mode)

    # The state is kept in float32 or wider: rounding it at every step would add up.
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for i in range(steps, 0, -1):
        t, r = i / steps, (i - 1) / steps
        z = z - velocity(z, r, t).to(z.dtype) / steps
    return z.to(noise.dtype)
