from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mfmjt.kernels import _filter, snake
from mfmjt.kernels.snake import snake_ref
from tests import oracle
from tests.oracle import randn, strided

module = importlib.import_module("mfmjt.kernels.snake")


def inputs(batch, channels, samples, layout=lambda x: x):
    return {
        "x": layout(randn(batch, channels, samples)),
        "alpha": randn(channels) / 3,
        "beta": randn(channels) / 3,
    }


CASES = {
    "whole blocks": lambda: inputs(2, 3, 32),
    "odd length": lambda: inputs(2, 3, 37),
    "strided": lambda: inputs(2, 3, 21, strided),
    "one sample": lambda: inputs(2, 3, 1),
    "two samples": lambda: inputs(1, 1, 2),
    "empty batch": lambda: inputs(0, 3, 8),
}


def test_taps_are_kept_and_the_same():
    """Numbers are copied to a GPU once; a tensor of a transform or of a mode is not kept."""
    x = torch.randn(1, 2, 9)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        kept = _filter.taps(x.to(dtype))
        assert torch.equal(kept, x.to(dtype).new_tensor(_filter.FILTER))
        assert _filter.taps(x.to(dtype)) is kept
    _filter._kept_taps.cache_clear()
    found = []

    def watched(x):
        found.append(_filter.taps(x))
        return snake_ref(x, torch.zeros(2), torch.zeros(2))

    torch.func.jvp(watched, (x,), (x,))
    with torch.inference_mode():
        watched(x)
    weight = torch.zeros(2, requires_grad=True)
    snake_ref(x, weight, weight).sum().backward()
    assert found[0] is found[1] is _filter.taps(x)
    with FakeTensorMode():
        assert isinstance(_filter.taps(torch.empty(1, 2, 9)), FakeTensor)
    assert not isinstance(_filter.taps(x), FakeTensor)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    oracle.check_op(snake, snake_ref, CASES[case](), ("x",), dtype, terms=74)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70))
def test_any_shape(batch, channels, samples):
    values = inputs(batch, channels, samples)
    oracle.check_op(snake, snake_ref, values, ("x",), torch.float32, terms=210)


@pytest.mark.parametrize("samples", [1, 17, 77, 250, 391, 1203])
def test_lengths(samples):
    """1203: a stretch in the middle is out of reach of both ends."""
    values = inputs(1, 1 if samples > 1000 else 3, samples)
    oracle.check_op(snake, snake_ref, values, (), torch.float32, terms=74 + samples)


def test_views_and_two_runs_are_bit_equal():
    values = [t.float() for t in inputs(1, 3, 1).values()]
    wide = torch.randn(2, 6, 60)
    for x in (
        wide[:, ::2, 3:-1],
        wide[..., :9].permute(0, 2, 1)[:, :3],
        wide[:1, :3].expand(2, -1, -1),
    ):
        known = snake(x.contiguous(), *values[1:])
        assert torch.equal(snake(x, *values[1:]), known)
        assert torch.equal(snake(x, *values[1:]), known)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e4, torch.float32), (1e12, torch.float32), (1e30, torch.float32), (5e4, torch.float16)],
)
def test_loud_input_stays_bounded(size, dtype):
    """Far beyond what a sine resolves; the activation adds at most its height."""
    x, alpha = torch.full((1, 2, 40), size, dtype=dtype), torch.tensor([0.0, 6.0], dtype=dtype)
    y = snake(x, alpha, torch.zeros(2, dtype=dtype))
    assert oracle.error(y, x) <= 1 + oracle.allowance(x, x.dtype, terms=24)


def test_chunks_make_no_difference(monkeypatch):
    values = inputs(2, 3, 20)
    whole = snake(**values)
    monkeypatch.setattr(module, "_CHUNK", 100)  # two rows at a time
    assert torch.equal(snake(**values), whole)
    oracle.check_op(snake, snake_ref, values, ("x",), torch.float64, terms=40)


def test_filter_is_the_published_one():
    """Alias-Free GAN's design: cutoff 1/4, half width 0.3, 12 taps, with numpy's Kaiser window."""
    attenuation = 2.285 * 5 * np.pi * 1.2 + 7.95
    assert attenuation > 50
    time = np.arange(12) - 5.5
    taps = np.sinc(time / 2) * np.kaiser(12, 0.1102 * (attenuation - 8.7))
    truth = torch.from_numpy(taps / taps.sum())
    found = torch.tensor(_filter.FILTER, dtype=torch.float64)
    assert oracle.error(found, truth) <= oracle.allowance(truth, torch.float64, terms=12)


def test_a_constant_passes_both_filters():
    """Filters of unit gain and repeated edges: what is left is the activation itself."""
    x = torch.full((1, 1, 40), 0.3, dtype=torch.float64)
    alpha, beta = randn(1), randn(1)
    truth = x + torch.sin(alpha.exp() * x) ** 2 / (beta.exp() + 1e-9)
    assert oracle.error(snake(x, alpha, beta), truth) <= oracle.allowance(truth, x.dtype, terms=24)


def test_compiled():
    oracle.check_compiled(snake, inputs(2, 3, 20), ("x",), terms=120, backend="aot_eager")


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(1, 2, 4).values())
    assert torch.autograd.gradcheck(snake_ref, values, check_forward_ad=True)


def test_library_ops():
    values = list(inputs(2, 3, 20).values())
    leaves = [t.clone().requires_grad_() for t in values]
    torch.library.opcheck(torch.ops.mfmjt.snake_fwd.default, leaves)
    torch.library.opcheck(torch.ops.mfmjt.snake_bwd.default, (values[0], *values))
    torch.library.opcheck(
        torch.ops.mfmjt.snake_jvp.default,
        (leaves[0], values[0], *leaves[1:]),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"alpha \(3,\)"):
        snake(torch.zeros(1, 2, 5), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="N > 0"):
        snake(torch.zeros(1, 2, 0), torch.zeros(2), torch.zeros(2))


def test_refuses_a_tangent_of_its_parameters():
    x, alpha, beta = inputs(1, 2, 5).values()
    with pytest.raises(NotImplementedError, match="tangent of its beta"):
        torch.func.jvp(lambda b: snake(x, alpha, b), (beta,), (beta,))


def test_refuses_a_gradient_at_the_tangent():
    x, alpha, beta = inputs(1, 2, 5).values()
    x.requires_grad_()
    _, y_dot = torch.func.jvp(lambda x: snake(x, alpha, beta), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()
