from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.codec.vae import VAE, VAE_CONFIGS, VAEConfig
from mfmjt.errors import InputError
from tests.oracle import allowance, error
from tests.support.published import vae_shapes
from tests.support.weights import draw_all, read

TINY = VAEConfig(bands=6, latent_dim=4, width=8)
TERMS = 3 * 4 * TINY.width  # inputs of the widest convolution


class Plain:
    """The network in float64 straight from its published weights, normalised at each use."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.double() for name, value in state.items()}

    def conv(self, name: str, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        w = self.state[f"{name}.weight"]
        inputs = w[0].numel()
        w = w / (1e-4 + w.flatten(1).norm(dim=1)[:, None, None] / inputs**0.5)
        return F.conv1d(x, w * gain / inputs**0.5, padding=w.shape[-1] // 2)

    def norm(self, x: Tensor) -> Tensor:
        return x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x)) / 0.596

    def sum(self, a: Tensor, b: Tensor) -> Tensor:
        return (0.7 * a + 0.3 * b) / (0.7**2 + 0.3**2) ** 0.5

    def block(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(x)
        h = self.conv(f"{name}.conv1", self.silu(x))
        h = self.conv(f"{name}.conv2", self.silu(h))
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return self.sum(x, h)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.block_1", x)
        qkv = self.conv(f"{name}.attn_1.qkv", x)
        q, k, v = (self.norm(qkv[:, i::3]) for i in range(3))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / q.shape[1] ** 0.5, dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, v)
        x = self.sum(x, self.conv(f"{name}.attn_1.proj_out", h))
        return self.block(f"{name}.block_2", x)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        x = (mel.double() - self.state["data_mean"]) / self.state["data_std"]
        x = self.conv("encoder.conv_in", x)
        for level in range(3):
            for i in range(2):
                x = self.block(f"encoder.down.{level}.block.{i}", x)
            if level == 0:
                x = self.conv("encoder.down.0.downsample.conv1", x)
                x = x[..., : x.shape[-1] // 2 * 2].unflatten(-1, (-1, 2)).mean(-1)
                x = self.conv("encoder.down.0.downsample.conv2", x)
        x = self.silu(self.middle("encoder.mid", x))
        x = self.conv("encoder.conv_out", x, self.state["encoder.learnable_gain"] + 1)
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", latent.double()))
        for level in (2, 1, 0):
            for i in range(3):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
            if level == 1:
                x = torch.stack([x, x], dim=-1).flatten(2)
                x = self.conv("decoder.up.1.upsample.conv", x)
        x = self.conv("decoder.conv_out", self.silu(x), self.state["decoder.learnable_gain"] + 1)
        return x * self.state["data_std"] + self.state["data_mean"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return draw_all(vae_shapes(TINY), seed=3)


def agrees(result: Tensor, truth: Tensor, terms: int = TERMS) -> None:
    assert result.dtype == torch.float32
    assert error(result, truth) <= allowance(truth, torch.float32, terms)


@pytest.mark.parametrize("frames", [2, 7, 32])
def test_encodes_as_the_formulas_say(state, frames):
    mel = torch.randn(2, TINY.bands, frames)
    posterior = VAE.from_mmaudio(state, TINY).encode(mel)
    mean, logvar = Plain(state).encode(mel)
    agrees(posterior.mean, mean)
    agrees(posterior.logvar, logvar)
    assert posterior.mean.shape == (2, TINY.latent_dim, frames // 2)


@pytest.mark.parametrize("frames", [1, 6, 17])
def test_decodes_as_the_formulas_say(state, frames):
    latent = torch.randn(2, TINY.latent_dim, frames)
    agrees(VAE.from_mmaudio(state, TINY).decode(latent), Plain(state).decode(latent))


def test_log_variance_is_clamped(state):
    loud = state | {"encoder.learnable_gain": torch.tensor(1e4)}
    logvar = VAE.from_mmaudio(loud, TINY).encode(torch.randn(1, TINY.bands, 64)).logvar
    assert logvar.min() == -30
    assert logvar.max() == 20


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_published_names_and_shapes_are_all_known(mode):
    with torch.device("meta"):
        ours = VAE(mode).state_dict()
    published = vae_shapes(VAE_CONFIGS[mode])
    gains = {"encoder.learnable_gain", "decoder.learnable_gain"}
    assert {name: list(value.shape) for name, value in ours.items()} == {
        name: shape for name, shape in published.items() if name not in gains
    }


def test_every_wrong_entry_is_named(state):
    wrong = dict(state)
    del wrong["encoder.conv_in.weight"], wrong["decoder.learnable_gain"]
    wrong["extra.weight"] = torch.zeros(1)
    wrong["data_std"] = torch.zeros(1, 7, 1)
    with pytest.raises(InputError) as caught:
        VAE.from_mmaudio(wrong, TINY)
    for part in (
        "missing encoder.conv_in.weight",
        "missing decoder.learnable_gain",
        "unexpected extra.weight",
        "data_std has shape (1, 7, 1), not (1, 6, 1)",
    ):
        assert part in str(caught.value)


def test_loading_leaves_the_given_state_as_it_was(state):
    before = {name: value.clone() for name, value in state.items()}
    VAE.from_mmaudio(state, TINY)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_wrong_shapes_and_modes_are_refused(state):
    vae = VAE.from_mmaudio(state, TINY)
    for call, x in (
        (vae.encode, torch.zeros(1, 5, 8)),
        (vae.encode, torch.zeros(1, 6, 1)),
        (vae.decode, torch.zeros(4, 8)),
        (vae.decode, torch.zeros(1, 4, 0)),
    ):
        with pytest.raises(InputError, match=re.escape(str(tuple(x.shape)))):
            call(x)
    with pytest.raises(InputError, match="48k"):
        VAE("48k")


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_runs_in_bfloat16(state, how):
    vae = VAE.from_mmaudio(state, TINY)
    mel, latent = torch.randn(1, TINY.bands, 16), torch.randn(1, TINY.latent_dim, 8)
    mean, _ = Plain(state).encode(mel)
    decoded = Plain(state).decode(latent)
    if how == "weights":
        vae = vae.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    with torch.inference_mode(), autocast:
        results = vae.encode(mel).mean, vae.decode(latent)
    # Each of some thirty layers rounds; the roundings add up as a random walk.
    for result, truth in zip(results, (mean, decoded), strict=True):
        assert result.dtype == torch.float32
        spread = float((result.double() - truth).square().mean().sqrt())
        assert spread <= math.sqrt(30) * torch.finfo(torch.bfloat16).eps * float(truth.abs().max())


@pytest.mark.slow
def test_compiles_without_a_break(state):
    vae = VAE.from_mmaudio(state, TINY)
    latent = torch.randn(1, TINY.latent_dim, 6)
    compiled = torch.compile(vae.decode, fullgraph=True, backend="eager")
    with torch.no_grad():
        agrees(compiled(latent), vae.decode(latent).double())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_agrees_with_the_published_implementation(mode):
    state, given = read("codec", f"vae_{mode}")
    vae = VAE.from_mmaudio(state, mode)
    terms = 3 * 4 * vae.config.width
    with torch.inference_mode():
        posterior, mel = vae.encode(given["in.mel"]), vae.decode(given["in.latent"])
    agrees(posterior.mean, given["out.mean"], terms)
    agrees(posterior.logvar, given["out.logvar"], terms)
    agrees(mel, given["out.mel"], terms)
