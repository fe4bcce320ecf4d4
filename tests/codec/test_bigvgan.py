from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt import kernels
from mfmjt.codec.bigvgan import BIGVGAN_CONFIGS, BigVGAN, BigVGANConfig
from mfmjt.errors import InputError
from mfmjt.kernels.snake import snake_ref
from tests.oracle import allowance, error
from tests.support.published import vocoder_shapes
from tests.support.weights import draw_all, read

TINY = BigVGANConfig(bands=5, width=16, rates=(4, 2), kernels=(8, 4), tanh=True, bias=True)
TINY_V2 = BigVGANConfig(bands=5, width=16, rates=(8, 2), kernels=(16, 4), tanh=False, bias=False)
TERMS = 11 * TINY.width * 24  # the widest sum, through the layers of two stages


def plain(state: dict[str, Tensor], c: BigVGANConfig, mel: Tensor) -> Tensor:
    """The vocoder in float64 from its published weights, weight norm at each use."""
    s = {name: value.double() for name, value in state.items()}

    def weight(name: str) -> tuple[Tensor, Tensor | None]:
        v = s[f"{name}.weight_v"]
        norm = v.square().sum((1, 2), keepdim=True).sqrt()
        return s[f"{name}.weight_g"] * v / norm, s.get(f"{name}.bias")

    def conv(name: str, x: Tensor, dilation: int = 1) -> Tensor:
        w, b = weight(name)
        return F.conv1d(x, w, b, padding=dilation * (w.shape[-1] // 2), dilation=dilation)

    def activate(name: str, x: Tensor) -> Tensor:
        return snake_ref(x, s[f"{name}.act.alpha"], s[f"{name}.act.beta"])

    x = conv("conv_pre", mel.double())
    for i, (rate, kernel) in enumerate(zip(c.rates, c.kernels, strict=True)):
        w, b = weight(f"ups.{i}.0")
        length = rate * x.shape[-1]
        start = (kernel - rate) // 2
        x = F.conv_transpose1d(x, w, b, stride=rate)[..., start : start + length]
        outputs = []
        for j in range(3):
            block, y = f"resblocks.{3 * i + j}", x
            for k, dilation in enumerate((1, 3, 5)):
                h = activate(f"{block}.activations.{2 * k}", y)
                h = conv(f"{block}.convs1.{k}", h, dilation)
                h = activate(f"{block}.activations.{2 * k + 1}", h)
                y = y + conv(f"{block}.convs2.{k}", h)
            outputs.append(y)
        x = torch.stack(outputs).mean(0)
    x = conv("conv_post", activate("activation_post", x))
    return x.tanh() if c.tanh else x.clamp(-1, 1)


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["tanh", "clamp"])
@pytest.mark.parametrize("frames", [1, 13])
def test_sounds_as_the_formulas_say(config, frames):
    state = draw_all(vocoder_shapes(config), seed=1)
    state["conv_post.weight_g"] *= 200  # loud enough that what limits the output matters
    mel = torch.randn(2, config.bands, frames)
    vocoder = BigVGAN.from_state_dict(state, config)
    truth = plain(state, config, mel)
    with torch.inference_mode():
        result = vocoder(mel)
    assert result.shape == (2, 1, frames * vocoder.hop)
    assert error(result, truth) <= allowance(truth, torch.float32, TERMS)
    assert truth.abs().max() > 0.9


def test_channels_last_is_the_same_sound():
    """What a GPU does, here by its formulas or in Triton's interpreter; weights are rearranged."""
    vocoder = BigVGAN.from_state_dict(draw_all(vocoder_shapes(TINY), seed=3), TINY)
    mel = torch.randn(1, TINY.bands, 3)
    with torch.inference_mode(), kernels.reference():
        truth = vocoder(mel)
        last = vocoder._channels_last(mel.transpose(1, 2)).transpose(1, 2).tanh()
    with torch.no_grad():
        result = vocoder(mel)
    assert error(last, truth) <= allowance(truth, torch.float32, TERMS)
    assert error(result, truth) <= allowance(truth, torch.float32, TERMS)


def test_all_layouts_of_the_weights_give_the_same_sound():
    state = draw_all(vocoder_shapes(TINY), seed=2)
    new_names = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in state.items()
    }
    filters = {
        name: torch.zeros(shape)
        for name, shape in vocoder_shapes(TINY).items()
        if name.endswith(".filter")
    }
    first = BigVGAN.from_state_dict(state, TINY)
    mel = torch.randn(1, TINY.bands, 4)
    for other in (new_names, state | filters, {"generator": new_names}, first.state_dict()):
        with torch.inference_mode():
            assert torch.equal(BigVGAN.from_state_dict(other, TINY)(mel), first(mel))


def test_every_wrong_entry_is_named():
    state = draw_all(vocoder_shapes(TINY))
    del state["ups.0.0.weight_g"], state["resblocks.1.activations.0.act.beta"]
    state["conv_post.bias"] = torch.zeros(2)
    state["discriminator.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        BigVGAN.from_state_dict(state, TINY)
    for part in (
        "missing ups.0.0.weight",
        "unexpected ups.0.0.weight_v",
        "missing resblocks.1.activations.0.beta",
        "conv_post.bias has shape (2,), not (1,)",
        "unexpected discriminator.weight",
    ):
        assert part in str(caught.value)


def test_what_is_no_state_dict_is_refused():
    with pytest.raises(InputError, match="no state dict"):
        BigVGAN.from_state_dict({"generator": [1, 2]}, TINY)
    with pytest.raises(InputError, match="22k"):
        BigVGAN("22k")
    vocoder = BigVGAN(TINY)
    for shape in ((1, 4, 8), (5, 8), (1, 5, 0)):
        with pytest.raises(InputError, match=re.escape(str(shape))):
            vocoder(torch.zeros(shape))


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_published_names_and_shapes_are_all_known(mode):
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in BigVGAN(mode).state_dict().items()}
    expected = {}
    for name, shape in vocoder_shapes(BIGVGAN_CONFIGS[mode]).items():
        if not name.endswith((".weight_g", ".filter")):
            expected[name.replace(".weight_v", ".weight").replace(".act.", ".")] = shape
    assert ours == expected


@pytest.mark.slow
def test_compiles_without_a_break():
    config = BigVGANConfig(5, 8, rates=(2,), kernels=(4,), tanh=True, bias=True)
    vocoder = BigVGAN.from_state_dict(draw_all(vocoder_shapes(config)), config)
    mel = torch.randn(1, config.bands, 3)
    with torch.no_grad():
        truth = vocoder(mel)
        result = torch.compile(vocoder, fullgraph=True, backend="eager")(mel)
    assert error(result, truth) <= allowance(truth, torch.float32, TERMS)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), [("16k", "bigvgan_16k"), ("44k", "bigvgan_v2_44k")])
def test_agrees_with_the_published_implementation(mode, name):
    state, given = read("codec", name)
    vocoder = BigVGAN.from_state_dict(state, mode)
    with torch.inference_mode():
        result = vocoder(given["in.mel"])
    truth = given["out.waveform"]
    assert error(result, truth) <= allowance(truth, torch.float32, 11 * vocoder.config.width)
