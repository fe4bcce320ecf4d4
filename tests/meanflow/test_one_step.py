from __future__ import annotations

import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.meanflow import OneStep, guide
from tests.oracle import DTYPES, allowance, error
from tests.support.networks import inputs, network

NONE = torch.zeros(2, dtype=torch.bool)


def test_one_step_equals_the_two_passes():
    net = network()
    z, _, _, features = inputs(2)
    step = OneStep(net, guidance=1.5)
    with torch.no_grad():
        u_c = net(z, 0.0, 1.0, **features)
        u_0 = net(z, 0.0, 1.0, **features, **dict.fromkeys(("video_mask", "text_mask"), NONE))
        truth = z - guide(u_c, u_0, 1.5)
    assert error(step(z, **features), truth) <= allowance(truth, z.dtype, 9 * 256)
    assert OneStep(net)(z).shape == z.shape
    with pytest.raises(InputError, match="No guidance mode"):
        OneStep(net, mode="other")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compile", [True, False])
def test_one_step_in_any_dtype(dtype, compile):
    net = network().to(dtype)
    z, _, _, features = inputs(2)
    features = {name: value.to(dtype) for name, value in features.items()}
    found = OneStep(net, compile=compile)(z.to(dtype), **features)
    assert found.dtype == dtype
    double = {name: value.double() for name, value in features.items()}
    truth = OneStep(net.double(), compile=False)(z.to(dtype).double(), **double)
    assert error(found, truth) <= allowance(truth, dtype, 9 * 256)


@pytest.mark.parametrize("compile", [True, False])
def test_a_call_may_choose_guidance_and_mode(compile):
    """One prepared network serves all of them, with masks and with less than all conditions."""
    net = network()
    z, _, _, features = inputs(2)
    step = OneStep(net, compile=compile)
    masks = {"video_mask": torch.tensor([True, False]), "text_mask": torch.tensor([False, True])}
    for given in (features | masks, {"text": features["text"]}):
        for guidance, mode in ((4.0, "cfg"), (2.5, "cfg_scaled"), (1.0, "cfg"), (3.0, "none")):
            truth = OneStep(net, guidance, mode, compile=compile)(z, **given)
            assert torch.equal(step(z, **given, guidance=guidance, mode=mode), truth)
            assert not torch.equal(step(z, **given), truth)
        assert torch.equal(step(z, **given), OneStep(net, compile=compile)(z, **given))
    with pytest.raises(InputError, match="No guidance mode"):
        step(z, mode="other")


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("pooled_dim", [None, 5], ids=["tokens", "tokens and a vector"])
def test_a_negative_text_stands_for_the_null_text(compile, pooled_dim):
    net = network(**({} if pooled_dim is None else {"pooled_dim": pooled_dim}))
    z, _, _, features = inputs(2)
    away = {"text": torch.randn_like(features["text"])}
    if pooled_dim is not None:
        features["pooled"], away["pooled"] = torch.randn(2, 2, pooled_dim, dtype=z.dtype)
    negative = {f"negative_{name}": value for name, value in away.items()}
    step = OneStep(net, compile=compile)
    for left_out in ((), ("text", "pooled"), ("video", "sync")):
        given = {name: value for name, value in features.items() if name not in left_out}
        for mode in ("cfg", "cfg_scaled"):
            with torch.no_grad():
                u_c = net(z, 0.0, 1.0, **given)
                u_0 = net(z, 0.0, 1.0, **{**given, **away}, video_mask=NONE)
                truth = z - guide(u_c, u_0, 3.0, mode)
            found = step(z, **given, **negative, guidance=3.0, mode=mode)
            assert error(found, truth) <= 5 * allowance(truth, z.dtype, 9 * 256)
    for guidance, mode in ((3.0, "none"), (1.0, "cfg"), (0.5, "cfg")):
        with pytest.raises(InputError, match="guidance above 1"):
            step(z, **features, **negative, guidance=guidance, mode=mode)


def test_a_negative_text_of_another_length():
    z, _, _, features = inputs(2)
    with pytest.raises(InputError, match="negative_text has 2 tokens, and the text 3"):
        OneStep(network())(z, **features, negative_text=features["text"][:, :2], guidance=2.0)
