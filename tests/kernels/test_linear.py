from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt import kernels, testing
from mfmjt.kernels import linear
from mfmjt.kernels.linear import linear_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(*shape, out=12, layout=lambda x: x, bias=True):
    values = {"x": layout(randn(*shape)), "weight": layout(randn(out, shape[-1]))}
    return {**values, "bias": randn(out)} if bias else values


CASES = {
    "sequences": lambda: inputs(2, 5, 16),
    "no bias": lambda: inputs(2, 5, 16, bias=False),
    "odd sizes": lambda: inputs(3, 7, 9, out=5),
    "strided": lambda: inputs(2, 5, 16, layout=strided),
    "one token": lambda: inputs(2, 1, 16),
    "no sample": lambda: inputs(0, 4, 16),
    "vectors": lambda: inputs(4, 16),
    "one vector": lambda: inputs(16),
    "rank 4": lambda: inputs(2, 3, 4, 8),
    "17 tokens": lambda: inputs(3, 17, 33, out=19),
    "391 tokens": lambda: inputs(1, 391, 20, out=35),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    oracle.check_op(linear, linear_ref, CASES[case](), ("x",), dtype, terms=40)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(shape, out, packed, bias):
    layout = (lambda x: x) if packed else strided
    values = inputs(*shape, out=out, layout=layout, bias=bias)
    oracle.check_op(linear, linear_ref, values, ("x",), torch.float32, terms=36)


def test_two_runs_are_equal_to_the_bit():
    values = inputs(3, 40, 32, out=24)
    testing.check_op(linear, linear_ref, values, ("x",), torch.float32, terms=120)


def test_compiled():
    oracle.check_compiled(linear, inputs(2, 5, 16), ("x",), terms=120, backend="aot_eager")


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(2, 3, out=2).values())
    assert torch.autograd.gradcheck(linear_ref, values, check_forward_ad=True)


def test_library_op():
    x, weight, bias = inputs(2, 3, 8).values()
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    torch.library.opcheck(
        torch.ops.mfmjt.linear_jvp.default,
        (x.clone().requires_grad_(), *leaves, x),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_tape_keeps_no_tangent():
    x, weight = torch.randn(5, 8), torch.randn(4, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.randn(5, 8),))
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weight, bias = (t.float() for t in inputs(2, 5, 16).values())
    weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        plain = linear(x, weight, bias)
        y, y_dot = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))
    assert plain.dtype == y.dtype == y_dot.dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    truth = linear_ref(x, weight, bias).double()
    for result in (plain, y, y_dot + bias):
        assert oracle.error(result, truth) <= oracle.allowance(truth, dtype, terms=16)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_refuses_a_tangent_of_a_parameter(name):
    values = inputs(2, 3, 8)
    moving = values.pop(name)
    with pytest.raises(NotImplementedError, match=f"does not propagate a tangent of its {name}"):
        torch.func.jvp(lambda p: linear(**values, **{name: p}), (moving,), (moving,))
    with kernels.reference():
        _, y_dot = torch.func.jvp(lambda p: linear(**values, **{name: p}), (moving,), (moving,))
    assert y_dot.abs().max() > 0


def test_refuses_a_gradient_at_the_tangent():
    x, weight = torch.randn(2, 8), torch.randn(3, 8, requires_grad=True)
    _, y_dot = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()
