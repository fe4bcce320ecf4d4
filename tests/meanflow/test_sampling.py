from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch
from torch import nn

from mfmjt.errors import InputError
from mfmjt.meanflow import Sampling, guide, sample
from tests.meanflow import exact
from tests.oracle import DTYPES, allowance, error
from tests.support.networks import inputs, network


def noise(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (3, 5, 4)), dtype=dtype)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_true_average_velocity_reaches_the_data_in_any_number_of_steps(steps):
    z = noise()
    data = exact.MEAN + exact.SPREAD * z  # the flow keeps every point's place in the distribution
    result = sample(exact.average_velocity, z, steps)
    assert error(result, data) <= steps * allowance(data, z.dtype, 4)


def test_euler_converges_with_first_order():
    z = noise()
    data = exact.MEAN + exact.SPREAD * z
    errors = [
        error(sample(exact.average_velocity, z, steps, instantaneous=True), data)
        for steps in (64, 128, 256)
    ]
    # Halving a step h halves the error, up to terms of relative size h.
    for coarse, fine in itertools.pairwise(errors):
        assert abs(coarse / fine - 2) < 16 / 64


def test_times_go_from_noise_to_data():
    seen = []

    def f(z, r, t):
        seen.append((r.tolist(), t.tolist()))
        return torch.zeros_like(z)

    sample(f, noise(1, 2, 2), 4)
    assert seen == [([a], [a + 0.25]) for a in (0.75, 0.5, 0.25, 0.0)]
    seen.clear()
    sample(f, noise(1, 2, 2), 2, instantaneous=True)
    assert seen == [([1.0], [1.0]), ([0.5], [0.5])]


def conditional(z, r, t, condition):
    calls.append(z.shape[0])
    return torch.tanh(z + condition[:, None] * t[:, None, None])


calls: list[int] = []


@pytest.mark.parametrize("mode", ["cfg", "cfg_scaled"])
@pytest.mark.parametrize("width", [4, 1])
def test_guidance_in_one_batch_and_in_two(mode, width):
    z, cond, null = noise(), noise(3, 4), noise(3, width)
    calls.clear()
    result = sample(conditional, z, 1, {"condition": cond}, {"condition": null}, 2.5, mode)
    assert calls == ([6] if width == 4 else [3, 3])
    one = torch.ones(3)
    u_c, u_0 = (conditional(z, 0 * one, one, c) for c in (cond, null))
    truth = z - guide(u_c, u_0, 2.5, mode)
    assert error(result, truth) <= allowance(truth, z.dtype, 4)


@pytest.mark.parametrize(("guidance", "mode"), [(1.0, "cfg_scaled"), (3.0, "none")])
def test_no_second_pass_where_none_is_needed(guidance, mode):
    z, cond = noise(), noise(3, 4)
    calls.clear()
    sample(conditional, z, 1, {"condition": cond}, {"condition": cond}, guidance, mode)
    assert calls == [3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["none", "cfg", "cfg_scaled"])
@pytest.mark.parametrize("same", [True, False])
def test_network_is_called_in_the_dtype_of_the_noise(dtype, mode, same):
    """And the state is float32 or wider, so that roundings do not add up over the steps."""
    torch.manual_seed(0)
    inward, outward = nn.Linear(4 + 2 + 1, 32).to(dtype), nn.Linear(32, 4).to(dtype)

    def f(z, r, t, condition):
        assert {z.dtype, r.dtype, t.dtype} == {inward.weight.dtype}
        return outward(torch.tanh(inward(torch.cat((z, r[:, None], t[:, None], condition), -1))))

    z, cond = noise(6, 4).to(dtype), noise(6, 1).to(dtype)
    null = cond if same else torch.zeros(1, 1, dtype=dtype).expand(6, 1)
    given = {"steps": 4, "guidance": 2.0, "mode": mode}
    found = sample(f, z, cond={"condition": cond}, null={"condition": null}, **given)
    assert found.dtype == dtype
    inward, outward = inward.double(), outward.double()
    cond, null = ({"condition": c.double()} for c in (cond, null))
    truth = sample(f, z.double(), cond=cond, null=null, **given)
    assert error(found, truth) <= allowance(truth, dtype, 32)


def test_misuse_is_named():
    with pytest.raises(InputError, match="steps is 0"):
        sample(conditional, noise(), 0)
    with pytest.raises(InputError, match="null is missing"):
        sample(conditional, noise(), 1, {"condition": noise(3, 4)}, guidance=2.0)
    with pytest.raises(InputError, match="No guidance mode"):
        sample(conditional, noise(), 1, mode="other")


NONE = torch.zeros(2, dtype=torch.bool)


def test_encoded_conditions_serve_all_steps():
    net = network()
    z, _, _, features = inputs(2)
    cond = net.conditions(**features)
    null = net.conditions(**features, video_mask=NONE, text_mask=NONE)
    result = sample(net, z, 2, {"cond": cond}, {"cond": null}, guidance=2.0)
    keep = {"video_mask": ~NONE, "text_mask": ~NONE}
    drop = {"video_mask": NONE, "text_mask": NONE}
    truth = sample(net, z, 2, {**features, **keep}, {**features, **drop}, guidance=2.0)
    assert error(result, truth) <= allowance(truth, z.dtype, 2 * 9 * 256)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(3, 2.5, "cfg", instantaneous=True)])
def test_sampling_holds_parameters_of_sample(sampling):
    given = dataclasses.asdict(sampling)
    assert given.keys() <= inspect.signature(sample).parameters.keys()
    z, cond, null = noise(), {"condition": noise(3, 4)}, {"condition": noise(3, 4)}
    found = sample(conditional, z, cond=cond, null=null, **given)
    steps, guidance, mode = sampling.steps, sampling.guidance, sampling.mode
    truth = sample(conditional, z, steps, cond, null, guidance, mode, sampling.instantaneous)
    assert torch.equal(found, truth)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.steps = 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps is 0. Give 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"guidance": -0.5}, r"guidance is -0.5. Give 0 to 100"),
        ({"guidance": 101.0}, "guidance is 101"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"mode": "other"}, "No guidance mode 'other'"),
    ],
)
def test_sampling_refuses_values_out_of_range(given, message):
    with pytest.raises(InputError, match=message):
        Sampling(**given)
    assert Sampling(steps=1000, guidance=100.0).steps == 1000
    assert Sampling(steps=1, guidance=0.0, mode="none").guidance == 0
