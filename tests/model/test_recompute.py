from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfmjt import meanflow
from mfmjt.model import MFMJT

ROWS, LENGTH = 4, 20
FACTS = {"hidden_dim": 32, "num_heads": 1, "depth": 5, "fused_depth": 3}


class Names(TorchDispatchMode):
    """The library ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mfmjt":
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def network(recompute: bool, dtype: torch.dtype) -> MFMJT:
    torch.manual_seed(0)
    net = MFMJT.from_config("nano", **FACTS).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    net.recompute_blocks(recompute)
    return net


def loss(net: MFMJT, ratio: float, dtype: torch.dtype) -> Tensor:
    generator, config = torch.Generator().manual_seed(1), net.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator).to(dtype)

    cond = {
        "video": randn(5, config.video_dim),
        "sync": randn(16, config.sync_dim),
        "text": randn(config.text_length, config.text_dim),
        "video_mask": torch.tensor([True, False, True, True]),
        "text_mask": torch.tensor([True, True, False, True]),
    }
    x = randn(LENGTH, config.latent_dim)
    return meanflow.loss(net, x, cond, ratio=ratio, noise=torch.ones_like(x), generator=generator)


def gradients(
    recompute: bool, ratio: float, dtype: torch.dtype, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, its gradients, and how many bytes were kept for them."""
    net, kept = network(recompute, dtype), {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        value = loss(net, ratio, dtype)
    value.backward()
    found = {k: p.grad for k, p in net.named_parameters() if p.requires_grad}
    return value.detach(), found, sum(kept.values())


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_gradients_are_the_same_and_less_is_kept(ratio):
    plain, expected, kept = gradients(False, ratio, torch.float64)
    value, found, kept_less = gradients(True, ratio, torch.float64)
    assert torch.equal(value, plain)
    eps = torch.finfo(torch.float64).eps
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 64 * eps * gradient.norm(), name
    # What the blocks keep shrinks to their inputs; ahead of them and behind, nothing changes.
    assert kept_less < 0.6 * kept


def test_autocast_is_the_same_the_second_time():
    plain, expected, _ = gradients(False, 0.0, torch.float32, bf16=True)
    value, found, _ = gradients(True, 0.0, torch.float32, bf16=True)
    assert torch.equal(value, plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_tangent_is_computed_twice():
    counts = []
    for recompute in (False, True):
        net = network(recompute, torch.float32)
        with Names() as names:
            value = loss(net, 1.0, torch.float32)
            forward = len(names.seen)
            value.backward()
        tangents = [name.endswith("_jvp") for name in names.seen]
        assert not any(tangents[forward:])
        values = [name.endswith("_fwd") for name in names.seen]
        counts.append((sum(tangents), sum(values[forward:])))
    assert counts[0][0] == counts[1][0] > 0
    assert counts[0][1] == 0 < counts[1][1]  # but the values are


def test_nothing_is_kept_or_computed_again_without_gradients():
    net = network(True, torch.float32)
    with torch.no_grad(), Names() as names:
        loss(net, 0.0, torch.float32)
    with torch.no_grad(), Names() as plain:
        loss(network(False, torch.float32), 0.0, torch.float32)
    assert names.seen == plain.seen
