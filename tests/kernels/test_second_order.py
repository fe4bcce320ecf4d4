"""Gradients that reach a tangent: by the fourth formula of an op, or PyTorch's own, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mfmjt import kernels, meanflow, testing
from mfmjt.kernels import _backends
from mfmjt.model import MFMJT
from tests import oracle
from tests.kernels.inputs import inputs, moving

CASES = [
    ("swiglu", 1),
    ("linear", 1),
    ("conv1d", 1),
    ("adaln", 1),
    ("adaln", 4),
    ("gated_residual_adaln", None),
    ("gated_residual_adaln", 4),
    ("qk_norm_rope", 1),
    ("joint_attention", 1),
]


class Call:
    """An op's values and tangents as a function of its tensors and of its tangents.

    Attributes:
        function: Of the tensors named `names` and then of the tangents.
        given: What it is called with, of one dtype.
    """

    def __init__(self, op, rows=1, dtype=torch.float64, moves=None):
        given = inputs(op, rows=rows, dtype=dtype)
        floats = [n for n, x in given.items() if torch.is_tensor(x) and x.is_floating_point()]
        self.names = [n for n in floats if n != "rope"]
        self.moves = moving(op) if moves is None else moves
        dots = [torch.randn_like(given[n]) for n in self.moves]
        self.given = [given[n].clone() for n in self.names] + dots

        def function(*tensors):
            every = given | dict(zip(self.names, tensors, strict=False))
            dots = tuple(tensors[len(self.names) :])

            def moved(*xs):
                return getattr(kernels, op)(**(every | dict(zip(self.moves, xs, strict=True))))

            primals = tuple(every[n] for n in self.moves)
            ys, y_dots = torch.func.jvp(moved, primals, dots)
            return (*testing.as_tuple(ys), *testing.as_tuple(y_dots))

        self.function = function

    def gradients(self, bars=None, dtype=None, function=None):
        """Return the gradients of all that it is called with, and the cotangents."""
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in self.given]
        ys = (function or self.function)(*leaves)
        bars = [torch.randn_like(y) for y in ys] if bars is None else bars
        found = torch.autograd.grad(
            ys, leaves, [bar.to(y) for bar, y in zip(bars, ys, strict=True)], materialize_grads=True
        )
        return found, bars


@pytest.mark.parametrize(("op", "rows"), CASES)
def test_gradients_are_those_of_differences(op, rows):
    call = Call(op, rows)
    leaves = [x.requires_grad_() for x in call.given]
    with kernels.differentiable_tangents():
        assert torch.autograd.gradcheck(call.function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "rows"), CASES)
def test_gradients_are_those_of_the_reference(op, rows, dtype):
    """PyTorch's reverse mode over its forward mode, with norms that are right."""
    if dtype == torch.bfloat16 and _backends.INTERPRETED:
        pytest.skip("the interpreter has no bfloat16")
    call = Call(op, rows, dtype)
    with kernels.differentiable_tangents():
        with kernels.reference():
            truth, bars = call.gradients(dtype=torch.float64)
            theirs, _ = call.gradients(bars)
        ours, _ = call.gradients(bars)
    largest = max((x for x in truth), key=lambda x: float(x.abs().max()))
    lost = max(oracle.error(x, y) for x, y in zip(theirs, truth, strict=True))
    for x, y in zip(ours, truth, strict=True):
        assert x.dtype == dtype
        assert oracle.error(x, y) <= 2 * lost + oracle.allowance(largest, dtype, terms=64)


@pytest.mark.parametrize("name", ["gate", "up"])
def test_what_does_not_move_has_a_gradient_too(name):
    call = Call("swiglu", moves=[name])
    with kernels.differentiable_tangents():
        assert torch.autograd.gradcheck(call.function, [x.requires_grad_() for x in call.given])


@pytest.mark.parametrize("op", ["swiglu", "adaln", "joint_attention"])
def test_compiled_it_is_the_same(op):
    call = Call(op)

    def function(*tensors):
        with kernels.differentiable_tangents():
            return call.function(*tensors)

    truth, bars = call.gradients(function=function)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, _ = call.gradients(bars, function=compiled)
    for x, y in zip(found, truth, strict=True):
        assert oracle.error(x, y) <= oracle.allowance(y, x.dtype, terms=64)


def test_streams():
    xs = [torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    dots = tuple(torch.randn_like(x) for x in xs)

    def gradients(apart):
        def moved(*xs):
            return tuple(kernels.swiglu(x, x) for x in xs) if apart else kernels.swiglu(xs, xs)

        with kernels.differentiable_tangents():
            _, y_dots = torch.func.jvp(moved, tuple(xs), dots)
        return torch.autograd.grad([y.sum() for y in y_dots], xs)

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_the_graph_keeps_values_and_tangents_alone():
    call = Call("adaln", dtype=torch.float32)
    leaves = [x.requires_grad_() for x in call.given]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x)
    with kernels.differentiable_tangents(), hooks:
        call.function(*leaves)
    assert {x.untyped_storage().data_ptr() for x in kept if x.ndim} <= {
        x.untyped_storage().data_ptr() for x in leaves
    }


def test_an_op_without_the_formula_refuses_as_outside():
    call = Call("snake")
    with kernels.differentiable_tangents(), pytest.raises(RuntimeError, match="no tape of tangent"):
        call.gradients()
    with pytest.raises(RuntimeError, match=r"inside mfmjt\.kernels\.differentiable_tangents\(\)"):
        Call("swiglu").gradients()


def test_layer_norm_of_pytorch():
    """PyTorch's own gradient of its tangent is wrong: once it is right, the block need not care."""
    x, dot = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = nn.LayerNorm(5).double()
    nn.init.normal_(norm.weight)

    def both(x, dot):
        return torch.func.jvp(norm, (x,), (dot,))

    assert not torch.autograd.gradcheck(both, (x, dot), raise_exception=False)
    with kernels.differentiable_tangents():
        assert torch.autograd.gradcheck(both, (x, dot))
        for refused in (lambda x: F.batch_norm(x, None, None, training=True), F.instance_norm):
            with pytest.raises(NotImplementedError, match="Use layer or group norm"):
                torch.func.jvp(refused, (x[None],), (dot[None],))
        mean = torch.zeros(5, dtype=torch.float64)
        torch.func.jvp(lambda x: F.batch_norm(x, mean, mean + 1), (x,), (dot,))


@pytest.mark.parametrize("how", ["plain", "recompute", "accelerate_jvp"])
def test_a_network_in_lsd(how):
    torch.manual_seed(0)
    net = MFMJT.from_config("nano", depth=2, fused_depth=1, hidden_dim=64, num_heads=1).double()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    x, e, t = torch.randn(2, 25, 20).double(), torch.randn(2, 25, 20).double(), torch.rand(2)

    def gradients(net):
        loss = meanflow.loss(net, x, noise=e, r=t / 2, t=t, target=meanflow.lsd)
        trained = [p for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, trained, materialize_grads=True)

    with kernels.reference():
        truth = gradients(net)
    other = copy.deepcopy(net)
    other.recompute_blocks(how == "recompute")
    if how == "accelerate_jvp":
        with kernels.accelerate_jvp():
            found = gradients(other)
    else:
        found = gradients(other)
    largest = max(truth, key=lambda g: float(g.abs().max()))
    for g, g_truth in zip(found, truth, strict=True):
        assert oracle.error(g, g_truth) <= oracle.allowance(largest, g.dtype, terms=10**4)
