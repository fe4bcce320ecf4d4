from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from tests.meanflow import exact
from tests.oracle import DTYPES, allowance, error

R = torch.tensor([0.1, 0.5, 0.0, 0.9, 0.3], dtype=torch.float64)
T = torch.tensor([0.6, 0.5, 1.0, 0.9, 0.35], dtype=torch.float64)


class Network(nn.Module):
    """Plain PyTorch, dependent on everything, with its own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(4 + 2 + 3, 16)
        self.qkv = nn.Linear(16, 48)
        self.outward = nn.Linear(16, 4)

    def forward(self, z, r, t, condition=None):
        times = torch.stack((r, t), -1)[:, None].expand(-1, z.shape[1], -1)
        if condition is None:
            condition = z.new_zeros(z.shape[0], 3)
        x = torch.cat((z, times, condition[:, None].expand(-1, z.shape[1], -1)), -1)
        x = torch.tanh(self.inward(x))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.outward(x)


def batch():
    return Network().double(), *torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind()


def gradients(net, value):
    wanted = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


def small_mfmjt():
    net = MFMJT.from_config(
        "nano", hidden_dim=16, num_heads=2, depth=2, fused_depth=1, latent_dim=4
    )
    net = net.double()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def same_as_definition(net, x, cond, noise, r, t, p, value):
    """The loss and its gradients are those of `loss_ref`, up to rounding of float64."""
    truth = meanflow.loss_ref(net, x, cond, noise, r, t, p)
    assert error(value.detach(), truth.detach()) <= allowance(truth.detach(), x.dtype, 64)
    found, true = gradients(net, value), gradients(net, truth)
    if isinstance(net, MFMJT):  # some of its parameters have a gradient of roundings alone
        found, true = ([torch.cat([g.flatten() for g in each])] for each in (found, true))
    for g, g_true in zip(found, true, strict=True):
        assert error(g, g_true) <= allowance(g_true, x.dtype, x.shape[0] * 3 * 16)


INTERVALS = {
    "some": R,
    "none": T,
    "all": 0.5 * T,
    "one": torch.where(torch.arange(5) == 3, 0.0, T),
}


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("r", INTERVALS)
@pytest.mark.parametrize("known", [False, True])
def test_loss_is_its_definition(p, r, known):
    """Whichever samples carry tangents, and whether they are found by value or known."""
    net, x, e = batch()
    r, t, cond = INTERVALS[r], T, {"condition": torch.randn(5, 3, dtype=torch.float64)}
    count = int((r < t).sum())
    if known:
        order = (r < t).sort(descending=True, stable=True).indices
        r, t = r[order], t[order]
    value = meanflow.loss(net, x, cond, noise=e, r=r, t=t, p=p, intervals=count if known else None)
    same_as_definition(net, x, cond, e, r, t, p, value)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("t", [None, T])
def test_drawn_it_is_its_definition(ratio, t):
    """Noise is drawn first, then the times; where t is given, only r is drawn."""
    net, x, _ = batch()
    value = meanflow.loss(net, x, ratio=ratio, t=t, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    e = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    count = round(5 * ratio)
    sampler = meanflow.logit_normal(-2.0, 2.0)
    r, drawn = meanflow.time_pairs(5, count, sampler, x.device, generator)
    t = drawn.double() if t is None else t
    r = torch.where(torch.arange(5) < count, torch.minimum(r, t), t)
    same_as_definition(net, x, {}, e, r, t, 0.0, value)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_in_one_call_it_is_its_definition(count, monkeypatch):
    """A network with `jvp_rows` is called with all samples, where few have a tangent."""
    net, calls = small_mfmjt(), []
    jvp_rows = MFMJT.jvp_rows
    monkeypatch.setattr(
        MFMJT, "jvp_rows", lambda self, *a, **k: calls.append(1) or jvp_rows(self, *a, **k)
    )
    config, length = net.config, 9
    x, noise = torch.randn(2, 6, length, 4, dtype=torch.float64).unbind()
    sizes = zip(config.lengths(length), (config.video_dim, config.sync_dim), strict=True)
    video, sync = (torch.randn(6, *size, dtype=torch.float64) for size in sizes)
    cond = {"video": video, "sync": sync, "video_mask": torch.arange(6) % 2 == 0}
    t = torch.rand(6, dtype=torch.float64)
    r = torch.where(torch.arange(6) < count, t * torch.rand(6), t)
    value = meanflow.loss(net, x, cond, noise=noise, r=r, t=t, p=0.5, intervals=count)
    assert len(calls) == (0 < count <= 3)
    same_as_definition(net, x, cond, noise, r, t, 0.5, value)


def test_intervals_beyond_the_first_are_not_looked_at():
    """Where their number is given, u of the other samples is that of r = t, in one call too."""
    x, noise = torch.randn(2, 4, 9, 4, dtype=torch.float64).unbind()
    t = torch.rand(4, dtype=torch.float64)
    for net in (small_mfmjt(), lambda z, r, t: z * (t - r + 1)[:, None, None]):
        found, truth = (
            meanflow.loss(net, x, noise=noise, r=r, t=t, intervals=2)
            for r in (0.5 * t, torch.where(torch.arange(4) < 2, 0.5 * t, t))
        )
        assert torch.equal(found, truth)


def test_number_and_kind_of_calls():
    net, x, _ = batch()
    seen = []

    def f(z, r, t):
        dual = torch.autograd.forward_ad.unpack_dual(t).tangent is not None
        seen.append((z.shape[0], dual))
        return net(z, r, t)

    for ratio, calls in ((0.0, [(5, False)]), (0.4, [(2, True), (3, False)]), (1.0, [(5, True)])):
        seen.clear()
        meanflow.loss(f, x, ratio=ratio)
        assert seen == calls


def test_without_intervals_it_is_flow_matching():
    net, x, e = batch()
    ours = meanflow.loss(net, x, ratio=0.0, noise=e, t=T)
    b = T[:, None, None]
    truth = nn.functional.mse_loss(net((1 - b) * x + b * e, T, T), e - x)
    assert error(ours.detach(), truth.detach()) <= allowance(truth.detach(), torch.float64, 64)


def test_true_average_velocity_has_no_loss_and_no_gradient():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    x, e = exact.pair(z, T)
    error_term = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def f(z, r, t):
        return exact.average_velocity(z, r, t) + error_term

    value, stats = meanflow.loss_and_errors(f, x, noise=e, r=R, t=T)
    scale = float(exact.velocity(z, T).abs().max() ** 2)
    eps = torch.finfo(torch.float64).eps
    # The residual is a few roundings of u, divided by the shortest span once per derivative.
    residual = 64 * eps / float((T - R)[R < T].min())
    assert float(value.detach()) <= residual**2 * scale
    assert float(stats.flow) <= residual**2 * scale
    assert float(stats.interval) <= residual**2 * scale
    (gradient,) = torch.autograd.grad(value, error_term)
    assert float(gradient.abs().max()) <= 2 * residual * scale
    wrong = meanflow.loss(lambda z, r, t: f(z, r, t) + 0.1, x, noise=e, r=R, t=T).detach()
    offset = torch.tensor(0.1**2, dtype=torch.float64)
    assert error(wrong, offset) <= 2 * 0.1 * residual * scale + allowance(offset, z.dtype, 64)


def test_target_is_a_constant():
    # u = k·z with one parameter: only the value's dependence on k may count.
    k = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x, e = torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind()
    value = meanflow.loss(lambda z, r, t: k * z, x, noise=e, r=R, t=T)
    (gradient,) = torch.autograd.grad(value, k)
    a, b = R[:, None, None], T[:, None, None]
    z, v = (1 - b) * x + b * e, e - x
    d = k.detach() * z - (v - (b - a) * k.detach() * v)
    truth = (2 * d * z).mean()
    assert error(gradient, truth) <= allowance(truth, torch.float64, 64)


def test_adaptive_weight():
    x, e = torch.zeros(5, 3, 4), torch.zeros(5, 3, 4)
    offset = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])

    def f(z, r, t):
        return z + offset[: z.shape[0], None, None]

    d = offset**2
    for p in (0.0, 0.75, 1.0):
        value = meanflow.loss(f, x, ratio=0.0, noise=e, p=p, c=0.1)
        truth = (d / (d + 0.1) ** p).mean()
        assert error(value, truth) <= allowance(truth, torch.float32, 64)


def test_statistics():
    net, x, e = batch()
    value, stats = meanflow.loss_and_errors(net, x, noise=e, r=R, t=T, p=1.0)
    interval = R < T
    for mine, rows in ((stats.interval, interval), (stats.flow, ~interval)):
        truth = meanflow.loss_ref(net, x[rows], {}, e[rows], R[rows], T[rows]).detach()
        assert error(mine, truth) <= allowance(truth, torch.float64, 64)
        assert not mine.requires_grad
    assert value.requires_grad
    assert torch.equal(value, meanflow.loss(net, x, noise=e, r=R, t=T, p=1.0))
    of_old, *_ = meanflow.loss(net, x, noise=e, r=R, t=T, p=1.0, return_stats=True)
    assert torch.equal(of_old, value)
    _, alone = meanflow.loss_and_errors(net, x, ratio=0.0)
    assert alone.interval.isnan()
    assert alone.flow.isfinite()


def test_draws_are_reproducible():
    net, x, _ = batch()

    def once(seed):
        return meanflow.loss(net, x, ratio=0.4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


class Layers(nn.Module):
    """Linear layers alone, of the times too: each takes its own dtype and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.times, self.outward = nn.Linear(4, 32), nn.Linear(2, 32), nn.Linear(32, 4)

    def forward(self, z, r, t):
        x = self.inward(z) + self.times(torch.stack((r, t), -1))[:, None]
        return self.outward(torch.tanh(x))


TARGETS = {
    "mean": meanflow.mean_velocity,
    "improved": meanflow.improved_mean_velocity,
    "alpha": meanflow.alpha_flow(0.5),
    "difference": meanflow.finite_difference(0.25),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("guided", [False, True])
def test_network_is_called_in_the_dtype_of_the_data(dtype, target, guided):
    """And all else is float32 or wider: as exact as the rounded network's answers allow."""
    net = Layers().to(dtype)
    x, e = torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind()
    x = x.to(dtype)
    seen = set()

    def f(z, r, t):
        seen.update((z.dtype, r.dtype, t.dtype))
        return net(z, r, t)

    velocity = meanflow.guided_velocity(0.8, 0.3, lambda cond: cond) if guided else None
    given = {"noise": e, "r": R, "t": T, "p": 0.5, "velocity": velocity, "target": TARGETS[target]}
    value = meanflow.loss(f, x, **given)
    assert seen == {dtype}
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    found = gradients(net, value)
    assert {g.dtype for g in found} == {dtype}
    # Times as f is told them, and the data that there are: what is left is the network's rounding.
    given |= {"r": R.to(dtype).double(), "t": T.to(dtype).double()}
    truth = meanflow.loss(net.double(), x.double(), **given)
    assert error(value, truth) <= allowance(truth, dtype, 64)
    for g, g_truth in zip(found, gradients(net, truth), strict=True):
        assert error(g, g_truth) <= allowance(g_truth, dtype, 5 * 3 * 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_network_is_told_where_the_mixture_is(dtype):
    """Drawn times are rounded before the mixture is made of them, and stay in order."""
    x, e = torch.zeros(64, 1, dtype=dtype), torch.ones(64, 1, dtype=dtype)

    def f(z, r, t):
        assert torch.equal(z[:, 0], t)
        assert bool((r <= t).all())
        return z

    meanflow.loss(f, x, ratio=0.5, noise=e)


def test_autocast_takes_data_of_less_than_double():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weights in (torch.float32, dtype):
            net, x = Layers().to(weights), torch.randn(5, 3, 4).to(dtype)
            with torch.autocast("cpu", torch.bfloat16):
                value = meanflow.loss(net, x, ratio=0.4)
                made = meanflow.sample(net, x, 2)
            assert (value.dtype, made.dtype) == (torch.float32, dtype)
            assert all(g.isfinite().all() for g in gradients(net, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mfmjt_trains_in_any_dtype(dtype):
    net = MFMJT.from_config("nano", hidden_dim=16, num_heads=2, depth=2, fused_depth=1).to(dtype)
    x = torch.randn(4, 8, net.config.latent_dim, dtype=dtype)
    for ratio in (0.25, 1.0):
        value = meanflow.loss(net, x, ratio=ratio)
        value.backward()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert value.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"r": R}, "r is given without t"),
        ({"r": R[:4], "t": T}, r"r has shape \(4,\)"),
        ({"t": T[:, None]}, r"t has shape \(5, 1\)"),
        ({"noise": torch.zeros(5, 3)}, r"noise has shape \(5, 3\)"),
        ({"f": lambda z, r, t: z[:, :1]}, "The network returned"),
    ],
)
def test_misuse_is_named(change, message):
    net, x, _ = batch()
    with pytest.raises(InputError, match=message):
        meanflow.loss(**{"f": net, "x": x, **change})


def test_condition_dropout():
    count = 4000
    keep = meanflow.condition_dropout(count, 0.25, torch.Generator().manual_seed(0))
    assert keep.shape == (count,)
    assert keep.dtype == torch.bool
    spread = (0.25 * 0.75 / count) ** 0.5
    assert abs(float((~keep).float().mean()) - 0.25) < 5 * spread
    assert meanflow.condition_dropout(9, 0.0).all()
    assert not meanflow.condition_dropout(9, 1.0).any()
    with pytest.raises(InputError, match="p is 2"):
        meanflow.condition_dropout(3, 2)


COMPILED = """
import torch
from mfmjt import meanflow
from tests.support.networks import network, inputs
from tests.oracle import DTYPES, allowance, error

torch.set_num_threads(1)
torch.manual_seed(0)
net = network(depth=2, fused_depth=1)
z, r, t, features = inputs(3)
noise = torch.randn_like(z)
r[1] = t[1]

def step(r, t):
    return meanflow.loss(net, z, features, noise=noise, r=r, t=t, intervals=INTERVALS)

def gradients(function):
    net.zero_grad()
    value = function(*TIMES)
    value.backward()
    return [value.detach()] + [p.grad for p in net.parameters() if p.grad is not None]

INTERVALS, TIMES = None, (r, t)
eager = gradients(step)
compiled = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
assert len(eager) == len(compiled) > 60
for a, b in zip(eager, compiled):
    assert error(b, a) <= allowance(a, z.dtype, 3 * 10 * 9 * 256)
"""


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    # In a process of its own: a compilation that fails leaves forward mode entered.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True, timeout=600)
