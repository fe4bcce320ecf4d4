from __future__ import annotations

import pytest
import torch

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.meanflow.targets import TARGETS, load_target
from tests.meanflow.test_objective import R, T, batch, gradients
from tests.oracle import allowance, error

TERMS = 5 * 3 * 16


def same(found, truth, terms=TERMS):
    assert error(found, truth) <= allowance(truth, torch.float64, terms)


def spread(times):
    return times[:, None, None]


def test_improved_regresses_the_compound_velocity():
    """Written as in its paper: || u + (t - r) sg(du/dt along the predicted v) - v ||^2."""
    net, x, e = batch()
    ours = meanflow.loss(net, x, noise=e, r=R, t=T, target=meanflow.improved_mean_velocity)
    z, v = (1 - spread(T)) * x + spread(T) * e, e - x
    u, du_dt = torch.func.jvp(
        lambda z, t: net(z, R, t), (z, T), (net(z, T, T).detach(), torch.ones_like(T))
    )
    compound = u + spread(T - R) * du_dt.detach()
    truth = (compound - v).square().mean()
    same(ours.detach(), truth.detach())
    for g, g_truth in zip(gradients(net, ours), gradients(net, truth), strict=True):
        same(g, g_truth)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.05])
def test_alpha_flow_has_the_gradient_of_its_paper(alpha):
    """Loss (1 / alpha) || u - (alpha v + (1 - alpha) sg u(z_s, r, s)) ||^2 for r < t."""
    net, x, e = batch()
    moving = R < T
    ours = meanflow.loss(net, x, noise=e, r=R, t=T, target=meanflow.alpha_flow(alpha))
    z, v = (1 - spread(T)) * x + spread(T) * e, e - x
    s = T - alpha * (T - R)
    behind = net(z - spread(T - s) * v, R, s).detach()
    residual = net(z, R, T) - (alpha * v + (1 - alpha) * behind)
    paper = (residual.square() / alpha).mean((1, 2))
    plain = (net(z, T, T) - v).square().mean((1, 2))
    truth = torch.where(moving, paper, plain).mean()
    for g, g_truth in zip(gradients(net, ours), gradients(net, truth), strict=True):
        same(g, g_truth, terms=TERMS / alpha**2)


def test_alpha_flow_and_finite_differences_approach_meanflow():
    """Halving the step of a first-order and of a second-order scheme divides their errors."""
    net, x, e = batch()
    truth = gradients(net, meanflow.loss_ref(net, x, {}, e, R, T))

    def distance(target):
        found = gradients(net, meanflow.loss(net, x, noise=e, r=R, t=T, target=target))
        return max(error(g, g_truth) for g, g_truth in zip(found, truth, strict=True))

    first, second = (distance(meanflow.alpha_flow(a)) for a in (2e-3, 1e-3))
    assert 1.8 < first / second < 2.2
    first, second = (distance(meanflow.finite_difference(h)) for h in (2e-2, 1e-2))
    assert 3.6 < first / second < 4.4


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_guidance_in_the_target(kappa):
    net, x, e = batch()
    condition = torch.randn(5, 3, dtype=torch.float64)
    absent = torch.tensor([False, True, False, False, False])
    velocity = meanflow.guided_velocity(
        1.0,
        kappa,
        null=lambda cond: {"condition": torch.zeros_like(cond["condition"])},
        dropped=lambda cond: absent,
        low=0.4,
        high=0.95,
    )
    ours = meanflow.loss(net, x, {"condition": condition}, noise=e, r=R, t=T, velocity=velocity)
    z, v = (1 - spread(T)) * x + spread(T) * e, e - x
    with torch.no_grad():
        with_, without = net(z, T, T, condition), net(z, T, T)
        guided = v + kappa * with_ - kappa * without
        v = torch.where(spread(absent | (T < 0.4) | (T > 0.95)), v, guided)
    u, du_dt = torch.func.jvp(lambda z, t: net(z, R, t, condition), (z, T), (v, torch.ones_like(T)))
    truth = (u - (v - spread(T - R) * du_dt).detach()).square().mean()
    same(ours.detach(), truth.detach())
    for g, g_truth in zip(gradients(net, ours), gradients(net, truth), strict=True):
        same(g, g_truth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: meanflow.alpha_flow(0.0), "use mean_velocity"),
        (lambda: meanflow.finite_difference(0.0), "more than 0"),
        (lambda: meanflow.guided_velocity(1.0, 1.0, dict), "finite below 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_every_target_is_loaded_by_name():
    """Those with a parameter have its default of the recipes and of the function."""
    net, x, e = batch()
    made = {
        "mean_velocity": meanflow.mean_velocity,
        "improved_mean_velocity": meanflow.improved_mean_velocity,
        "alpha_flow": meanflow.alpha_flow(0.1),
        "finite_difference": meanflow.finite_difference(),
    }
    assert made.keys() == TARGETS.keys()
    for name, target in made.items():
        found, truth = (
            meanflow.loss(net, x, noise=e, r=R, t=T, target=one)
            for one in (load_target(name), target)
        )
        assert torch.equal(found, truth)


def own_target(f, z, r, t, v, cond):
    return f(z, r, t, **cond), v


def test_a_target_of_ones_own_is_loaded_from_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text(
        "def plain(f, z, r, t, v, cond):\n    return f(z, r, t, **cond), v\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net, x, e = batch()
    found, truth = (
        meanflow.loss(net, x, noise=e, r=R, t=T, target=one)
        for one in (load_target("my_objective:plain"), own_target)
    )
    assert torch.equal(found, truth)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"^target=mean: choose one of mean_velocity, .*, package\.module:function\.$"),
        ("", "^target=: choose one of"),
        ("no_such_module:f", r"No module named 'no_such_module'\. Give package.*PYTHONPATH\.$"),
        ("json:no_such_function", "has no attribute 'no_such_function'"),
        ("json:", "cannot be imported"),
        (":loads", "cannot be imported"),
        ("json:__name__", "it is a str"),
        (".relative:f", "cannot be imported"),
    ],
)
def test_names_of_no_target_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        load_target(name)


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_objective.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match="target=broken_objective:f cannot be imported: division by zero"
    ):
        load_target("broken_objective:f")
