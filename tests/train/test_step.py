from __future__ import annotations

import pytest
import torch

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.train.parallel import Processes
from mfmjt.train.tasks.network import NetworkTask, starting_network, train_network
from mfmjt.train.tasks.step import Draws, Step
from tests.oracle import allowance, error
from tests.train.conftest import TINY
from tests.train.states import curve


def batch(rows: int = 4) -> tuple[dict[str, torch.Tensor], Draws]:
    config = MFMJT.from_config("nano", **TINY).config
    video, sync = config.lengths(20)
    features = {
        "latent": torch.randn(rows, 20, config.latent_dim),
        "video": torch.randn(rows, video, config.video_dim),
        "sync": torch.randn(rows, sync, config.sync_dim),
        "text": torch.randn(rows, config.text_length, config.text_dim),
    }
    draws = Draws(
        clips=torch.arange(rows),
        starts=None,
        latent_noise=torch.zeros(rows, 20, config.latent_dim),
        video_mask=torch.tensor([True, False, False, True]),
        text_mask=torch.tensor([True, True, False, False]),
        r=torch.tensor([0.1, 0.2, 0.3, 0.6]),
        t=torch.tensor([0.9, 0.5, 0.8, 0.6]),
        noise=torch.randn(rows, 20, config.latent_dim),
    )
    return features, draws


def test_guidance_uses_null_conditions_and_spares_rows_without_any(recipe):
    features, draws = batch()
    net = MFMJT.from_config("nano", **TINY)
    for p in net.parameters():  # a fresh network gives zero, guided or not
        torch.nn.init.normal_(p, std=0.05)
    found, _ = Step(net, recipe(omega=0.5, kappa=0.25, p=0.0))(features, draws, 3)

    x, e, t = features["latent"], draws.noise, draws.t[:, None, None]
    cond = {k: v for k, v in features.items() if k != "latent"}
    z, v = (1 - t) * x + t * e, e - x
    masks = {"video_mask": draws.video_mask, "text_mask": draws.text_mask}
    with torch.no_grad():
        given = net(z, draws.t, draws.t, **cond, **masks)
        null = net(z, draws.t, draws.t)
    guided = 0.5 * v + 0.25 * given + 0.25 * null
    guided[2] = v[2]  # the row that has neither
    truth = meanflow.loss(
        net,
        x,
        cond | masks,
        noise=e,
        r=draws.r,
        t=draws.t,
        intervals=3,
        velocity=lambda *_: guided,
    )
    limit = allowance(truth, torch.float32, terms=x.numel())
    assert error(found, truth) <= limit
    plain, _ = Step(net, recipe(p=0.0))(features, draws, 3)
    assert error(plain, truth) > limit


def test_the_error_of_an_average_velocity_is_without_the_variance_of_its_target(recipe):
    """A network of one velocity everywhere errs by nothing, and its objective is not zero."""
    with Processes("cpu") as processes:
        task = NetworkTask(recipe(), processes)
        task.network.final_layer.conv.bias.data.fill_(0.5)  # a fresh network gives its bias
        found = task.validate()
        assert found["mean_error"] < torch.finfo(torch.float32).eps
        assert found["mean_r0_t1"] > 0.5
        for p in task.network.parameters():
            torch.nn.init.normal_(p, std=0.1)
        assert task.validate()["mean_error"] > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "improved_mean_velocity"},
        {"target": "alpha_flow", "alpha": 0.25},
        {"target": "finite_difference"},
        {"target": "finite_difference", "target_options": {"h": 1e-2}},
        {"target": "control_variate", "to_data": 0.5},
        {"omega": 0.5, "kappa": 0.5},
        {"balance": True, "p": 0.0},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_relatives_of_meanflow_train(recipe, changes):
    """Each is another loss than MeanFlow's on the same draws, and is the same when run again."""
    train_network(recipe(steps=3))
    ours = recipe(steps=3, out=recipe().out + "_relative", **changes)
    again = recipe(steps=3, out=recipe().out + "_again", **changes)
    assert train_network(ours).finished
    assert train_network(again).finished
    assert curve(ours.out) == curve(again.out)
    assert curve(ours.out)[-1] != curve(recipe().out)[-1]


def test_a_trained_network_leads(recipe, tmp_path):
    """By its velocity or by its path; one of another scale of latents is refused."""
    train_network(recipe(steps=2))
    led = {"steps": 2, "teacher": recipe().out + "/network.safetensors"}
    curves = {repr(curve(recipe().out))}
    for target in ("mean_velocity", "teacher_rollout"):
        out = recipe().out + target
        assert train_network(recipe(out=out, target=target, **led)).finished
        curves.add(repr(curve(out)))
    assert len(curves) == 3
    other = MFMJT.load(led["teacher"])
    other.latent_std.mul_(2)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="latents of another scale"):
        train_network(
            recipe(out=recipe().out + "_other", teacher=str(tmp_path / "other.safetensors"))
        )
    with pytest.raises(InputError, match="Give teacher=FILE"):
        recipe(target="teacher_rollout")
    with pytest.raises(InputError, match="Give p=0"):
        recipe(balance=True, p=1.0)


def test_a_rectified_flow_pairs_noise_with_what_the_teacher_makes_of_it(recipe):
    features, draws = batch()
    net, teacher = (MFMJT.from_config("nano", **TINY) for _ in range(2))
    for p in (*net.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(p, std=0.05)
    config = recipe(reflow=2, teacher="teacher.safetensors", p=0.0)
    found, _ = Step(net, config, teacher)(features, draws, 3)

    cond = {k: v for k, v in features.items() if k != "latent"}
    cond |= {"video_mask": draws.video_mask, "text_mask": draws.text_mask}
    one, half = torch.ones(4), torch.full((4,), 0.5)
    with torch.no_grad():
        middle = draws.noise - teacher(draws.noise, one, one, **cond) / 2
        x = middle - teacher(middle, half, half, **cond) / 2
    truth = meanflow.loss(net, x, cond, noise=draws.noise, r=draws.r, t=draws.t, intervals=3)
    assert torch.equal(found, truth)
    with pytest.raises(InputError, match="Give teacher=FILE"):
        recipe(reflow=2)


def test_frozen_weights_stay(recipe):
    config = recipe(frozen=("fused_blocks", "t_embed"), ema=(0.0,))
    before = starting_network(config).half().float().state_dict()  # the file has float16
    after = MFMJT.load(train_network(config).file).state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved
    assert not any(name.startswith(config.frozen) for name in moved)
    assert any(name.startswith("joint_blocks") for name in moved)
    with pytest.raises(InputError, match="frozen=nothing: no weights begin so"):
        starting_network(recipe(frozen=("nothing",)))


def test_a_target_of_ones_own_is_one_function(recipe, tmp_path, monkeypatch):
    """It is named in the recipe, and nothing in the package knows of it."""
    (tmp_path / "my_targets.py").write_text(
        "def straight(f, z, r, t, v, cond):\n    return f(z, r, t, **cond), v\n"
    )
    with pytest.raises(InputError, match=r"No module named 'my_targets'.*PYTHONPATH"):
        recipe(target="my_targets:straight")
    monkeypatch.syspath_prepend(tmp_path)
    config = recipe(steps=1, target="my_targets:straight", p=0.0)
    assert train_network(config).finished
    features, draws = batch()
    found, stats = Step(MFMJT.from_config("nano", **TINY), config)(features, draws, 3)
    # A fresh network says zero, so the error is that of v = e - x.
    v = draws.noise - features["latent"]
    truth = v.square().flatten(1).mean(1)
    assert error(found, truth.mean()) <= allowance(truth.mean(), torch.float32, terms=v.numel())
    assert error(stats.interval, truth[:3].mean()) <= allowance(
        truth[:3].mean(), torch.float32, terms=v.numel()
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mean", "alpha_flow, finite_difference, control_variate, lsd, package.module:function"),
        ("mfmjt.meanflow:mean", "has no attribute 'mean'.*Give package.module:function"),
        (":mean", "Give package.module:function"),
        ("mfmjt.meanflow:__doc__", "it is a str"),
    ],
)
def test_refuses_targets_that_are_none(recipe, target, words):
    with pytest.raises(InputError, match=words):
        recipe(target=target)
