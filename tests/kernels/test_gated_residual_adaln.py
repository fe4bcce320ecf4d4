from __future__ import annotations

import pytest
import torch

from mfmjt.kernels import gated_residual_adaln
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(batch, tokens, width, modulated, layout=lambda x: x):
    shapes = {"x": tokens, "h": tokens, "gate": modulated, "shift": modulated, "scale": modulated}
    return {name: layout(randn(batch, n, width)) for name, n in shapes.items()}


ALL = ("x", "h", "gate", "shift", "scale")
CASES = {
    "per sample": (lambda: inputs(3, 7, 16, 1), ALL),
    "per token": (lambda: inputs(2, 5, 33, 5), ALL),
    "strided": (lambda: inputs(2, 5, 16, 5, strided), ALL),
    "one token": (lambda: inputs(2, 1, 16, 1), ALL),
    "no sample": (lambda: inputs(0, 4, 16, 1), ALL),
    "only x moves": (lambda: inputs(2, 4, 16, 1), ("x",)),
    "only h moves": (lambda: inputs(2, 4, 16, 1), ("h",)),
    "only gate moves": (lambda: inputs(2, 4, 16, 4), ("gate",)),
    "only scale moves": (lambda: inputs(2, 4, 16, 1), ("scale",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, moving = CASES[case]
    values = make()
    terms = max(values["x"].shape[1:])
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, values, moving, dtype, terms)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_when_one_result_is_unused(used):
    values = inputs(2, 4, 8, 4)

    def one(op):
        return lambda **given: op(**given)[used]

    # What only the other result depends on gets zeros.
    leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
    y = one(gated_residual_adaln)(**leaves)
    bar = torch.randn_like(y)
    found = torch.autograd.grad(y, list(leaves.values()), bar)
    y = one(gated_residual_adaln_ref)(**leaves)
    truth = torch.autograd.grad(
        y, list(leaves.values()), bar, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, truth, strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=8)


def test_compiled():
    oracle.check_compiled(
        gated_residual_adaln, inputs(2, 5, 16, 5), ("x", "h", "gate"), 16, "aot_eager"
    )


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(2, 2, 4, 1).values())
    assert torch.autograd.gradcheck(
        gated_residual_adaln_ref, values, check_forward_ad=True, fast_mode=True
    )


def test_library_ops():
    values = list(inputs(2, 3, 8, 3).values())
    leaves = [t.clone().requires_grad_() for t in values]
    ops = torch.ops.mfmjt
    torch.library.opcheck(ops.gated_residual_adaln_fwd.default, (*leaves, 1e-6))
    total, y, mean, rstd = ops.gated_residual_adaln_fwd(*values, 1e-6)
    saved = (total, *values[1:], mean, rstd)
    for bars in ((total, y), (total, None), (None, y)):
        torch.library.opcheck(ops.gated_residual_adaln_bwd.default, (*bars, *saved))
    torch.library.opcheck(
        ops.gated_residual_adaln_jvp.default,
        (*leaves, *values[:2], None, values[3], None, 1e-6),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_refuses_what_does_not_fit():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="gate that broadcasts to x"):
        gated_residual_adaln(x, x, torch.zeros(2, 2, 8), x, x)
    with pytest.raises(ValueError, match="h of the shape of x"):
        gated_residual_adaln(x, x[:, :1], x, x, x)


@pytest.mark.parametrize("result", [0, 1])
def test_refuses_a_gradient_at_the_tangent(result):
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, y_dots = torch.func.jvp(
        lambda x: gated_residual_adaln(x, x, x, x, x), (x,), (torch.ones_like(x),)
    )
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dots[result].sum().backward()
