"""The MeanFlow loss of any callable, at nearly the cost of flow matching.

With x data, e noise and t from data to noise: z = (1 − t)x + t·e, v = e − x, and the average
velocity u over [r, t] obeys u = v − (t − r)·du/dt (arXiv 2505.13447). du/dt along the path is a
derivative with tangents (v, 0, 1) for (z, r, t). It does not matter where r = t, so only the
samples with r < t are evaluated with tangents; there are few (10 % in arXiv 2509.06389).

Networks that call `F.scaled_dot_product_attention` need its math backend for samples with tangents
(`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`): PyTorch's fused kernels have no forward mode
and say so.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from mfmjt.errors import InputError
from mfmjt.meanflow._network import Cond, called_in, network_dtype, rows
from mfmjt.meanflow.targets import Network, Target, Velocity, mean_velocity, regressed_to
from mfmjt.meanflow.times import TimeSampler, logit_normal, time_pairs

__all__ = ["LossStats", "condition_dropout", "loss"]

_PAPER_TIMES = logit_normal(-2.0, 2.0)


class LossStats(NamedTuple):
    """Unweighted squared errors per element, detached; NaN for a kind without samples.

    Attributes:
        flow: Mean over the samples with r = t, the flow-matching error.
        interval: Mean over the samples with r < t.
    """

    flow: Tensor
    interval: Tensor


@overload
def loss(
    f: Network,
    x: Tensor,
    cond: Cond | None = ...,
    ratio: float = ...,
    noise: Tensor | None = ...,
    r: Tensor | None = ...,
    t: Tensor | None = ...,
    time_sampler: TimeSampler = ...,
    p: float = ...,
    c: float = ...,
    generator: torch.Generator | None = ...,
    intervals: int | None = ...,
    target: Target = ...,
    velocity: Velocity | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def loss(
    f: Network,
    x: Tensor,
    cond: Cond | None = ...,
    ratio: float = ...,
    noise: Tensor | None = ...,
    r: Tensor | None = ...,
    t: Tensor | None = ...,
    time_sampler: TimeSampler = ...,
    p: float = ...,
    c: float = ...,
    generator: torch.Generator | None = ...,
    intervals: int | None = ...,
    target: Target = ...,
    velocity: Velocity | None = ...,
    *,
    return_stats: Literal[True],
) -> tuple[Tensor, LossStats]: ...
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
) -> Tensor | tuple[Tensor, LossStats]:
    """MeanFlow loss: mean over samples of w·d, d = mean over elements of (u − target)².

    target = v − (t − r)·du/dt and w = (d + c)^(−p) are constants for the gradient. d is a mean, not
    a sum: p = 0 is then the plain mean squared error whatever the latent's size, and c is an error
    per element.

    Args:
        f: f(z, r, t, **cond) -> u, shaped like z. Called in the dtype of x and with subsets of the
            batch: once for the samples with r < t, under `torch.func.jvp`, and once for the others.
            On a CPU, where f has a method `jvp_rows` as `mfmjt.model.MFMJT` has, that is called
            with all instead.
        x: Clean data (B, ...), noise-free and normalised, in the dtype that f takes. The mixture,
            the target and the loss are computed in float32 or wider; times are rounded to the dtype
            of x beforehand, so that f is told exactly where z is.
        cond: Keyword arguments for f, all with the batch first: tensors or tuples of them.
        ratio: Share of samples with r < t; their number is round(ratio·B), so that shapes are
            static. 0 is flow matching. Ignored where r is given.
        noise: Standard normal, like x; drawn by default.
        r: End of the intervals (B,), with t; by default drawn. Which samples have r < t is found
            from the values, which waits for the device; under `torch.compile` all get tangents.
        t: Begin of the intervals (B,). Alone, it fixes t, and r ≤ t is drawn.
        time_sampler: Distribution of both times; see `logit_normal`.
        p: Exponent of the adaptive weight; 0 weighs all samples alike, 1 is close to a log loss.
        c: Keeps the weight finite.
        generator: Source of all draws.
        intervals: With r and t, how many samples have r < t, where they come first, as `time_pairs`
            draws them: nothing need be found then. Not verified.
        target: What samples with r < t are regressed to; see `mfmjt.meanflow.targets` for others:
            `improved_mean_velocity`, `alpha_flow`, `finite_difference`.
        velocity: Takes the place of v, as `guided_velocity` does. Called with all samples.
        return_stats: Also return `LossStats`.

    Returns:
        A scalar, float32 or wider; with the statistics if asked.

    Raises:
        InputError: A shape does not fit, or ratio is no share.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio is {ratio}: it is a share of the batch. Give 0 to 1.")
    batch, device = x.shape[0], x.device
    work = torch.promote_types(x.dtype, torch.float32)
    dtype = network_dtype(x)
    x = x.to(work)
    if noise is None:
        noise = torch.randn(x.shape, dtype=work, device=device, generator=generator)
    _check("noise", noise, x.shape)
    noise = noise.to(work)
    for name, value in (("r", r), ("t", t)):
        if value is not None:
            _check(name, value, x.shape[:1])

    if r is None:
        intervals = round(ratio * batch)
        r, drawn_t = time_pairs(batch, intervals, time_sampler, device, generator)
        t = drawn_t if t is None else t
        r = torch.cat((torch.minimum(r, t)[:intervals], t[intervals:]))
    elif t is None:
        raise InputError("r is given without t: an interval needs its begin. Give both.")
    elif intervals is None and torch.compiler.is_compiling():
        intervals = batch  # right for r = t too, whose span is zero

    r, t = r.to(dtype).to(work), t.to(dtype).to(work)
    call = f if dtype == work else called_in(dtype, f)

    with_tangent: slice | Tensor
    without: slice | Tensor
    if intervals is None:
        differ = r != t
        with_tangent, without = differ.nonzero()[:, 0], (~differ).nonzero()[:, 0]
        intervals = with_tangent.shape[0]
    else:
        with_tangent, without = slice(0, intervals), slice(intervals, None)

    at = t.view(-1, *(1 for _ in x.shape[1:]))
    z, v = (1 - at) * x + at * noise, noise - x
    cond = dict(cond or {})

    if velocity is not None:
        v = velocity(call, z, t, v, dict(cond)).detach()

    interval_errors, flow_errors = x.new_zeros(0), x.new_zeros(0)
    if (
        target is mean_velocity
        and isinstance(with_tangent, slice)
        and _pays_at_once(f, z, intervals)
    ):
        first = with_tangent
        ends = torch.cat((r[first], t[without]))
        given = (part.to(dtype) for part in (z, ends, t, v[first]))
        u, du_dt = f.jvp_rows(*given, **cond)  # type: ignore[attr-defined]
        goal = torch.cat((regressed_to(v[first], r[first], t[first], du_dt), v[without]))
        interval_errors, flow_errors = _errors(u, goal).tensor_split([intervals])
    else:
        if intervals:
            i = with_tangent
            interval_errors = _errors(*target(call, z[i], r[i], t[i], v[i], rows(cond, i)))
        if intervals < batch:
            i = without
            flow_errors = _errors(call(z[i], t[i], t[i], **rows(cond, i)), v[i])

    errors = torch.cat((interval_errors, flow_errors))
    weighted = errors if p == 0 else errors * (errors.detach() + c).pow(-p)
    if not return_stats:
        return weighted.mean()
    stats = LossStats(flow_errors.detach().mean(), interval_errors.detach().mean())
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


def _pays_at_once(f: Network, z: Tensor, intervals: int) -> bool:
    """Whether one call with all samples and a tangent beside is quicker than two calls."""
    few = 0 < intervals <= z.shape[0] // 2
    return (
        few
        and hasattr(f, "jvp_rows")
        and z.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def _errors(u: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample, (B,)."""
    if u.shape != target.shape:
        raise InputError(
            f"The network returned {tuple(u.shape)} for a latent {tuple(target.shape)}: the "
            "velocity has the latent's shape. Check the network's output layer."
        )
    return (u.to(target.dtype) - target).square().flatten(1).mean(1)


def _check(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise InputError(
            f"{name} has shape {tuple(value.shape)}: the batch needs {tuple(shape)}. "
            "Give one for each sample."
        )
