from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import adaln
from mfmjt.kernels.adaln import adaln_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(batch, tokens, width, modulated, layout=lambda x: x):
    return {
        "x": layout(randn(batch, tokens, width)),
        "shift": layout(randn(batch, modulated, width)),
        "scale": layout(randn(batch, modulated, width)),
    }


CASES = {
    "per sample": (lambda: inputs(3, 7, 16, 1), ("x", "shift", "scale")),
    "per token": (lambda: inputs(2, 5, 33, 5), ("x", "shift", "scale")),
    "strided": (lambda: inputs(2, 5, 16, 5, strided), ("x", "shift", "scale")),
    "one token": (lambda: inputs(2, 1, 16, 1), ("x", "shift", "scale")),
    "no sample": (lambda: inputs(0, 4, 16, 1), ("x", "shift", "scale")),
    "only x moves": (lambda: inputs(2, 4, 16, 1), ("x",)),
    "only modulation moves": (lambda: inputs(2, 4, 16, 4), ("shift", "scale")),
    "only scale moves": (lambda: inputs(2, 4, 16, 1), ("scale",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, moving = CASES[case]
    values = make()
    oracle.check_op(adaln, adaln_ref, values, moving, dtype, terms=max(values["x"].shape[1:]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(4, 40), st.booleans(), st.booleans())
def test_any_shape(batch, tokens, width, per_token, packed):
    layout = (lambda x: x) if packed else strided
    values = inputs(batch, tokens, width, tokens if per_token else 1, layout)
    oracle.check_op(adaln, adaln_ref, values, tuple(values), torch.float32, terms=40)


def test_compiled():
    oracle.check_compiled(adaln, inputs(2, 5, 16, 1), ("x", "scale"), terms=16, backend="aot_eager")


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(2, 3, 5, 1).values())
    assert torch.autograd.gradcheck(adaln_ref, values, check_forward_ad=True)


def test_library_ops():
    x, shift, scale = inputs(2, 3, 8, 3).values()
    leaves = [t.clone().requires_grad_() for t in (x, shift, scale)]
    torch.library.opcheck(torch.ops.mfmjt.adaln_fwd.default, (*leaves, 1e-6))
    y, mean, rstd = torch.ops.mfmjt.adaln_fwd(x, shift, scale, 1e-6)
    torch.library.opcheck(torch.ops.mfmjt.adaln_bwd.default, (y, x, shift, scale, mean, rstd))
    torch.library.opcheck(
        torch.ops.mfmjt.adaln_jvp.default,
        (*leaves, x, None, scale, 1e-6),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_half_precision_is_normalised_in_float32():
    x = torch.full((1, 1, 64), 300.0, dtype=torch.float16)  # 64 * 300^2 overflows float16
    x[..., ::2] = 200
    y = adaln(x, torch.zeros_like(x), torch.zeros_like(x))
    assert torch.equal(y.abs(), torch.ones_like(y))


def test_refuses_what_does_not_broadcast():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"shift that broadcasts to x; got x \(2, 3, 8\) float32"):
        adaln(x, torch.zeros(2, 2, 8), x)


def test_refuses_a_gradient_at_the_tangent():
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, y_dot = torch.func.jvp(lambda x: adaln(x, x, x), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()


def test_same_bits_twice():
    values = inputs(3, 7, 16, 1)
    assert torch.equal(adaln(**values), adaln(**values))
