from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import qk_norm_rope
from mfmjt.kernels.qk_norm_rope import qk_norm_rope_ref
from tests import oracle
from tests.oracle import randn, strided


def inputs(batch, tokens, heads, width, layout=lambda x: x):
    return {
        "qkv": layout(randn(batch, tokens, 3, heads, width)),
        "q_weight": randn(width),
        "k_weight": randn(width),
    }


def angles(tokens, width):
    angle = torch.rand(tokens, width // 2, dtype=torch.float64) * 6
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def with_rope(op, rope):
    return lambda **values: op(**values, rope=rope)


CASES = {
    "rotated": (lambda: inputs(2, 5, 3, 8), True),
    "not rotated": (lambda: inputs(2, 5, 3, 8), False),
    "odd head, not rotated": (lambda: inputs(2, 3, 1, 7), False),
    "strided": (lambda: inputs(2, 5, 3, 8, strided), True),
    "one token": (lambda: inputs(2, 1, 3, 8), True),
    "no sample": (lambda: inputs(0, 5, 3, 8), True),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, rotated = CASES[case]
    values = make()
    _, tokens, _, _, width = values["qkv"].shape
    rope = angles(tokens, width) if rotated else None
    op, ref = with_rope(qk_norm_rope, rope), with_rope(qk_norm_rope_ref, rope)
    oracle.check_op(op, ref, values, ("qkv",), dtype, terms=30)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(2, 12), st.booleans())
def test_any_shape(batch, tokens, heads, half, packed):
    values = inputs(batch, tokens, heads, 2 * half, (lambda x: x) if packed else strided)
    rope = angles(tokens, 2 * half)
    op, ref = with_rope(qk_norm_rope, rope), with_rope(qk_norm_rope_ref, rope)
    oracle.check_op(op, ref, values, ("qkv",), torch.float32, terms=63)


def test_rotates_adjacent_pairs_and_leaves_v_alone():
    qkv, one = torch.randn(1, 1, 3, 1, 4), torch.ones(4)
    quarter = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # 90 degrees, then none
    q, k, v = qk_norm_rope(qkv, one, one, quarter)
    plain, _, _ = qk_norm_rope(qkv, one, one)
    assert torch.equal(
        q[0, 0, 0],
        torch.stack((-plain[..., 1], plain[..., 0], plain[..., 2], plain[..., 3]), -1)[0, 0, 0],
    )
    assert torch.equal(v, qkv[:, :, 2])
    assert k.shape == (1, 1, 1, 4)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_when_only_one_result_is_used(used):
    values = inputs(2, 4, 2, 6)
    rope, bar = angles(4, 6), randn(2, 4, 2, 6)

    def gradients(op):
        leaves = {name: x.clone().requires_grad_() for name, x in values.items()}
        y = op(**leaves, rope=rope)[used]
        found = torch.autograd.grad(
            y, list(leaves.values()), bar, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    truth = gradients(qk_norm_rope_ref)
    for name, found in gradients(qk_norm_rope).items():
        limit = oracle.allowance(truth[name], torch.float64, terms=16)
        assert oracle.error(found, truth[name]) <= limit, name


def test_compiled():
    op = with_rope(qk_norm_rope, angles(5, 8))
    oracle.check_compiled(op, inputs(2, 5, 3, 8), ("qkv",), terms=240, backend="aot_eager")


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(1, 2, 1, 4).values())
    rope = angles(2, 4).double()
    assert torch.autograd.gradcheck(
        lambda *v: qk_norm_rope_ref(*v, rope), values, check_forward_ad=True
    )


def test_library_ops():
    values = list(inputs(2, 3, 2, 8).values())
    leaves = [t.clone().requires_grad_() for t in values]
    rope, ops = angles(3, 8), torch.ops.mfmjt
    torch.library.opcheck(ops.qk_norm_rope_fwd.default, (*leaves, rope, 1e-6))
    q, k, v, *rstd = ops.qk_norm_rope_fwd(*values, rope, 1e-6)
    for bars in ((q, k, v), (q, None, None)):
        torch.library.opcheck(ops.qk_norm_rope_bwd.default, (*bars, *values, rope, *rstd))
    torch.library.opcheck(
        ops.qk_norm_rope_jvp.default,
        (leaves[0], values[0], *leaves[1:], None, 1e-6),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_refuses_what_it_does_not_propagate():
    qkv, q_weight, k_weight = inputs(1, 2, 1, 4).values()
    rope = angles(2, 4)
    with pytest.raises(NotImplementedError, match="tangent of its k_weight"):
        torch.func.jvp(lambda w: qk_norm_rope(qkv, q_weight, w), (k_weight,), (k_weight,))
    with pytest.raises(NotImplementedError, match="tangent of its rope"):
        torch.func.jvp(lambda r: qk_norm_rope(qkv, q_weight, k_weight, r), (rope,), (rope,))
    with pytest.raises(NotImplementedError, match="no gradient of its rope"):
        qk_norm_rope(qkv, q_weight, k_weight, rope.requires_grad_())


def test_refuses_what_does_not_fit():
    qkv, weight = torch.zeros(1, 2, 3, 1, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"q_weight \(3,\)"):
        qk_norm_rope(qkv, torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"rope \(3, 2, 2\)"):
        qk_norm_rope(qkv, weight, weight, torch.zeros(3, 2, 2))


@pytest.mark.parametrize("result", [0, 1, 2])
def test_refuses_a_gradient_at_the_tangent(result):
    qkv, weight = torch.randn(1, 2, 3, 1, 4, requires_grad=True), torch.ones(4)
    _, y_dots = torch.func.jvp(
        lambda x: qk_norm_rope(x, weight, weight), (qkv,), (torch.ones_like(qkv),)
    )
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dots[result].sum().backward()
