from __future__ import annotations

import pytest
import torch

from mfmjt import meanflow
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.train.tasks.network import train_network
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


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "improved_mean_velocity"},
        {"target": "alpha_flow", "alpha": 0.25},
        {"target": "finite_difference"},
        {"omega": 0.5, "kappa": 0.5},
    ],
    ids=lambda changes: next(iter(changes.values())),
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


def test_refuses_unknown_targets(recipe):
    with pytest.raises(InputError, match="alpha_flow"):
        recipe(target="mean")
