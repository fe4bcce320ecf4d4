"""The MeanFlow loss of any callable, at nearly the cost of flow matching.

With x data, e noise and t from data to noise: z = (1 − t)x + t·e, v = e − x, and the average
velocity u over [r, t] obeys u = v − (t − r)·du/dt (arXiv 2505.13447). du/dt along the path is a
derivative with tangents (v, 0, 1) for (z, r, t). `loss_ref` is this definition. du/dt does not
matter where r = t, so `loss` evaluates only the samples with r < t with tangents; there are few
(10 % in arXiv 2509.06389).

Networks that call `F.scaled_dot_product_attention` need its math backend for samples with tangents
(`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`): PyTorch's fused kernels have no forward mode
and say so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.meanflow._network import (
    Cond,
    Network,
    called_in,
    in_one_pass,
    network_dtype,
    rows,
)
from mfmjt.meanflow.tangent import value_and_tangent
from mfmjt.meanflow.targets import Target, Velocity, mean_velocity, regressed_to
from mfmjt.meanflow.times import TimeSampler, logit_normal, time_pairs

__all__ = ["LossStats", "condition_dropout", "loss", "loss_and_errors", "loss_ref"]

_PAPER_TIMES = logit_normal(-2.0, 2.0)


def loss_ref(
    f: Network,
    x: Tensor,
    cond: Cond,
    noise: Tensor,
    r: Tensor,
    t: Tensor,
    p: float = 0.0,
    c: float = 1e-3,
) -> Tensor:
    """Compute the MeanFlow loss as its paper defines it (arXiv 2505.13447, algorithm 1).

    Every sample has a tangent, whatever its interval. `loss` equals this for every choice that it
    makes, and documents the arguments.
    """
    a, b = (time.view(-1, *(1 for _ in x.shape[1:])) for time in (r, t))
    z, v = (1 - b) * x + b * noise, noise - x
    u, du_dt, *_ = torch.func.jvp(lambda z, t: f(z, r, t, **cond), (z, t), (v, torch.ones_like(t)))
    target = (v - (b - a) * du_dt).detach()
    d = (u - target).square().flatten(1).mean(1)
    return (d * (d.detach() + c) ** -p).mean()


class LossStats(NamedTuple):
    """Unweighted squared errors per element, detached; NaN for a kind without samples.

    Attributes:
        flow: Mean over the samples with r = t, the flow-matching error.
        interval: Mean over the samples with r < t.
    """

    flow: Tensor
    interval: Tensor


def loss(
    f: Network,
    x: Tensor,
    cond: Cond | None = None,
    ratio: float = 0.1,
    noise: Tensor | None = None,
    r: Tensor | None = None,
    t: Tensor | None = None,
    time_sampler: TimeSampler = _PAPER_TIMES,
    p: float = 0.0,
    c: float = 1e-3,
    generator: torch.Generator | None = None,
    intervals: int | None = None,
    target: Target = mean_velocity,
    velocity: Velocity | None = None,
    return_stats: bool = False,
    balance: bool = False,
) -> Tensor:
    """Compute the MeanFlow loss: mean of w·d over samples, d = mean of (u − target)² over elements.

    target = v − (t − r)·du/dt and w = (d + c)^(−p) are constants for the gradient. d is a mean, not
    a sum: p = 0 is then the plain mean squared error whatever the latent's size, and c is an error
    per element.

    Args:
        f: f(z, r, t, **cond) -> u, shaped like z. Called in the dtype of x and with subsets of the
            batch: once for the samples with r < t, under `torch.func.jvp`, and once for the others;
            or once for all, where f has a method `jvp_rows` and that is faster (see `tangent`). A
            network in `DistributedDataParallel` is given as it is, and `fully_shard`'s too.
        x: Clean data (B, ...), noise-free and normalized, in the dtype that f takes. The mixture,
            the target and the loss are computed in float32 or wider; times are rounded to the dtype
            of x first, so that f gets exactly the times of z.
        cond: Keyword arguments for f, all with the batch first: tensors or tuples of them.
        ratio: Share of samples with r < t; their number is round(ratio·B), so that shapes are
            static. 0 is flow matching. Ignored where r is given.
        noise: Standard normal, like x; drawn by default.
        r: End of the intervals (B,), with t; by default drawn. Which samples have r < t is read
            from the values, which waits for the device; under `torch.compile` all get tangents.
        t: Begin of the intervals (B,). Alone, it fixes t, and r ≤ t is drawn.
        time_sampler: Distribution of both times; see `logit_normal`.
        p: Exponent of the adaptive weight; 0 weighs all samples alike, 1 is close to a log loss.
        c: Keeps the weight finite.
        generator: Source of all draws.
        intervals: Number of samples with r < t, where r and t are given and these samples come
            first, as `time_pairs` draws them; r and t are then not read. Not verified.
        target: What samples with r < t are regressed to; see `mfmjt.meanflow.targets` for others:
            `improved_mean_velocity`, `alpha_flow`, `finite_difference`.
        velocity: Takes the place of v, as `guided_velocity` does. Called with all samples.
        return_stats: Deprecated: what `loss_and_errors` returns.
        balance: Scale the errors of samples with r < t so that their mean is that of the others, as
            AnyFlow does (arXiv 2605.13724); the scale is a constant. Not with p > 0, which weighs
            every sample by itself. Without samples of both kinds nothing is scaled.

    Returns:
        A scalar, float32 or wider.

    Raises:
        InputError: A shape does not fit, or ratio is no share.
    """
    value, stats = loss_and_errors(
        f,
        x,
        cond,
        ratio,
        noise,
        r,
        t,
        time_sampler,
        p,
        c,
        generator,
        intervals,
        target,
        velocity,
        balance,
    )
    return (value, stats) if return_stats else value  # type: ignore[return-value]


@in_one_pass
def loss_and_errors(
    f: Network,
    x: Tensor,
    cond: Cond | None = None,
    ratio: float = 0.1,
    noise: Tensor | None = None,
    r: Tensor | None = None,
    t: Tensor | None = None,
    time_sampler: TimeSampler = _PAPER_TIMES,
    p: float = 0.0,
    c: float = 1e-3,
    generator: torch.Generator | None = None,
    intervals: int | None = None,
    target: Target = mean_velocity,
    velocity: Velocity | None = None,
    balance: bool = False,
) -> tuple[Tensor, LossStats]:
    """Return `loss` and the mean errors of both kinds of samples. Arguments are those of `loss`."""
    if balance and p:
        raise InputError(
            f"balance with p = {p}: the adaptive weight has already evened out the errors. "
            "Give p=0, or no balance."
        )
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio is {ratio}: it is a share of the batch. Give 0 to 1.")
    batch, device = x.shape[0], x.device
    work, dtype = torch.promote_types(x.dtype, torch.float32), network_dtype(x)
    x = x.to(work)
    if noise is None:
        noise = torch.randn(x.shape, dtype=work, device=device, generator=generator)
    for name, value, shape in (("noise", noise, x.shape), ("r", r, (batch,)), ("t", t, (batch,))):
        if value is not None and value.shape != shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}: the batch needs {tuple(shape)}. "
                "Give one for each sample."
            )
    if r is None:
        intervals = round(ratio * batch)
        r, drawn_t = time_pairs(batch, intervals, time_sampler, device, generator)
        t = drawn_t if t is None else t
        r = torch.minimum(r, t)
    elif t is None:
        raise InputError("r is given without t: an interval needs its begin. Give both.")
    elif intervals is None and torch.compiler.is_compiling():
        intervals = batch  # right for r = t too, whose span is zero
    r, t, noise = r.to(dtype).to(work), t.to(dtype).to(work), noise.to(work)

    at = t.view(-1, *(1 for _ in x.shape[1:]))
    z, v = (1 - at) * x + at * noise, noise - x
    call, cond = f if dtype == work else called_in(dtype, f), dict(cond or {})
    if velocity is not None:
        v = velocity(call, z, t, v, dict(cond)).detach()

    if intervals is not None and target is mean_velocity:  # one call may evaluate all samples
        ends = torch.cat((r[:intervals], t[intervals:]))
        u, du_dt, u_flow = value_and_tangent(
            f, z.to(dtype), ends.to(dtype), t.to(dtype), v.to(dtype), cond, intervals
        )
        goal = regressed_to(v[:intervals], r[:intervals], t[:intervals], du_dt)
    else:
        if intervals is None:  # bring the samples with r < t to the front
            intervals = int((r != t).sum())
            z, r, t, v, cond = rows((z, r, t, v, cond), (r == t).int().argsort(stable=True))
        u = goal = u_flow = z[:0]
        if intervals:
            u, goal = target(call, *rows((z, r, t, v, cond), slice(intervals)))
        if intervals < batch:
            z, t, cond = rows((z, t, cond), slice(intervals, None))
            u_flow = call(z, t, t, **cond)
    interval_errors, flow_errors = _errors(u, goal), _errors(u_flow, v[intervals:])

    stats = LossStats(flow_errors.detach().mean(), interval_errors.detach().mean())
    if balance and 0 < intervals < batch:
        interval_errors = interval_errors * (stats.flow / stats.interval.clamp(min=1e-12))
    errors = torch.cat((interval_errors, flow_errors))
    weighted = errors if p == 0 else errors * (errors.detach() + c).pow(-p)
    return weighted.mean(), stats


def condition_dropout(
    batch: int,
    p: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which samples keep their condition: (batch,) bool, False with probability p.

    Draw one for every condition that is dropped independently, and give them to the network as its
    masks.
    """
    if not 0 <= p <= 1:
        raise InputError(f"p is {p}: it is a probability. Give 0 to 1.")
    return torch.rand(batch, generator=generator, device=device) >= p


def _errors(u: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample, (B,)."""
    if u.shape != target.shape:
        raise InputError(
            f"The network returned {tuple(u.shape)} for a latent {tuple(target.shape)}: the "
            "velocity has the latent's shape. Check the network's output layer."
        )
    return (u.to(target.dtype) - target).square().flatten(1).mean(1)
