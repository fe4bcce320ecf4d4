from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn

from mfmjt.kernels import accelerate_jvp, recompute
from tests.oracle import allowance, error

WIDTH = 12


class Block(nn.Module):
    """What a block of somebody's network takes and gives: more than tensors in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.inward, self.outward = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.calls = 0

    def forward(self, x, conditions, name, *, keep=None, rate=0.0):
        self.calls += 1
        shift, (gate, _) = conditions["shift"], conditions["rest"]
        q, k, v = self.qkv(self.norm(x) + shift)[:, None].chunk(3, -1)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            x = x + gate * nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        y = nn.functional.dropout(torch.tanh(self.inward(x)), rate)
        x = x + self.outward(y)
        if keep is not None:
            x = torch.where(keep[:, None, None], x, x.detach())
        return {"x": x, "mean": (x.mean(-1), keep), "name": name}

    def other(self, x):
        return self.outward(torch.tanh(self.inward(x)))


def through(how, block, x, t, keep, rate):
    """Two calls one after the other, as `how` makes them."""
    conditions = {"shift": t.cos()[:, None, None], "rest": (t[:, None, None] + 1, None)}
    for name in "ab":
        made = how(block, x, conditions, name, keep=keep, rate=rate)
        assert made["name"] == name
        assert torch.equal(made["mean"][1], keep)
        x = made["x"] + made["mean"][0][..., None]
    return x


def plainly(block, *args, **kwargs):
    return block(*args, **kwargs)


def results(how, dual, rate, dtype, autocast=False, context=contextlib.nullcontext):
    """Value, tangent and gradients, how many elements were kept, and calls."""
    torch.manual_seed(0)
    block = Block().to(dtype)
    x, v = torch.randn(2, 4, 5, WIDTH, dtype=dtype).unbind()
    t, keep = torch.rand(4, dtype=dtype), torch.arange(4) % 2 == 0
    x.requires_grad_()
    kept = []

    def note(saved):
        if not isinstance(saved, nn.Parameter):
            kept.append(saved.numel())
        return saved

    def run(x, t):
        return through(how, block, x, t, keep, rate)

    with (
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved),
        context(),
    ):
        y, *dots = torch.func.jvp(run, (x, t), (v, torch.ones_like(t))) if dual else (run(x, t),)
    before = torch.get_rng_state()
    loss = y.float().square().mean() if autocast else y.square().mean()
    found = torch.autograd.grad(loss, [x, *block.parameters()])
    assert torch.equal(torch.get_rng_state(), before)  # the second time leaves nothing behind
    return [y.detach(), *(dot.detach() for dot in dots), *found], sum(kept), block.calls


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_any_block_is_the_same_and_less_is_kept(dual, rate, autocast):
    dtype = torch.float32 if autocast else torch.float64
    expected, kept, calls = results(plainly, dual, rate, dtype, autocast)
    found, less, twice = results(recompute, dual, rate, dtype, autocast)
    # Two calls share what autocast casts, so that its gradients are summed before they are cast.
    rounded = torch.bfloat16 if autocast else dtype
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) <= allowance(truth, rounded, 1)
    assert less < kept / 2
    assert (calls, twice) == (2, 4)


def test_inside_accelerated_forward_mode():
    expected, _, _ = results(plainly, True, 0.0, torch.float64, False, accelerate_jvp)
    found, _, _ = results(recompute, True, 0.0, torch.float64, False, accelerate_jvp)
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) <= allowance(truth, torch.float64, 5 * WIDTH)


def test_methods_and_parts_of_modules():
    block, x = Block(), torch.randn(3, WIDTH)
    truth = torch.autograd.grad(block.other(x).sum(), block.inward.weight)
    for given in (block.other, functools.partial(block.other), functools.partial(block.other, x)):
        args = () if getattr(given, "args", ()) else (x,)
        found = torch.autograd.grad(recompute(given, *args).sum(), block.inward.weight)
        assert torch.equal(found[0], truth[0])


def test_without_gradients_it_is_a_call():
    block, x = Block(), torch.randn(3, WIDTH)
    with torch.no_grad():
        assert torch.equal(recompute(block.other, x), block.other(x))


def test_what_would_get_no_gradient_is_refused():
    block, x = Block(), torch.randn(3, WIDTH)
    with pytest.raises(TypeError, match="needs a module"):
        recompute(lambda x: block.other(x), x)
    block.scale = 2 * torch.ones(WIDTH, requires_grad=True)
    block.other = lambda x: None  # type: ignore[method-assign]

    class Captures(Block):
        def forward(self, x):
            return super().other(x) * block.scale

    with pytest.raises(RuntimeError, match=r"shape \(12,\) that wants a gradient"):
        recompute(Captures(), x).sum().backward()
    again = recompute(Block().other, x.requires_grad_())
    (first,) = torch.autograd.grad(again.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class Layers(nn.Module):
    """Compiled, PyTorch has no forward mode of norms and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t):
        return x + self.outward(self.dropout(torch.tanh(self.inward(x * t[:, None]))))


@pytest.mark.slow
def test_compiled_it_is_the_same():
    net = Layers()
    x, v, t = torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.rand(4)

    def step(how):
        tangents = v, torch.ones_like(t)
        y, dot = torch.func.jvp(lambda x, t: how(net, x, t), (x, t), tangents)
        return (y - dot.detach()).square().mean()

    found = []
    for how in (plainly, recompute):
        torch.manual_seed(1)
        value = torch.compile(step, fullgraph=True, backend="aot_eager")(how)
        found.append([value.detach(), *torch.autograd.grad(value, list(net.parameters()))])
    assert all(map(torch.equal, *found))
