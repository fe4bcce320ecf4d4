from __future__ import annotations

import pytest
import torch

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.meanflow.targets import TARGETS, load_target
from tests.meanflow import exact
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


@pytest.mark.parametrize(
    ("share", "target"),
    [(1.0, meanflow.mean_velocity), (0.0, meanflow.improved_mean_velocity)],
)
def test_control_variate_lies_between_two_targets(share, target):
    """Both ends, and linear between: du/dt is linear in its direction."""
    net, x, e = batch()
    end = gradients(net, meanflow.loss(net, x, noise=e, r=R, t=T, target=target))
    ours = meanflow.control_variate(share)
    found = gradients(net, meanflow.loss(net, x, noise=e, r=R, t=T, target=ours))
    for g, g_truth in zip(found, end, strict=True):
        same(g, g_truth)
    z, v = (1 - spread(T)) * x + spread(T) * e, e - x
    goals = [meanflow.control_variate(s)(net, z, R, T, v, {})[1] for s in (0.0, 0.25, 1.0)]
    same(goals[1], torch.lerp(goals[0], goals[2], 0.25), terms=TERMS)


def test_a_teacher_leads_to_its_average_velocity():
    """Independent normals: the midpoint method's error falls at least fourfold."""
    net, x, e = batch()
    z = (1 - spread(T)) * x + spread(T) * e
    truth = exact.average_velocity(z, R, T)

    def teacher(z, r, t):
        assert torch.equal(r, t)
        return exact.velocity(z, t)

    def distance(steps):
        u, goal = meanflow.teacher_rollout(teacher, steps)(net, z, R, T, e - x, {})
        assert torch.equal(u, net(z, R, T))
        assert not goal.requires_grad
        return error(goal[R < T], truth[R < T])

    first, second = distance(32), distance(64)
    assert first / second > 3.7
    # Its velocity alone takes the place of the clip's.
    v = meanflow.teacher_velocity(teacher)(net, z, T, e - x, {})
    assert torch.equal(v, exact.velocity(z, T))


def test_balanced_errors():
    """The samples with r < t count as much as the others do, and their gradient is scaled alone."""
    net, x, e = batch()
    _, stats = meanflow.loss_and_errors(net, x, noise=e, r=R, t=T)
    ours = meanflow.loss(net, x, noise=e, r=R, t=T, balance=True)
    same(ours.detach(), stats.flow)
    share = (R < T).double().mean()
    flow = meanflow.loss(net, x[R == T], noise=e[R == T], r=R[R == T], t=T[R == T])
    interval = meanflow.loss(net, x[R < T], noise=e[R < T], r=R[R < T], t=T[R < T])
    truth = (1 - share) * flow + share * stats.flow / stats.interval * interval
    for g, g_truth in zip(gradients(net, ours), gradients(net, truth), strict=True):
        same(g, g_truth)
    with pytest.raises(InputError, match="Give p=0"):
        meanflow.loss(net, x, balance=True, p=1.0)


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
        (lambda: meanflow.control_variate(1.5), "Give 0 to 1"),
        (lambda: meanflow.teacher_rollout(exact.average_velocity, 0), "at least one"),
        (lambda: load_target("mean_velocity", h=1), "takes no parameters"),
        (lambda: load_target("alpha_flow", h=1), "unexpected keyword"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_every_target_is_loaded_by_name():
    """Those with a parameter have its default of the recipes and of the function."""
    net, x, e = batch()
    made = {
        "lsd": meanflow.lsd,
        "mean_velocity": meanflow.mean_velocity,
        "improved_mean_velocity": meanflow.improved_mean_velocity,
        "alpha_flow": meanflow.alpha_flow(0.1),
        "finite_difference": meanflow.finite_difference(),
        "control_variate": meanflow.control_variate(0.94),
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


def test_a_flow_map_ends_with_the_velocity_there():
    """Independent normals: what LSD and TVM regress is what they regress it to."""
    _, x, e = batch()
    z = ((1 - spread(T)) * x + spread(T) * e)[R < T]
    r, t = R[R < T], T[R < T]
    for target in (meanflow.lsd, meanflow.tvm(lambda z, r, t: exact.velocity(z, t))):
        found, goal = target(exact.average_velocity, z, r, t, z, {})
        same(found, goal, terms=TERMS / float((t - r).min()))


@pytest.mark.parametrize("name", ["lsd", "tvm"])
def test_the_gradient_goes_through_the_derivative(name):
    """That of the loss as its paper writes it, with dz_r/dr by differences in float64."""
    net, x, e = batch()
    teacher = net if name == "lsd" else (lambda z, r, t: exact.velocity(z, t))
    target = meanflow.lsd if name == "lsd" else load_target("tvm", teacher=teacher)
    ours = gradients(net, meanflow.loss(net, x, noise=e, r=R, t=T, target=target))
    z, v, h = (1 - spread(T)) * x + spread(T) * e, e - x, 1e-4

    def end(r):
        return z - spread(T - r) * net(z, r, T)

    moved = (end(R + h) - end(R - h)) / (2 * h)
    with torch.no_grad():
        goal = teacher(end(R), R, R)
    intervals = (moved - goal).square().mean((1, 2))
    plain = (net(z, T, T) - v).square().mean((1, 2))
    truth = gradients(net, torch.where(R < T, intervals, plain).mean())
    largest = max(float(g.abs().max()) for g in truth)
    for g, g_truth in zip(ours, truth, strict=True):
        assert error(g, g_truth) <= 1e3 * h**2 * largest  # the differences' own error
    halved = meanflow.loss(net, x, noise=e, r=R, t=T, target=_without_its_gradient(target))
    distance = max(error(g, x) for g, x in zip(gradients(net, halved), truth, strict=True))
    assert distance > 1e5 * h**2 * largest


def _without_its_gradient(target):
    """The same with du/dr detached: another gradient, so that the test above can tell."""

    def detached(f, z, r, t, v, cond):
        found, goal = target(f, z, r, t, v, cond)
        u = f(z, r, t, **cond)
        return u + (found - u).detach(), goal

    return detached
