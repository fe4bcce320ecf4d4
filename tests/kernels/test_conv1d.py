from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import conv1d
from mfmjt.kernels.conv1d import conv1d_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(batch, tokens, width, out=6, taps=3, layout=lambda x: x, bias=True):
    values = {"x": layout(randn(batch, tokens, width)), "weight": layout(randn(out, width, taps))}
    return {**values, "bias": randn(out)} if bias else values


def with_dilation(op, dilation):
    return lambda **values: op(**values, dilation=dilation)


CASES = {
    "k3": (lambda: inputs(2, 9, 8), 1),
    "k7": (lambda: inputs(2, 9, 8, taps=7), 1),
    "k1": (lambda: inputs(2, 9, 8, taps=1), 1),
    "no bias": (lambda: inputs(2, 9, 8, bias=False), 1),
    "dilated": (lambda: inputs(2, 9, 8), 3),
    "odd sizes": (lambda: inputs(3, 7, 5, out=9), 1),
    "strided": (lambda: inputs(2, 9, 8, layout=strided), 1),
    "one token": (lambda: inputs(2, 1, 8), 1),
    "one channel": (lambda: inputs(2, 5, 1, out=1), 1),
    "no sample": (lambda: inputs(0, 4, 8), 1),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, dilation = CASES[case]
    op, ref = with_dilation(conv1d, dilation), with_dilation(conv1d_ref, dilation)
    oracle.check_op(op, ref, make(), ("x",), dtype, terms=64)


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


def test_library_op():
    x, weight, bias = (t.requires_grad_() for t in inputs(2, 5, 8).values())
    torch.library.opcheck(
        torch.ops.mfmjt.conv1d_jvp.default,
        (x, x.detach(), weight, bias, 1),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_result_is_channels_last_in_memory():
    assert conv1d(torch.randn(2, 5, 8), torch.randn(6, 8, 3)).is_contiguous()


def test_tape_keeps_no_tangent():
    x, weight = torch.randn(2, 5, 8), torch.randn(4, 8, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.func.jvp(lambda x: conv1d(x, weight), (x,), (torch.randn(2, 5, 8),))
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_autocast():
    x, weight, bias = (t.float() for t in inputs(2, 5, 16).values())
    with torch.autocast("cpu", torch.bfloat16):
        plain = conv1d(x, weight, bias)
        y, y_dot = torch.func.jvp(lambda x: conv1d(x, weight, bias), (x,), (x,))
    assert plain.dtype == y.dtype == y_dot.dtype == torch.bfloat16
    truth = conv1d_ref(x, weight, bias)
    for result in (plain, y, y_dot + bias):
        assert oracle.error(result, truth) <= oracle.allowance(truth, torch.bfloat16, terms=48)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"K odd; got x \(2, 5, 8\) float32, weight \(6, 8, 4\)"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 8, 4))
    with pytest.raises(ValueError, match="weight"):
        conv1d(torch.zeros(2, 5, 8), torch.zeros(6, 7, 3))


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
