from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import _backends, qk_norm_rope
from mfmjt.kernels.qk_norm_rope import qk_norm_rope_ref
from tests import oracle
from tests.kernels.over_streams import check_streams, launches
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


def zeros_among(values):
    """Heads of zeros, whose inverse norm is as large as eps allows."""
    values["qkv"][:, 1::2] = 0
    return values


CASES = {
    "rotated": (lambda: inputs(2, 5, 3, 8), True),
    "not rotated": (lambda: inputs(2, 5, 3, 8), False),
    "odd head, not rotated": (lambda: inputs(2, 3, 1, 7), False),
    "strided": (lambda: inputs(2, 5, 3, 8, strided), True),
    "one token": (lambda: inputs(2, 1, 3, 8), True),
    "no sample": (lambda: inputs(0, 5, 3, 8), True),
    "no token": (lambda: inputs(2, 0, 3, 8), True),
    "narrow head": (lambda: inputs(2, 3, 2, 3), False),
    "wide head": (lambda: inputs(1, 3, 2, 80), True),
    "widest head": (lambda: inputs(1, 3, 1, 256), True),
    "zeros": (lambda: zeros_among(inputs(2, 5, 3, 8)), True),
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


STREAMS = {  # whether each stream is rotated, and what moves; all where nothing is said
    "all rotated": ([inputs(2, n, 3, 8) for n in (7, 5, 1)], (1, 1, 1), ()),
    "some rotated": ([inputs(2, n, 3, 8) for n in (7, 5, 1)], (1, 0, 1), ()),
    "the first is not": ([inputs(2, n, 3, 8) for n in (4, 5)], (0, 1), ()),
    "none rotated, odd heads": ([inputs(2, n, 2, 7) for n in (4, 5)], (0, 0), ()),
    "strided": ([inputs(2, 5, 3, 8, strided), inputs(2, 3, 3, 8)], (1, 1), ()),
    "batches apart": ([inputs(2, 5, 3, 8), inputs(3, 4, 3, 8)], (1, 1), ()),
    "heads apart": ([inputs(2, 5, 3, 8), inputs(2, 4, 2, 6)], (1, 1), ()),
    "one empty": ([inputs(2, 5, 3, 8), inputs(2, 0, 3, 8)], (1, 1), ()),
    "one moves": ([inputs(2, 5, 3, 8), inputs(2, 4, 3, 8)], (1, 1), ("qkv1",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", STREAMS)
def test_streams(case, dtype):
    streams, rotated, moving = STREAMS[case]
    ropes = [
        angles(*x["qkv"].shape[1:5:3]) if turn else None
        for x, turn in zip(streams, rotated, strict=True)
    ]
    moving = moving or tuple(f"qkv{i}" for i in range(len(streams)))
    given = (qk_norm_rope, qk_norm_rope_ref, streams, moving, dtype, 30, {"rope": ropes})
    check_streams(*given)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_streams_share_launches(monkeypatch):
    streams = [inputs(2, n, 3, 8) for n in (7, 5, 3)]
    found = launches(qk_norm_rope, streams, ("qkv",), monkeypatch, rope=(angles(7, 8), None, None))
    parts = ("qk_norm_rope_fwd", "qk_norm_rope_bwd", "sum")
    assert found == [f"_{part}_kernel" for part in parts]


@pytest.mark.parametrize("used", [(0, 0), (1, 1), (2, 0)])
def test_gradient_when_few_results_of_streams_are_used(used):
    streams, ropes = [inputs(2, 4, 2, 6), inputs(2, 3, 2, 6)], [angles(4, 6), angles(3, 6)]
    names, (result, stream) = list(streams[0]), used
    leaves = [{n: x.clone().requires_grad_() for n, x in s.items()} for s in streams]
    tuples = {n: tuple(s[n] for s in leaves) for n in names}
    y = qk_norm_rope(**tuples, rope=tuple(ropes))[result][stream]
    bar, options = torch.randn_like(y), {"allow_unused": True, "materialize_grads": True}
    flat = [s[n] for s in leaves for n in names]
    found = torch.autograd.grad(y, flat, bar, **options)
    y = qk_norm_rope_ref(**leaves[stream], rope=ropes[stream])[result]
    for a, b in zip(found, torch.autograd.grad(y, flat, bar, **options), strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=16)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(2, 12), st.booleans())
def test_any_shape(batch, tokens, heads, half, packed):
    values = inputs(batch, tokens, heads, 2 * half, (lambda x: x) if packed else strided)
    rope = angles(tokens, 2 * half)
    op, ref = with_rope(qk_norm_rope, rope), with_rope(qk_norm_rope_ref, rope)
    oracle.check_op(op, ref, values, ("qkv",), torch.float32, terms=63)


@pytest.mark.parametrize("length", [1, 17, 77, 250, 391])
def test_lengths(length):
    rope = angles(length, 10)
    op, ref = with_rope(qk_norm_rope, rope), with_rope(qk_norm_rope_ref, rope)
    oracle.check_op(op, ref, inputs(1, length, 2, 10), ("qkv",), torch.float32, terms=2 * length)


def everything(qkv, weights, rope, bars, eps=1e-6):
    """Values, tangents and gradients, in direction ones."""
    leaves = [t.detach().requires_grad_() for t in (qkv, *weights)]
    direction = torch.ones_like(qkv, memory_format=torch.preserve_format)
    ys, y_dots = torch.func.jvp(
        lambda x: qk_norm_rope(x, *leaves[1:], rope, eps), (leaves[0],), (direction,)
    )
    found = torch.autograd.grad(ys, leaves, bars)
    return [*(y.detach() for y in (*ys, *y_dots)), *found]


def layouts():
    wide = torch.randn(2, 9, 3, 4, 12)
    yield wide[:, 1:8, :, 1:, 2:10]  # a part of every axis
    yield torch.randn(2, 3, 3, 7, 8).permute(0, 3, 2, 1, 4)  # (B, 3, H, N, D) in memory
    yield torch.randn(7, 2, 3, 3, 8).transpose(0, 1)


def test_views_and_two_runs_give_what_a_copy_gives():
    weights, rope, bars = (torch.randn(8), torch.randn(8)), angles(7, 8), list(layouts())
    bars = [bars[i][:, :, 0] for i in (0, 1, 2)]
    for qkv in layouts():
        known = everything(qkv.contiguous(), weights, rope, [bar.contiguous() for bar in bars])
        found = everything(qkv, weights, rope, bars)
        for one, other in zip(found, known, strict=True):
            assert oracle.error(one, other) <= oracle.allowance(other, one.dtype, terms=16)
        again = everything(qkv, weights, rope, bars)
        assert all(map(torch.equal, found, again))  # to the bit: no order of sums is left to chance


def test_cotangents_without_strides():
    values = [t.float().requires_grad_() for t in inputs(2, 4, 2, 6).values()]
    ys = qk_norm_rope(*values, angles(4, 6))
    found = torch.autograd.grad(sum(y.sum() for y in ys), values, retain_graph=True)
    known = torch.autograd.grad(ys, values, [torch.ones(2, 4, 2, 6)] * 3)
    assert all(map(torch.equal, found, known))


@pytest.mark.parametrize("power", [-40, 40])
def test_the_scale_of_a_head_does_not_matter(power):
    """Without eps, powers of two pass exactly: nothing overflows or is lost on the way."""
    values = [t.float() for t in inputs(2, 3, 2, 8).values()]
    bars, rope, scale = [torch.randn(2, 3, 2, 8) for _ in range(3)], angles(3, 8), 2.0**power
    known = everything(values[0], values[1:], rope, bars, eps=0.0)
    found = everything(scale * values[0], values[1:], rope, bars, eps=0.0)
    for i in (0, 1):
        assert torch.equal(found[i], known[i])  # q and k
        assert torch.equal(found[3 + i] * scale, known[3 + i])  # their tangents
        assert torch.equal(found[7 + i], known[7 + i])  # gradients of their weights
    assert torch.equal(found[6][:, :, :2] * scale, known[6][:, :, :2])


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
