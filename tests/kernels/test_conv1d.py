from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt import testing
from mfmjt.kernels import conv1d
from mfmjt.kernels.conv1d import conv1d_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(batch, tokens, width, out=6, taps=3, layout=lambda x: x, bias=True):
    values = {"x": layout(randn(batch, tokens, width)), "weight": layout(randn(out, width, taps))}
    return {**values, "bias": randn(out)} if bias else values


def with_dilation(op, dilation):
    return lambda **values: op(**values, dilation=dilation)


def sliced(x):
    """The same numbers as part of wider rows, of which it keeps the dense last axis."""
    return torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


def transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


CASES = {
    "k3": (lambda: inputs(2, 9, 8), 1),
    "k7": (lambda: inputs(2, 9, 8, taps=7), 1),
    "k1": (lambda: inputs(2, 9, 8, taps=1), 1),
    "no bias": (lambda: inputs(2, 9, 8, bias=False), 1),
    "dilated": (lambda: inputs(2, 9, 8), 3),
    "odd sizes": (lambda: inputs(3, 7, 5, out=9), 1),
    "strided": (lambda: inputs(2, 9, 8, layout=strided), 1),
    "one token": (lambda: inputs(2, 1, 8), 1),
    "17 tokens": (lambda: inputs(1, 17, 33, out=19, taps=7), 2),
    "77 tokens": (lambda: inputs(2, 77, 20, out=35), 1),
    "shorter than the halo": (lambda: inputs(2, 3, 8, taps=7), 5),
    "slice of wider rows": (lambda: inputs(2, 9, 16, layout=sliced), 1),
    "transposed": (lambda: inputs(2, 9, 16, layout=transposed), 1),
    "one channel": (lambda: inputs(2, 5, 1, out=1), 1),
    "no sample": (lambda: inputs(0, 4, 8), 1),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, dilation = CASES[case]
    op, ref = with_dilation(conv1d, dilation), with_dilation(conv1d_ref, dilation)
    oracle.check_op(op, ref, make(), ("x",), dtype, terms=64)


@pytest.mark.parametrize("tokens", [250, 391])
def test_lengths_of_the_network(tokens):
    """Several blocks of rows, of which one holds two samples, and split sums over tokens."""
    values = inputs(2, tokens, 48, out=72)
    oracle.check_op(conv1d, conv1d_ref, values, ("x",), torch.float32, terms=2 * tokens)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 3),
)
def test_any_shape(batch, tokens, width, taps, dilation):
    op, ref = with_dilation(conv1d, dilation), with_dilation(conv1d_ref, dilation)
    values = inputs(batch, tokens, width, taps=taps)
    oracle.check_op(op, ref, values, ("x",), torch.float32, terms=45)


def test_compiled():
    oracle.check_compiled(conv1d, inputs(2, 5, 8), ("x",), terms=120, backend="aot_eager")


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(1, 3, 2, out=2).values())
    assert torch.autograd.gradcheck(conv1d_ref, values, check_forward_ad=True)


def test_library_ops():
    x, weight, bias = (t.requires_grad_() for t in inputs(2, 5, 8).values())
    ops, y_bar = torch.ops.mfmjt, randn(2, 5, 6)
    torch.library.opcheck(ops.conv1d_fwd.default, (x, weight, bias, 2))
    leaves = x.detach(), weight.detach()
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ops.conv1d_bwd.default, (y_bar, *leaves, 2, needs))
    torch.library.opcheck(
        ops.conv1d_jvp.default,
        (x, weight, bias, x.detach(), 1),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_two_runs_are_equal_to_the_bit():
    values = inputs(3, 40, 32, out=24)
    testing.check_op(conv1d, conv1d_ref, values, ("x",), torch.float32, terms=120)


def test_a_weight_alone_gets_its_gradient():
    x, weight = torch.randn(2, 5, 8), torch.randn(4, 8, 3, requires_grad=True)
    conv1d(x, weight).sum().backward()  # a cotangent without memory of its own
    truth = torch.autograd.grad(conv1d_ref(x.double(), w := weight.double()).sum(), w)[0]
    assert oracle.error(weight.grad, truth) <= oracle.allowance(truth, x.dtype, terms=10)
    assert x.grad is None


def test_tokens_past_2_to_the_31_elements():
    """Pages that nobody touches take no memory."""
    apart = 2**30 + 16
    memory = torch.from_numpy(np.zeros(2 * apart + 16, dtype=np.float16))
    x = memory.as_strided((1, 3, 16), (0, apart, 1))
    x.copy_(torch.randn(1, 3, 16))
    weight, dtype = torch.randn(5, 16, 3).half(), torch.float16
    truth = conv1d_ref(x.double(), weight.double())
    found = torch.func.jvp(lambda x: conv1d(x, weight), (x,), (x,))
    for y in (conv1d(x, weight), *found):
        assert oracle.error(y, truth) <= oracle.allowance(truth, dtype, terms=48)


def test_padding_is_zero_whatever_lies_beside_the_samples():
    around = torch.full((3, 9, 16), torch.inf)
    around[1] = torch.randn(9, 16)
    y = conv1d(around[1:2], torch.randn(5, 16, 3), dilation=4)
    assert y.isfinite().all()


def test_result_is_channels_last_in_memory():
    """But where it is left to PyTorch, as the weight is larger than what it reads and writes."""
    weight = torch.randn(6, 8, 3)
    assert conv1d(torch.randn(2, 9, 8), weight).is_contiguous()
    x = torch.randn(2, 5, 8)
    for y in torch.func.jvp(lambda x: conv1d(x, weight), (x,), (x,)):
        assert y.is_contiguous()


def test_tape_keeps_no_tangent():
    x, weight = torch.randn(2, 5, 8), torch.randn(4, 8, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.func.jvp(lambda x: conv1d(x, weight), (x,), (torch.randn(2, 5, 8),))
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_autocast():
    dtype = oracle.DTYPES[-1]
    x, weight, bias = (t.float() for t in inputs(2, 5, 16).values())
    weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        plain = conv1d(x, weight, bias)
        y, y_dot = torch.func.jvp(lambda x: conv1d(x, weight, bias), (x,), (x,))
    assert plain.dtype == y.dtype == y_dot.dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    truth = conv1d_ref(x, weight, bias)
    for result in (plain, y, y_dot + bias):
        assert oracle.error(result, truth) <= oracle.allowance(truth, dtype, terms=48)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"K odd; got x \(2, 5, 8\) float32, weight \(6, 8, 4\)"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 8, 4))
    with pytest.raises(ValueError, match="weight"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 7, 3))
    with pytest.raises(ValueError, match=r"bias \(5,\)"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 8, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="dilation 0 >= 1"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 8, 3), dilation=0)
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="one floating dtype"):
        torch.func.jvp(lambda x: conv1d(x, torch.zeros(6, 8, 3).double()), (x,), (x,))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_refuses_a_tangent_of_a_parameter(name):
    values = inputs(2, 3, 8)
    moving = values.pop(name)
    with pytest.raises(NotImplementedError, match=f"does not propagate a tangent of its {name}"):
        torch.func.jvp(lambda p: conv1d(**values, **{name: p}), (moving,), (moving,))


def test_refuses_a_gradient_at_the_tangent():
    x, weight = torch.randn(2, 5, 8), torch.randn(3, 8, 3, requires_grad=True)
    _, y_dot = torch.func.jvp(lambda x: conv1d(x, weight), (x,), (x,))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()
