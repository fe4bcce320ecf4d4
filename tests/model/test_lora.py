from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from mfmjt import kernels, meanflow
from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from mfmjt.model.blocks import Conv1d, Linear
from mfmjt.model.lora import LoRA, add_lora, merge_adapter, merged_state, save_adapter
from tests.oracle import allowance, error
from tests.support.peers import load_peft

SMALL = {"hidden_dim": 32, "num_heads": 1, "depth": 3, "fused_depth": 1}
LORA = LoRA(rank=3, alpha=6)
ROWS, LENGTH = 4, 20


@pytest.fixture
def nets() -> tuple[MFMJT, MFMJT]:
    """A network, and itself with adapters that do something."""
    load_peft()
    torch.manual_seed(0)
    plain = MFMJT.from_config("nano", **SMALL).double()
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.05 * torch.randn_like(p)
        plain.latent_std.fill_(1)
    adapted = copy.deepcopy(plain)
    add_lora(adapted, LORA)
    return plain, adapted


def stir(net: MFMJT) -> None:
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)


def loss(net: MFMJT, ratio: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, LENGTH, net.config.latent_dim, generator=generator).double()
    video = torch.randn(ROWS, 5, net.config.video_dim, generator=generator).double()
    return meanflow.loss(
        net, x, {"video": video}, ratio, noise=torch.ones_like(x), generator=generator
    )


def du_dt(net: MFMJT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(ROWS, LENGTH, net.config.latent_dim, generator=generator).double()
    r, t = torch.full((ROWS,), 0.1).double(), torch.linspace(0.2, 0.9, ROWS).double()
    u, du, *_ = torch.func.jvp(
        lambda z, t: net(z, r, t), (z, t), (torch.ones_like(z), torch.ones_like(t))
    )
    return u.detach(), du.detach()


def test_it_starts_as_it_was(nets):
    plain, adapted = nets
    assert all(torch.equal(a, b) for a, b in zip(du_dt(adapted), du_dt(plain), strict=True))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name.startswith("r_embed.") for name in trained)
    assert any(name.startswith("joint_blocks.0.latent_block.ffn.w1.lora_A") for name in trained)
    # Everything that multiplies is ours, of which the tangent leaves no tape.
    stock = {torch.nn.Linear, torch.nn.Conv1d}
    assert not any(type(module) in stock for module in adapted.modules())
    assert {Linear, Conv1d} <= {type(module) for module in adapted.modules()}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_gradients_are_those_of_the_merged_weights(nets, ratio):
    """Against PyTorch's own ops on weights W + α/rank·B A, which are functions of A and B."""
    plain, adapted = nets
    stir(adapted)
    value = loss(adapted, ratio)
    value.backward()

    state = {k: v.detach().clone().requires_grad_() for k, v in adapted.state_dict().items()}

    def merged(*args, **kwargs):
        weights = merged_state(state, LORA)
        return torch.func.functional_call(plain, weights, args, kwargs)

    merged.config = plain.config
    with kernels.reference():
        truth = loss(merged, ratio)
        truth.backward()
    terms = plain.config.depth * 3 * plain.config.mlp_hidden
    assert error(value, truth) <= allowance(truth, torch.float64, terms)
    compared = 0
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            assert error(p.grad, state[name].grad) <= allowance(
                state[name].grad, torch.float64, terms * ROWS * LENGTH
            ), name
            compared += bool(p.grad.any())
    assert compared > 50


def test_the_tangent_is_that_of_the_merged_network(nets):
    plain, adapted = nets
    before = du_dt(plain)
    stir(adapted)
    state = merged_state(adapted.state_dict(), LORA)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    terms = plain.config.depth * 3 * plain.config.mlp_hidden
    for found, truth, old in zip(du_dt(adapted), du_dt(plain), before, strict=True):
        limit = allowance(truth, torch.float64, terms)
        assert error(found, truth) <= limit < error(old, truth)


def test_tangents_leave_no_tape(nets):
    _, adapted = nets

    def kept(ratio: float) -> int:
        found: dict[int, torch.UntypedStorage] = {}

        def keep(x: Tensor) -> Tensor:
            if not isinstance(x, torch.nn.Parameter) and x.ndim:  # a number is kept as a tensor
                found[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss(adapted, ratio)
        return sum(storage.nbytes() for storage in found.values())

    assert kept(1.0) <= 1.3 * kept(0.0)


def test_a_file_of_adapters_is_merged(nets, tmp_path):
    plain, adapted = nets
    stir(adapted)
    with torch.no_grad():
        adapted.r_embed.mlp[2].weight.normal_()
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapted.state_dict(), LORA, path)
    merge_adapter(plain, path)
    expected = merged_state(adapted.state_dict(), LORA)
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())
    other = MFMJT.from_config("nano", **SMALL | {"hidden_dim": 64})
    with pytest.raises(InputError, match="for another network"):
        merge_adapter(other, path)
    plain.save(tmp_path / "network.safetensors")
    with pytest.raises(InputError, match="is no adapter"):
        merge_adapter(plain, tmp_path / "network.safetensors")
    with pytest.raises(InputError, match="No file"):
        merge_adapter(plain, tmp_path / "none.safetensors")


def test_names_that_fit_nothing_are_refused(nets):
    plain, _ = nets
    with pytest.raises(InputError, match=r"lora\.targets=\['nothing'\]"):
        add_lora(plain, LoRA(targets=("nothing",)))
    assert not any(type(module) is torch.nn.Linear for module in plain.modules())


def test_without_peft_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    net = MFMJT.from_config("nano", **SMALL)
    with pytest.raises(InputError, match=r"pip install 'mfmjt\[lora\]'"):
        add_lora(net, LORA)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(InputError, match="all must be positive"):
        LoRA(rank=0)
