from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import joint_attention
from mfmjt.kernels.joint_attention import joint_attention_ref
from tests import oracle
from tests.oracle import randn, strided

module = importlib.import_module("mfmjt.kernels.joint_attention")


def inputs(batch, queries, keys, heads=2, width=8, layout=lambda x: x):
    """Streams by name: q0, q1, ..., k0, ..., v0, ..."""
    sizes = {"q": queries, "k": keys, "v": keys}
    return {
        f"{name}{i}": layout(randn(batch, tokens, heads, width))
        for name, streams in sizes.items()
        for i, tokens in enumerate(streams)
    }


def streams(op, **options):
    """The op as a function of streams by name."""

    def call(**values):
        q, k, v = (tuple(values[n] for n in sorted(values) if n[0] == letter) for letter in "qkv")
        return op(q, k, v, **options)

    return call


ALL = ("q0", "q1", "k0", "k1", "v0", "v1")
CASES = {
    "one stream": (lambda: inputs(2, (7,), (7,)), ("q0", "k0", "v0")),
    "two streams": (lambda: inputs(2, (5, 3), (5, 3)), ALL),
    "cross": (lambda: inputs(2, (3, 1), (9, 4)), ALL),
    "fewer queries": (lambda: inputs(2, (5,), (5, 3)), ("q0", "k0", "v1")),
    "strided": (lambda: inputs(2, (5, 3), (5, 3), layout=strided), ALL),
    "one token": (lambda: inputs(2, (1,), (1,)), ("q0", "k0", "v0")),
    "odd head": (lambda: inputs(1, (5, 2), (5, 2), heads=3, width=5), ALL),
    "no sample": (lambda: inputs(0, (5, 3), (5, 3)), ALL),
    "only q moves": (lambda: inputs(2, (5, 3), (5, 3)), ("q1",)),
    "only k moves": (lambda: inputs(2, (5, 3), (5, 3)), ("k0",)),
    "only v moves": (lambda: inputs(2, (5, 3), (5, 3)), ("v0",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, moving = CASES[case]
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    oracle.check_op(op, ref, make(), moving, dtype, terms=16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lengths_and_scale(dtype):
    values = inputs(3, (5, 4), (5, 4))
    options = {"lengths": (None, torch.tensor([4, 1, 0])), "scale": 0.7}
    op, ref = streams(joint_attention, **options), streams(joint_attention_ref, **options)
    oracle.check_op(op, ref, values, ALL, dtype, terms=16)


def test_keys_beyond_the_length_have_no_influence():
    q, k, v = randn(2, 5, 2, 8), randn(2, 6, 2, 8), randn(2, 6, 2, 8)
    lengths = torch.tensor([4, 0])
    k[0, 4:], v[0, 4:], k[1], v[1] = (torch.nan,) * 4
    k.requires_grad_(), v.requires_grad_()
    y, y_dot = torch.func.jvp(
        lambda k, v: joint_attention(q, k, v, lengths=lengths), (k, v), (k.detach(), v.detach())
    )
    y.sum().backward()
    alone = joint_attention(q[:1], k[:1, :4], v[:1, :4])
    assert oracle.error(y[:1], alone) <= oracle.allowance(alone, torch.float64, terms=8)
    for empty in (y[1], y_dot[1], k.grad[0, 4:], k.grad[1], v.grad[0, 4:], v.grad[1]):
        assert torch.equal(empty, torch.zeros_like(empty))
    assert y_dot.isfinite().all()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("block", [1, 40])
def test_blocks_of_queries_make_no_difference(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    oracle.check_op(op, ref, inputs(2, (5, 3), (5, 3)), ALL, torch.float64, terms=16)


def test_explicit_form_that_other_devices_use():
    q, k, v, o_bar = (randn(2, 6, 2, 8) for _ in range(4))
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    arguments = (q, k, v, valid, 0.3)
    o, lse = module._fwd(*arguments)
    found = (o, lse, *module._bwd(o_bar, q, k, v, o, lse, valid, 0.3))
    o, lse = module._fwd_cpu(*arguments)
    truth = (o, lse, *module._bwd_cpu(o_bar, q, k, v, o, lse, valid, 0.3))
    for a, b in zip(found, truth, strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=8)


def test_tangent_keeps_its_digits_when_scores_share_an_offset():
    """Every key has a large common part, along which the query moves: S_dot is one big constant."""
    q, k, v = (randn(1, 33, 1, 16) for _ in range(3))
    k, q_dot = k + 100, 100 * torch.ones_like(q)
    rounded = [t.float() for t in (q, k, v, q_dot)]

    def tangent(op, q, k, v, q_dot):
        return torch.func.jvp(lambda q: op(q, k, v), (q,), (q_dot,))[1]

    truth = tangent(joint_attention_ref, *(t.double() for t in rounded))
    reference = oracle.error(tangent(joint_attention_ref, *rounded), truth)
    assert oracle.error(tangent(joint_attention, *rounded), truth) <= reference


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 6), min_size=2, max_size=2),
    st.lists(st.integers(1, 6), min_size=2, max_size=2),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_any_shape(batch, queries, keys, heads, width):
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(batch, queries, keys, heads, width)
    oracle.check_op(op, ref, values, ALL, torch.float32, terms=12)


def test_agrees_with_scaled_dot_product_attention():
    q, k, v = (randn(2, n, 2, 8) for n in (5, 7, 7))
    truth = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    found = joint_attention(q, k, v)
    assert oracle.error(found, truth) <= oracle.allowance(truth, torch.float64, terms=8)


def test_compiled():
    values = inputs(2, (5, 3), (5, 3))
    oracle.check_compiled(
        streams(joint_attention), values, ("q0", "k1", "v0"), terms=256, backend="aot_eager"
    )


def test_reference_is_differentiable_in_both_modes():
    values = inputs(2, (2,), (2, 1), heads=1, width=2)
    lengths = (torch.tensor([1, 2]), None)

    def op(*tensors):
        given = dict(zip(values, tensors, strict=True))
        return streams(joint_attention_ref, lengths=lengths)(**given)

    leaves = tuple(x.requires_grad_() for x in values.values())
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True)


def test_library_ops():
    q, k, v = (randn(2, 5, 2, 8).float() for _ in range(3))
    valid = torch.ones(2, 5, dtype=torch.bool)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ops = torch.ops.mfmjt
    torch.library.opcheck(ops.joint_attention_fwd.default, (*leaves, valid, 0.3))
    o, lse = ops.joint_attention_fwd(q, k, v, None, 0.3)
    torch.library.opcheck(ops.joint_attention_bwd.default, (o, q, k, v, o, lse, None, 0.3))
    torch.library.opcheck(
        ops.joint_attention_jvp.default,
        (*leaves, q, None, v, valid, 0.3),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_autocast():
    q, k, v = (randn(2, 5, 2, 8).float() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        plain = joint_attention(q, k, v)
        y, y_dot = torch.func.jvp(lambda q: joint_attention(q, k, v), (q,), (q,))
    assert plain.dtype == y.dtype == y_dot.dtype == torch.bfloat16
    truth = joint_attention_ref(q, k, v)
    for result in (plain, y):
        assert oracle.error(result, truth) <= oracle.allowance(truth, torch.bfloat16, terms=16)


@pytest.mark.parametrize(
    ("q", "k", "v", "lengths"),
    [
        ((2, 3, 2, 8), (2, 3, 2, 4), (2, 3, 2, 4), None),
        ((2, 3, 2, 8), (2, 3, 2, 8), (2, 4, 2, 8), None),
        ((2, 3, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8), (None, None)),
        ((2, 3, 2, 8), (2, 0, 2, 8), (2, 0, 2, 8), None),
        ((2, 3, 8), (2, 3, 8), (2, 3, 8), None),
    ],
)
def test_refuses_what_does_not_fit(q, k, v, lengths):
    with pytest.raises(ValueError, match=r"needs q, k, v \(B, tokens, H, D\).*got q\[0\]"):
        joint_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), lengths=lengths)


def test_refuses_a_gradient_at_the_tangent():
    q = torch.randn(2, 3, 2, 8, requires_grad=True)
    _, y_dot = torch.func.jvp(lambda q: joint_attention(q, q, q), (q,), (torch.ones_like(q),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()


def test_same_bits_twice():
    q = randn(2, 50, 2, 8).float()
    assert torch.equal(joint_attention(q, q, q), joint_attention(q, q, q))
