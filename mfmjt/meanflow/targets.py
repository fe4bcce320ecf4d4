"""What the network is regressed to: MeanFlow's target and its relatives, as small functions.

Notation is that of `objective`: z = (1 − t)x + t·e, v = e − x, time from data (0) to noise (1). A
`Target` gets the samples with r < t; it returns the prediction, with its graph, and the value to
regress it to, without one. A `Velocity` returns the v that all samples are regressed to. Both
compute in float32 or wider; the f that they get casts its latents and times itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfmjt.errors import InputError, reason
from mfmjt.meanflow._network import Network
from mfmjt.meanflow.tangent import derivative, end_derivative

__all__ = [
    "TARGETS",
    "Target",
    "Velocity",
    "alpha_flow",
    "control_variate",
    "finite_difference",
    "guided_velocity",
    "improved_mean_velocity",
    "load_target",
    "lsd",
    "mean_velocity",
    "regressed_to",
    "teacher_rollout",
    "teacher_velocity",
    "tvm",
]

Target = Callable[
    [Network, Tensor, Tensor, Tensor, Tensor, "dict[str, Any]"], "tuple[Tensor, Tensor]"
]
"""target(f, z, r, t, v, cond) -> (u, target), both shaped like z."""
Velocity = Callable[[Network, Tensor, Tensor, Tensor, "dict[str, Any]"], Tensor]
"""velocity(f, z, t, v, cond) -> the v to use instead, of the same shape, without a graph."""


def mean_velocity(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """MeanFlow: v − (t − r)·du/dt, du/dt in forward mode along (v, 0, 1) (arXiv 2505.13447)."""
    u, du_dt = derivative(f, z, r, t, v, cond)
    return u, regressed_to(v, r, t, du_dt)


def improved_mean_velocity(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Improved MeanFlow: du/dt along the velocity that f itself predicts (arXiv 2512.02012).

    The regression of V = u + (t − r)·du/dt to v is that of u to v − (t − r)·du/dt, du/dt being a
    constant. The predicted velocity is f at r = t, which costs one more evaluation; the paper's
    second head for it is no part of the networks here.
    """
    with torch.no_grad():
        predicted = f(z, t, t, **cond).to(z.dtype)
    u, du_dt = derivative(f, z, r, t, predicted, cond)
    return u, regressed_to(v, r, t, du_dt)


def control_variate(share: float = 0.94) -> Target:
    """MeanFlow with du/dt along share·v + (1 − share)·u(z, t, t) (arXiv 2605.09235).

    v is that of one clip and its noise; f at r = t is their mean, as far as it has been learned.
    The mixture keeps the expected direction and lowers the variance of the gradient. share = 1 is
    `mean_velocity`, share = 0 is `improved_mean_velocity`. Costs one more evaluation, without a
    graph.

    Raises:
        InputError: share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}: it is a share of the velocity. Give 0 to 1.")

    def target(
        f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            along = torch.lerp(f(z, t, t, **cond).to(z.dtype), v, share)
        u, du_dt = derivative(f, z, r, t, along, cond)
        return u, regressed_to(v, r, t, du_dt)

    return target


def teacher_rollout(teacher: Network, steps: int = 8) -> Target:
    """Regress to (z_t − z_r) / (t − r), where a trained network leads from z_t to z_r.

    No derivative: distillation of a flow-matching network in the form of an average velocity, as
    few-step speech models are trained (dots.tts). The teacher takes equal steps of the midpoint
    method at r = t, 2·steps evaluations without a graph.

    Args:
        teacher: teacher(z, r, t, **cond), called with f's conditions.
        steps: From t to r.

    Raises:
        InputError: No steps.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}: the teacher takes at least one. Give 1 or more.")

    @torch.no_grad()
    def mean(z: Tensor, r: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        stride, at = (t - r) / steps, t
        total = torch.zeros_like(z)
        place = z
        for _ in range(steps):
            first = teacher(place, at, at, **cond).to(z.dtype)
            middle = at - stride / 2
            second = teacher(place - _span(stride / 2, z) * first, middle, middle, **cond)
            total += second.to(z.dtype)
            place = place - _span(stride, z) * second.to(z.dtype)
            at = at - stride
        return total / steps

    def target(
        f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return f(z, r, t, **cond), mean(z, r, t, cond)

    return target


def lsd(
    f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Lagrangian self-distillation: a jump ends with the velocity there (arXiv 2505.18825).

    z_r = z - (t - r)u(z, r, t) moves with r as dz_r/dr = u - (t - r)·du/dr, which is regressed to
    u(z_r, r, r), a constant. The gradient goes through du/dr (`kernels.differentiable_tangents`),
    whose forward mode moves r alone. Costs one more evaluation, without a graph. The samples with
    r = t teach the velocity itself; give them three quarters, ratio = 0.25, as Pocket TTS does.
    """
    return _terminal(f, f, z, r, t, cond)


def tvm(teacher: Network) -> Target:
    """Terminal velocity matching (arXiv 2511.19797): `lsd` to a teacher's velocity at the end.

    Args:
        teacher: teacher(z, r, t, **cond), called at r = t with f's conditions, without a graph. In
            the paper it is the average of f's weights over the training.
    """

    def target(
        f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return _terminal(f, teacher, z, r, t, cond)

    return target


def _terminal(
    f: Network, teacher: Network, z: Tensor, r: Tensor, t: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the velocity with which a jump's end moves, and that of `teacher` at the end."""
    u, du_dr = (x.to(z.dtype) for x in end_derivative(f, z, r, t, cond))
    span = _span(t - r, z)
    with torch.no_grad():
        goal = teacher(z - span * u, r, r, **cond).to(z.dtype)
    return u - span * du_dr, goal


def finite_difference(h: float = 5e-3) -> Target:
    """MeanFlow with du/dt ≈ (u(z + hv, r, t + h) − u(z − hv, r, t − h)) / 2h; no forward mode.

    A baseline: two more evaluations without a graph, an error of order h², and differences of
    rounded numbers over 2h: in bfloat16 nothing exact is left of it. Times leave [0, 1] by h.

    Raises:
        InputError: h is not positive.
    """
    if h <= 0:
        raise InputError(f"h is {h}: it is a step in time. Give more than 0, such as 0.005.")

    def target(
        f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            later, earlier = (f(z + s * v, r, t + s, **cond).to(z.dtype) for s in (h, -h))
        return f(z, r, t, **cond), v - _span(t - r, z) * (later - earlier) / (2 * h)

    return target


def alpha_flow(alpha: float) -> Target:
    """alpha-Flow: α·v + (1 − α)·u(z_s, r, s) with s = t − α(t − r) (arXiv 2510.20771).

    z_s = z − (t − s)v. α = 1 is trajectory flow matching, α = 1/2 with a shortcut's step; as α goes
    to 0 this becomes MeanFlow, without a derivative. Lower α during training, and end with
    `mean_velocity`. The paper weighs the squared error with 1/α. Here the difference to the
    prediction is divided by α instead, which gives the same gradient, and errors that are
    comparable for all α.

    Raises:
        InputError: α is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise InputError(
            f"alpha is {alpha}: it is the share of the interval that is walked along v. Give more "
            "than 0 and at most 1; for the limit 0 use mean_velocity."
        )

    def target(
        f: Network, z: Tensor, r: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        u = f(z, r, t, **cond)
        walked = alpha * (t - r)
        with torch.no_grad():
            behind = f(z - _span(walked, z) * v, r, t - walked, **cond).to(z.dtype)
            now = u.detach().to(z.dtype)
            goal = now - (now - (alpha * v + (1 - alpha) * behind)) / alpha
        return u, goal

    return target


TARGETS: dict[str, Target] = {
    "mean_velocity": mean_velocity,
    "improved_mean_velocity": improved_mean_velocity,
    "alpha_flow": alpha_flow(0.1),
    "finite_difference": finite_difference(),
    "control_variate": control_variate(),
    "lsd": lsd,
}
"""The targets by name, those that take a parameter with its usual value."""
FACTORIES: dict[str, Callable[..., Target]] = {
    "alpha_flow": alpha_flow,
    "finite_difference": finite_difference,
    "control_variate": control_variate,
    "teacher_rollout": teacher_rollout,
    "tvm": tvm,
}
"""The targets that take parameters."""


def load_target(name: str, **options: Any) -> Target:
    """Return the target of this name.

    Args:
        name: A key of `TARGETS`, or `package.module:function` for a target of your own.
        options: Parameters of a target that takes some, such as h of `finite_difference`.

    Raises:
        InputError: It is neither, cannot be imported, or does not take these parameters.
    """
    if options:
        if name not in FACTORIES:
            raise InputError(
                f"target={name} takes no parameters, and {', '.join(options)} was given. Those "
                f"that do are {', '.join(FACTORIES)}."
            )
        try:
            return FACTORIES[name](**options)
        except TypeError as error:
            raise InputError(
                f"target={name} with {options}: {reason(error)}. Correct it."
            ) from error
    module, sign, function = name.partition(":")
    if not sign:
        if name not in TARGETS:
            raise InputError(
                f"target={name}: choose one of {', '.join(TARGETS)}, package.module:function."
            )
        return TARGETS[name]
    try:
        found: Target = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"it is a {type(found).__name__}")
    except Exception as error:  # importing runs the user's code
        raise InputError(
            f"target={name} cannot be imported: {reason(error)}. Give package.module:function, "
            "and put the folder that holds the package on PYTHONPATH."
        ) from error
    return found


def guided_velocity(
    omega: float,
    kappa: float,
    null: Callable[[dict[str, Any]], dict[str, Any]],
    dropped: Callable[[dict[str, Any]], Tensor] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """Guidance inside the target, so that one evaluation is guided (arXiv 2505.13447, eq. 19).

    v becomes ω·v + κ·u(z, t, t | c) + (1 − ω − κ)·u(z, t, t | ∅), a guidance scale of ω / (1 − κ)
    in effect. Costs two evaluations without a graph, or one for κ = 0.

    Args:
        omega: ω.
        kappa: κ; below 1.
        null: Returns the conditions of the unconditional evaluation for given ones.
        dropped: Returns which samples are trained without conditions, (B,) bool; they keep v.
        low: Earlier times t keep v.
        high: Later times t keep v.

    Raises:
        InputError: κ is 1 or more.
    """
    if kappa >= 1:
        raise InputError(f"kappa is {kappa}: the scale omega / (1 - kappa) is finite below 1.")

    @torch.no_grad()
    def velocity(f: Network, z: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]) -> Tensor:
        guided = omega * v + (1 - omega - kappa) * f(z, t, t, **null(cond)).to(v.dtype)
        if kappa:
            guided += kappa * f(z, t, t, **cond).to(v.dtype)
        keeps = (t < low) | (t > high)
        if dropped is not None:
            keeps = keeps | dropped(cond)
        return torch.where(_span(keeps, v), v, guided)

    return velocity


def teacher_velocity(teacher: Network) -> Velocity:
    """Take the velocity of a trained network, teacher(z, t, t), in place of v (arXiv 2511.13019).

    It is the mean over the clips that lead through z, so that the target has no noise of its own.
    Costs one evaluation of the teacher without a graph.
    """

    @torch.no_grad()
    def velocity(f: Network, z: Tensor, t: Tensor, v: Tensor, cond: dict[str, Any]) -> Tensor:
        return teacher(z, t, t, **cond).to(v.dtype)

    return velocity


def regressed_to(v: Tensor, r: Tensor, t: Tensor, du_dt: Tensor) -> Tensor:
    """Return MeanFlow's target, v − (t − r)·du/dt, without a graph."""
    return v - _span(t - r, v) * du_dt.detach().to(v.dtype)


def _span(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ...), in like's dtype unless it is a mask."""
    shaped = per_sample.view(-1, *(1 for _ in like.shape[1:]))
    return shaped if shaped.dtype == torch.bool else shaped.to(like.dtype)
