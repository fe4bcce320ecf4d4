from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mfmjt import kernels
from mfmjt.kernels import accelerate_jvp
from tests import oracle
from tests.kernels.accelerated import by_pytorch, by_us, kept_bytes, math_attention, products
from tests.oracle import randn
from tests.support.peers import load_peft

GUIDE = Path(__file__).parents[2] / "docs" / "accelerate.md"


def layer(function, *shape, **others):
    inputs = {"x": randn(*shape), **others}
    return function, inputs


CASES = {
    "linear": layer(F.linear, 2, 5, 8, weight=randn(6, 8), bias=randn(6)),
    "linear without bias": layer(F.linear, 5, 8, weight=randn(6, 8)),
    "linear of a vector": layer(F.linear, 8, weight=randn(6, 8), bias=randn(6)),
    "linear to a number": layer(F.linear, 5, 8, weight=randn(8)),
    "conv1d": layer(F.conv1d, 2, 4, 9, weight=randn(6, 4, 3), bias=randn(6)),
    "conv2d": layer(F.conv2d, 2, 4, 6, 5, weight=randn(6, 4, 2, 3), bias=randn(6)),
    "conv3d": layer(F.conv3d, 1, 2, 3, 4, 5, weight=randn(3, 2, 2, 2, 2)),
    "conv1d with options": layer(
        lambda input, weight: F.conv1d(input, weight, None, 2, padding=2, dilation=2, groups=2),
        *(2, 4, 9),
        weight=randn(6, 2, 3),
    ),
    "conv2d, same": layer(
        lambda input, weight: F.conv2d(input, weight, padding="same"),
        *(1, 2, 5, 5),
        weight=randn(3, 2, 3, 3),
    ),
    "conv_transpose1d": layer(F.conv_transpose1d, 2, 4, 5, weight=randn(4, 3, 3), bias=randn(3)),
    "conv_transpose2d": layer(
        lambda input, weight: F.conv_transpose2d(input, weight, stride=2, padding=1, groups=4),
        *(2, 4, 3, 5),
        weight=randn(4, 1, 4, 4),
    ),
    "conv_transpose3d": layer(F.conv_transpose3d, 1, 2, 3, 2, 3, weight=randn(2, 3, 2, 2, 2)),
    "silu": layer(F.silu, 3, 7),
    "gelu": layer(F.gelu, 3, 7),
    "gelu, tanh": layer(lambda input: F.gelu(input, approximate="tanh"), 3, 7),
    "layer_norm": layer(
        lambda input, weight, bias: F.layer_norm(input, (7,), weight, bias, 1e-3),
        *(3, 7),
        weight=randn(7),
        bias=randn(7),
    ),
    "layer_norm, plain": layer(lambda input: F.layer_norm(input, (7,)), 3, 7),
    "layer_norm of two axes": layer(
        lambda input, weight: F.layer_norm(input, [5, 7], weight), 3, 5, 7, weight=randn(5, 7)
    ),
    "rms_norm": layer(
        lambda input, weight: F.rms_norm(input, (7,), weight, 1e-3), 3, 7, weight=randn(7)
    ),
    "rms_norm, plain": layer(lambda input: F.rms_norm(input, (7,)), 3, 7),
    "rms_norm of two axes": layer(lambda input: F.rms_norm(input, (5, 7)), 3, 5, 7),
    "group_norm": layer(
        lambda input, weight, bias: F.group_norm(input, 2, weight, bias, 1e-3),
        *(2, 6, 5, 3),
        weight=randn(6),
        bias=randn(6),
    ),
    "group_norm, plain": layer(lambda input: F.group_norm(input, 3), 2, 9, 4),
    "batch_norm": layer(
        lambda input, weight, bias: F.batch_norm(
            input, torch.arange(3.0).to(input), torch.arange(1.0, 4).to(input), weight, bias
        ),
        *(4, 3, 5),
        weight=randn(3),
        bias=randn(3),
    ),
    "matmul": layer(lambda input, weight: input @ weight.t(), 2, 5, 8, weight=randn(6, 8)),
    "matmul from the left": layer(lambda input, weight: weight @ input, 8, 5, weight=randn(6, 8)),
    "mm": layer(lambda input, weight: torch.mm(input, weight), 5, 8, weight=randn(8, 6)),
    "bmm": layer(lambda input, weight: input.bmm(weight), 2, 5, 8, weight=randn(2, 8, 6)),
    "addmm": layer(
        lambda input, bias, weight: torch.addmm(bias, input, weight, beta=0.5, alpha=2),
        *(5, 8),
        bias=randn(6),
        weight=randn(8, 6),
    ),
    "baddbmm": layer(
        lambda input, weight: torch.baddbmm(input[..., :6], input, weight),
        *(2, 5, 8),
        weight=randn(2, 8, 6),
    ),
    "einsum": layer(
        lambda input, weight: torch.einsum("bnc,hcd->bhnd", input, weight),
        *(2, 5, 8),
        weight=randn(2, 8, 3),
    ),
    "einsum of a list": layer(
        lambda input, weight: torch.einsum("bnc,dc", [input, weight]), 2, 5, 8, weight=randn(3, 8)
    ),
}


def renamed(function, inputs):
    """The case with x, which moves, under the name that the function gives it."""
    return lambda x, **others: function(x, **others), inputs


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_one_input_in_all_modes(case, dtype):
    function, inputs = renamed(*CASES[case])
    op = by_us(function, {re.match(r"\w+", case)[0]: 1})
    oracle.check_op(op, by_pytorch(function), inputs, ("x",), dtype, terms=60)


ATTENTIONS = {
    "self": ((2, 3, 5, 8),) * 3,
    "cross": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "odd width": ((1, 2, 3, 5),) * 3,
    "one key": ((1, 2, 3, 8), (1, 2, 1, 8), (1, 2, 1, 8)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_in_all_modes(case, dtype):
    inputs = {n: randn(*s) for n, s in zip("qkv", ATTENTIONS[case], strict=True)}

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)

    op = by_us(attend, {"scaled_dot_product_attention": 1})
    oracle.check_op(op, by_pytorch(attend), inputs, tuple("qkv"), dtype, terms=60)


MASK = torch.ones(5, 5, dtype=torch.bool).tril()


def bias_of(q):
    return torch.randn(4, 5, 5, generator=torch.manual_seed(0)).to(q.dtype)


MASKED = {
    "bool": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK & (torch.arange(5) > 0)),
    "added": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(q)),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], MASK, enable_gqa=True
    ),
    "narrow values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :3]),
    "no heads": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], bias_of(q)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", MASKED)
def test_masked_attention_in_all_modes(case, dtype):
    op = by_us(MASKED[case], {"scaled_dot_product_attention": 1})
    inputs = {name: randn(2, 4, 5, 8) for name in "qkv"}
    oracle.check_op(op, by_pytorch(MASKED[case]), inputs, tuple("qkv"), dtype, terms=60)


LEFT = {
    "samples or heads of different numbers": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:1], v[:1]
    ),
    "tangent of attn_mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :5]),
    "not (B, H, N, D)": lambda q, k, v: F.scaled_dot_product_attention(
        *(t[None] for t in (q, k, v))
    ),
    "heads wider than 256": lambda q, k, v: F.scaled_dot_product_attention(
        *(F.pad(t, (0, 256)) for t in (q, k)), F.pad(v, (0, 256))
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_attention_that_is_not_ours_is_pytorchs(case):
    inputs = {name: randn(2, 4, 5, 8) for name in "qkv"}
    reasons = {}

    def op(q, k, v):
        with accelerate_jvp() as report:
            y = LEFT[case](q, k, v)
        reasons.update(report.left)
        assert report.taken == {}
        return y

    oracle.check_op(op, by_pytorch(LEFT[case]), inputs, tuple("qkv"), torch.float32, terms=60)
    assert reasons == {("scaled_dot_product_attention", case): 1}


def test_dropout_is_pytorchs():
    q = randn(2, 3, 5, 8).requires_grad_()

    def duals(context):
        torch.manual_seed(0)
        with context as report:
            found = torch.func.jvp(
                lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), (q,), (q,)
            )
        return *found, *torch.autograd.grad(found[0].sum(), q), report

    *found, report = duals(accelerate_jvp())
    *expected, _ = duals(math_attention())
    assert report.left == {("scaled_dot_product_attention", "dropout"): 1}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Heads(nn.Module):
    """nn.MultiheadAttention as a function of its inputs alone."""

    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, **options).double()

    def forward(self, x, y=None, **options):
        y = x if y is None else y
        return self.inner(x, y, y, **options)[0]


PADDING = torch.zeros(2, 5, dtype=torch.bool)
PADDING[1, 3:] = True
HEADS = {
    "self": (Heads(batch_first=True), {}),
    "self, tokens first, no bias": (Heads(bias=False), {}),
    "cross": (Heads(batch_first=True), {"y": randn(2, 3, 8)}),
    "cross to what does not move": (Heads(batch_first=True), {"still": randn(2, 3, 8)}),
    "cross of another width": (Heads(batch_first=True, kdim=6, vdim=6), {"y": randn(2, 3, 6)}),
    "self, weights": (Heads(batch_first=True), {"need_weights": True}),
    "self, weights and masks": (
        Heads(batch_first=True),
        {"need_weights": True, "attn_mask": ~MASK, "key_padding_mask": PADDING},
    ),
    "self, mask": (Heads(batch_first=True), {"attn_mask": ~MASK}),
    "self, causal": (Heads(batch_first=True), {"attn_mask": ~MASK, "is_causal": True}),
    "self, mask of heads, added": (Heads(batch_first=True), {"attn_mask": randn(4, 5, 5)}),
    "self, both masks": (
        Heads(batch_first=True),
        {"attn_mask": randn(5, 5), "key_padding_mask": -10 * PADDING.double()},
    ),
    "self, padding": (Heads(batch_first=True), {"key_padding_mask": PADDING}),
    "self, one sample": (Heads(), {"one": True, "attn_mask": ~MASK, "need_weights": True}),
    "keys beyond those given": (Heads(batch_first=True, add_bias_kv=True), {}),
    "dropout": (Heads(batch_first=True, dropout=0.5), {}),
}


@pytest.mark.parametrize("case", HEADS)
def test_multi_head_attention(case):
    net, given = HEADS[case]
    given = {"need_weights": False, **given}
    tensors = {"x": randn(5, 8) if given.pop("one", False) else randn(2, 5, 8)}
    tensors |= {"y": given.pop("y")} if "y" in given else {}
    still = {"y": given.pop("still")} if "still" in given else {}
    reports = []

    def function(**inputs):
        xy = {name: inputs.pop(name) for name in (*tensors, *still)}
        torch.manual_seed(0)
        return torch.func.functional_call(net, inputs, tuple(xy.values()), given)

    def op(**inputs):
        with accelerate_jvp() as report:
            y = function(**inputs)
        reports.append(report)
        return y

    inputs = {**tensors, **still, **{n: p.detach() for n, p in net.named_parameters()}}
    oracle.check_op(op, by_pytorch(function), inputs, tuple(tensors), torch.float64, terms=60)
    name = "multi_head_attention_forward"
    ours = case.startswith(("self", "cross"))
    assert reports[-1].taken == ({name: 1} if ours else {})
    assert reports[-1].left == ({} if ours else {(name, case): 1})


class Block(nn.Module):
    """A transformer's layer as people write it, in modules."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv1d(3, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU("tanh"), nn.Linear(12, width))
        self.head = nn.Conv2d(width, 3, 1)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, z, r, t):
        shift, scale, gate = self.time(torch.stack((r, t), -1))[:, None].chunk(3, -1)
        x = self.embed(z.transpose(1, 2)).transpose(1, 2)
        x = x + gate * self.attend(self.norm1(x) * (1 + scale) + shift)
        x = x + self.mlp(self.norm2(x))
        return self.head(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)


TAKEN = {
    "conv1d": 1,
    "conv2d": 1,
    "gelu": 1,
    "layer_norm": 1,
    "linear": 6,
    "rms_norm": 1,
    "scaled_dot_product_attention": 1,
    "silu": 1,
}
MOVING = ("z", "r", "t")


def network():
    """A Block, as a function of tensors by name, and values for them."""
    torch.manual_seed(0)
    net = Block().double()
    inputs = {"z": randn(2, 5, 3), "r": torch.rand(2).double(), "t": torch.rand(2).double()}
    inputs |= {name: p.detach() for name, p in net.named_parameters()}

    def function(z, r, t, **parameters):
        return torch.func.functional_call(net, parameters, (z, r, t))

    return function, inputs


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_network_in_all_modes(dtype):
    function, inputs = network()
    oracle.check_op(by_us(function, TAKEN), by_pytorch(function), inputs, MOVING, dtype, terms=900)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_opened_inside_what_is_compiled(backend):
    function, inputs = network()
    oracle.check_compiled(by_us(function), inputs, MOVING, terms=900, backend=backend)


def small_step(x, weight):
    """A call without a tangent before and after those with one."""

    def function(x):
        return F.scaled_dot_product_attention(*(F.layer_norm(F.linear(x, weight), (4,)),) * 3)

    y, y_dot = torch.func.jvp(function, (x,), (x,))
    return function(x) + y, y_dot, function(x) * (y - y_dot.detach())


@pytest.mark.parametrize("where", ["inside", "around"])
def test_compiled_with_calls_that_have_no_tangent(where):
    x, weight = randn(2, 3, 5, 4), randn(4, 4).requires_grad_()

    def inside(x, weight):
        with accelerate_jvp():
            return small_step(x, weight)

    with accelerate_jvp():
        eager = small_step(x, weight)
    torch.compiler.reset()
    step = inside if where == "inside" else small_step
    with accelerate_jvp() if where == "around" else contextlib.nullcontext() as report:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
    if report is not None:
        assert report.taken == {"layer_norm": 1, "linear": 1, "scaled_dot_product_attention": 1}
    compiled += torch.autograd.grad(compiled[2].sum(), weight)
    eager += torch.autograd.grad(eager[2].sum(), weight)
    assert eager[1].abs().max() > 0
    for one, other in zip(compiled, eager, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, other.dtype, terms=90)


def jvp_of(net, z, v):
    ones = torch.ones(len(z), dtype=z.dtype)
    return torch.func.jvp(net, (z, 0 * ones, ones), (v, 0 * ones, ones))


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


def test_without_a_tangent_every_bit_is_pytorchs():
    net, z = Block(), torch.randn(2, 5, 3)

    def results():
        loss = net(z, torch.zeros(2), torch.ones(2)).square().sum()
        return loss, *gradients(loss, net)

    expected = results()
    with accelerate_jvp() as report:
        found = results()
        with forward_ad.dual_level():
            beside = results()
    assert str(report).startswith("No function was called with a tangent. Call torch.func.jvp")
    for one, other, third in zip(found, expected, beside, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(third, other)


def test_dual_numbers_without_func():
    net, z, v = Block(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    r, t = torch.zeros(2), torch.ones(2)
    with accelerate_jvp() as report:
        u, u_dot = torch.func.jvp(lambda z: net(z, r, t), (z,), (v,))
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(net(forward_ad.make_dual(z, v), r, t))
    assert torch.equal(found.primal, u)
    assert torch.equal(found.tangent, u_dot)
    assert report.left == {}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch.rms_norm
@pytest.mark.parametrize("dtype", [d for d in oracle.DTYPES if d.itemsize == 2])
def test_autocast(dtype):
    net, z, v = Block(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    truth = jvp_in_double(net, z, v)

    def duals(context):
        with torch.autocast("cpu", dtype), context:
            return jvp_of(net, z, v)

    found, pytorchs = duals(accelerate_jvp()), duals(math_attention())
    for one, other, exact in zip(found, pytorchs, truth, strict=True):
        assert one.dtype == other.dtype == dtype
        slack = oracle.allowance(exact, dtype, terms=16)
        assert oracle.error(one, exact) <= 2 * oracle.error(other, exact) + slack
    grads = gradients(found[0].float().sum(), net)
    assert {g.dtype for g in grads} == {torch.float32}


def jvp_in_double(net, z, v):
    parameters = {name: p.detach().double() for name, p in net.named_parameters()}

    def exact(z, r, t):
        return torch.func.functional_call(net, parameters, (z, r, t))

    with math_attention():
        return jvp_of(exact, z.double(), v.double())


def test_the_tape_keeps_no_tangent():
    net, z, v = Block(), torch.randn(2, 5, 3), torch.randn(2, 5, 3)

    def plain():
        return (net(z, torch.zeros(2), torch.ones(2)),), net

    def dual(context):
        with context:
            return jvp_of(net, z, v), net

    ours, pytorchs = kept_bytes(lambda: dual(accelerate_jvp())), kept_bytes(plain)
    assert ours == pytorchs
    assert ours < kept_bytes(lambda: dual(math_attention()))


def test_a_layer_costs_two_products():
    net = nn.Sequential(nn.Conv1d(3, 6, 3), nn.SiLU(), nn.Linear(5, 4))
    x = torch.randn(2, 3, 7)

    def dual():
        return torch.func.jvp(net, (x,), (x,))

    def accelerated():
        with accelerate_jvp():
            return dual()

    plain = products(lambda: net(x))
    assert products(accelerated) == 2 * plain
    assert products(dual) == 3 * plain


TOUCHED = {
    "ours": lambda x, p: F.linear(x, p),
    "a formula": lambda x, p: F.silu(x @ p),
    "attention": lambda x, p: F.scaled_dot_product_attention(*(x[None] @ p,) * 3),
    "a product": lambda x, p: x * p,
    "attention of PyTorch's": lambda x, p: F.scaled_dot_product_attention(*(x @ p,) * 3),
}


def refuses(function, compiled):
    x, p = torch.randn(3, 4, 4), torch.randn(4, 4, requires_grad=True)

    def step(x):
        with accelerate_jvp():
            return torch.func.jvp(lambda x: function(x, p), (x,), (x,))

    torch.compiler.reset()
    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    y, y_dot = step(x)
    y.sum().backward(retain_graph=True)
    assert p.grad.abs().max() > 0
    if compiled and x.is_cuda:
        return  # the device's assertion would end the use of the GPU
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()


@pytest.mark.parametrize("what", TOUCHED)
def test_refuses_a_gradient_at_the_tangent(what):
    refuses(TOUCHED[what], compiled=False)


@pytest.mark.parametrize("what", ["ours", "a formula", "attention"])
def test_refuses_a_gradient_at_the_tangent_compiled(what):
    refuses(TOUCHED[what], compiled=True)


def test_results_may_be_changed_in_place():
    weight, other = randn(4, 4).requires_grad_(), randn(4).requires_grad_()
    x, v = randn(3, 4), randn(3, 4)

    def function(x):
        y = F.linear(x, weight)
        y.add_(other).mul_(other)
        F.silu(y, inplace=True)
        return F.layer_norm(y, (4,)).mul_(other)

    def results(context):
        with context as report:
            y, y_dot = torch.func.jvp(function, (x,), (v,))
        return (y, y_dot, *torch.autograd.grad(y.square().sum(), (weight, other))), report

    found, report = results(accelerate_jvp())
    assert report.left == {("silu", "in place"): 1}
    for one, other_one in zip(found, results(contextlib.nullcontext())[0], strict=True):
        assert oracle.error(one, other_one) <= oracle.allowance(other_one, one.dtype, terms=20)


def tangent_of_a_weight(net, z):
    weight = net.qkv.weight.detach()

    def function(weight):
        return torch.func.functional_call(
            net, {"qkv.weight": weight}, (z, *torch.ones(2, 2).double())
        )

    return torch.func.jvp(function, (weight,), (weight,))


def second_derivative(net, z):
    def first(z):
        return torch.func.jvp(lambda z: net(z, *torch.ones(2, 2).double()), (z,), (z,))[1]

    return torch.func.jvp(first, (z,), (z,))


def gradient_by_func(net, z):
    def loss(parameters):
        call = torch.func.functional_call
        u, u_dot = torch.func.jvp(
            lambda z: call(net, parameters, (z, *torch.ones(2, 2).double())), (z,), (z,)
        )
        return (u + u_dot).square().sum()

    return tuple(torch.func.grad(loss)(dict(net.named_parameters())).values())


def per_sample(net, z):
    def one(z):
        return torch.func.jvp(lambda z: net(z[None], *torch.ones(2, 1).double()), (z,), (z,))[1]

    return (torch.vmap(one)(z),)


UNCOMMON = {
    "tangent of a parameter": tangent_of_a_weight,
    "nested forward mode": second_derivative,
    "inside torch.func.grad, vjp or vmap": gradient_by_func,
    "inside torch.func.grad, vjp or vmap ": per_sample,
}


def test_statistics_of_the_batch_are_pytorchs():
    x, v = randn(4, 3), randn(4, 3)
    with accelerate_jvp() as report:
        found = torch.func.jvp(lambda x: F.batch_norm(x, None, None, training=True), (x,), (v,))
    truth = torch.func.jvp(
        lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(), (x,), (v,)
    )
    for one, other in zip(found, truth, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, other.dtype, terms=60)
    assert report.left == {("batch_norm", "statistics of the batch"): 1}


def test_a_product_of_two_that_move_keeps_no_tangent():
    """PyTorch's: it costs what ours would; hand-written attention and complex RoPE are of these."""
    qkv, rope = nn.Linear(8, 24).double(), torch.polar(torch.ones(5, 4).double(), randn(5, 4))

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * rope).flatten(-2)

    def function(x):
        q, k, v = qkv(x).chunk(3, -1)
        return ((turned(q) @ turned(k).transpose(1, 2)).softmax(-1) @ v,)

    x = randn(2, 5, 8)

    def dual(context):
        with context as report:
            (y,), (y_dot,) = torch.func.jvp(function, (x,), (x,))
        return (y, y_dot, *torch.autograd.grad(y.sum(), qkv.weight, retain_graph=True)), report

    (found, report), (truth, _) = dual(accelerate_jvp()), dual(contextlib.nullcontext())
    for one, other in zip(found, truth, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, other.dtype, terms=90)
    assert report.taken == {"linear": 1}
    with pytest.raises(RuntimeError, match="detach the tangent"):
        found[1].sum().backward()


def with_lora() -> nn.Module:
    peft = load_peft()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian")
    return peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8)))


WRAPPED = {
    "LoRA": with_lora,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_layers_are_taken(wrapper):
    net, x = nn.Sequential(WRAPPED[wrapper]()), torch.randn(3, 8)
    with accelerate_jvp() as report:
        y, y_dot = torch.func.jvp(net, (x,), (x,))
    truth = torch.func.jvp(net, (x,), (x,))
    for one, other in zip((y, y_dot), truth, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, other.dtype, terms=16)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    count = sum(isinstance(module, nn.Linear) for module in net.modules())
    assert (report.taken, report.left) == ({"linear": count}, {})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_fused_attention_of_another_package_says_what_to_swap():
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.randn(1, 2, 16, 8)
    with (
        pytest.raises(NotImplementedError, match=r"flex_attention has no forward mode.*Call F\.sc"),
        accelerate_jvp(),
    ):
        torch.func.jvp(lambda x: flex_attention(x, x, x), (x,), (x,))


def test_complex_numbers_are_pytorchs():
    x = torch.randn(5, dtype=torch.complex128)
    expected = torch.func.jvp(F.silu, (x,), (x.flip(0),))
    with accelerate_jvp() as report:
        found = torch.func.jvp(F.silu, (x,), (x.flip(0),))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert report.left == {("silu", "complex numbers"): 1}


@pytest.mark.parametrize("why", UNCOMMON)
def test_other_derivatives_are_pytorchs(why):
    net, z = Block().double(), randn(2, 5, 3)
    with math_attention():
        expected = UNCOMMON[why](net, z)
    with accelerate_jvp() as report:
        found = UNCOMMON[why](net, z)
    for one, other in zip(found, expected, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, other.dtype, terms=900)
    assert ("linear", why.strip()) in report.left
    assert "tangent" in why or report.taken == {}


def test_reference_is_pytorchs():
    net, z = Block().double(), randn(2, 5, 3)
    with math_attention():
        expected = jvp_of(net, z, z)
    with accelerate_jvp() as report, kernels.reference():
        found = jvp_of(net, z, z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {why for _, why in report.left} == {"inside kernels.reference()"}
    assert report.taken == {}


def test_report_is_a_table():
    x = randn(2, 3, 5, 8)
    with accelerate_jvp() as report:
        for _ in range(2):
            torch.func.jvp(lambda x: F.silu(F.scaled_dot_product_attention(x, x, x)), (x,), (x,))
        torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), (x,), (x,))
    lines = [re.split(r"\s{2,}", line) for line in str(report).splitlines()]
    assert lines == [
        ["function", "calls", "computed by"],
        ["scaled_dot_product_attention", "2", "mfmjt"],
        ["silu", "2", "mfmjt"],
        ["scaled_dot_product_attention", "1", "PyTorch: dropout"],
    ]


def meanflow_step(net, x, noise, r, t):
    """A training step in the words of the public repositories: nothing here knows this package."""
    z = (1 - t)[:, None, None] * x + t[:, None, None] * noise
    v = noise - x
    u, dudt = torch.func.jvp(net, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = (v - (t - r)[:, None, None] * dudt).detach()
    error = ((u - u_tgt) ** 2).flatten(1).sum(1)
    weight = 1 / (error.detach() + 1e-3)
    return (weight * error).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_meanflow_repository_needs_one_with(dtype):
    torch.manual_seed(0)
    net, batch = Block().double(), (randn(4, 5, 3), randn(4, 5, 3), *torch.rand(2, 4).double())

    def run(dtype, context):
        net.to(dtype)
        with context:
            loss = meanflow_step(net, *(t.to(dtype) for t in batch))
        return loss, *gradients(loss, net)

    truth = run(torch.float64, math_attention())
    pytorchs, found = run(dtype, math_attention()), run(dtype, accelerate_jvp())
    slack = max(oracle.allowance(t, dtype, terms=900) for t in truth)
    for one, other, exact in zip(found, pytorchs, truth, strict=True):
        assert oracle.error(one, exact) <= 2 * oracle.error(other, exact) + slack


def test_the_guides_example_runs():
    examples = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    names: dict = {}
    for code in examples:
        exec(compile(code, str(GUIDE), "exec"), names)
    assert "mfmjt" in str(names["report"])
