from __future__ import annotations

import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt import testing
from mfmjt.kernels import _attention, _backends, joint_attention
from mfmjt.kernels.cpu import joint_attention as cpu
from mfmjt.kernels.joint_attention import joint_attention_ref
from tests import oracle
from tests.oracle import randn, strided

module = importlib.import_module("mfmjt.kernels.joint_attention")

LOW = oracle.DTYPES[2]  # 16 bits: bfloat16, or float16 under the interpreter
SAMPLES = 1 if _backends.INTERPRETED else 2  # a block takes the interpreter 10 ms
HEADS = 2 if _backends.INTERPRETED else 4
STORED = oracle.DTYPES[1:] if _backends.INTERPRETED else oracle.DTYPES
interpreted = pytest.mark.skipif(not _backends.INTERPRETED, reason="of the Triton kernels")


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
    "two streams": (lambda: inputs(SAMPLES, (5, 3), (5, 3)), ALL),
    "cross": (lambda: inputs(SAMPLES, (3, 1), (9, 4)), ALL),
    "fewer queries": (lambda: inputs(SAMPLES, (5,), (5, 3)), ("q0", "k0", "v1")),
    "strided": (lambda: inputs(SAMPLES, (5, 3), (5, 3), layout=strided), ALL),
    "one token": (lambda: inputs(SAMPLES, (1,), (1,)), ("q0", "k0", "v0")),
    "odd head": (lambda: inputs(1, (5, 2), (5, 2), heads=3, width=5), ALL),
    "no sample": (lambda: inputs(0, (5, 3), (5, 3)), ALL),
    "only q moves": (lambda: inputs(SAMPLES, (5, 3), (5, 3)), ("q1",)),
    "only k moves": (lambda: inputs(SAMPLES, (5, 3), (5, 3)), ("k0",)),
    "only v moves": (lambda: inputs(SAMPLES, (5, 3), (5, 3)), ("v0",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, moving = CASES[case]
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    oracle.check_op(op, ref, make(), moving, dtype, terms=16)


def hides(shape, whole_row=True):
    """A mask of bool; the first query, or the first of each axis there is, sees nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    if whole_row:
        mask[..., 0, :] = False
    return mask


def adds(shape):
    """A mask that is added: a bias, and -inf for some keys."""
    return randn(*shape).masked_fill(~hides(shape), -torch.inf)


N, M = 5, 7
MASKED = {
    "causal": ({"causal": True}, {}),
    "causal, more queries": ({"causal": True}, {"keys": (3,)}),
    "bool": ({"mask": hides((2, 2, N, M))}, {}),
    "bool of pairs": ({"mask": hides((N, M))}, {}),
    "bool of keys": ({"mask": hides((2, 1, 1, M), False)}, {}),
    "bool of heads": ({"mask": hides((2, N, 1))}, {}),
    "bool, causal": ({"mask": hides((2, 1, N, M)), "causal": True}, {}),
    "bool, lengths": ({"mask": hides((2, 1, N, M)), "lengths": torch.tensor([4, 0])}, {}),
    "causal, lengths": ({"causal": True, "lengths": torch.tensor([2, 0])}, {}),
    "grouped": ({}, {"groups": 2}),
    "grouped, lengths": ({"lengths": torch.tensor([4, 0])}, {"groups": 2}),
    "one head of keys, causal": ({"causal": True}, {"groups": HEADS}),
    "grouped, bool": ({"mask": hides((2, HEADS, N, M))}, {"groups": 2}),
    "narrow values": ({}, {"values": 5}),
    "wide values, grouped, causal": ({"causal": True}, {"groups": 2, "values": 11}),
    "two streams, causal": ({"causal": True}, {"queries": (2, 3), "keys": (3, 4)}),
    "two streams, all of it": (
        {"mask": hides((2, HEADS, N, M)), "causal": True, "lengths": (None, torch.tensor([2, 0]))},
        {"groups": 2, "values": 3, "queries": (2, 3), "keys": (3, 4)},
    ),
}


def masked_inputs(queries=(N,), keys=(M,), heads=HEADS, groups=1, values=8):
    given = inputs(2, queries, keys, heads)
    for name in (n for n in given if n[0] in "kv"):
        given[name] = given[name][:, :, : heads // groups]
        if name[0] == "v":
            given[name] = randn(*given[name].shape[:3], values)
    return given


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", MASKED)
def test_masked_and_grouped_in_all_modes(case, dtype):
    options, shape = MASKED[case]
    heads = 2 if "mask" in options and options["mask"].shape[-3:-2] == (2,) else HEADS
    given = masked_inputs(heads=heads, **shape)
    op, ref = streams(joint_attention, **options), streams(joint_attention_ref, **options)
    oracle.check_op(op, ref, given, [n for n in given if n != "k1"], dtype, terms=16)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [(2, HEADS, N, M), (1, HEADS, N, M), (N, M), (2, 1, 1, M), (HEADS, 1, 1)]
)
def test_a_mask_that_is_added_has_a_gradient(shape, dtype):
    def with_mask(op):
        def call(mask, **given):
            return streams(op, mask=mask)(**given)[0]

        return call

    given = masked_inputs(groups=2) | {"mask": adds(shape)}
    op, ref = with_mask(joint_attention), with_mask(joint_attention_ref)
    oracle.check_op(op, ref, given, ("q0", "k0", "v0"), dtype, terms=16)


@pytest.mark.skipif(_backends.INTERPRETED, reason="of the formulas, which do not run there")
@pytest.mark.parametrize("block", [1, 320])
def test_blocks_of_masked_queries_make_no_difference(block, monkeypatch):
    monkeypatch.setattr(_attention, "BLOCK", block)
    monkeypatch.setattr(_attention, "CAUSAL_ROWS", 2)
    for case in ("two streams, all of it", "grouped, bool", "one head of keys, causal"):
        test_masked_and_grouped_in_all_modes(case, torch.float64)
    test_a_mask_that_is_added_has_a_gradient((2, HEADS, N, M), torch.float64)


def of_documents(queries, keys):
    """A mask of three documents in a row, the second of queries alone and the third of keys."""
    starts = [torch.tensor(0), torch.tensor(0.4), torch.tensor(0.7)]
    of_q, of_k = (sum((torch.arange(n) >= s * n).long() for s in starts) for n in (queries, keys))
    return (of_q[:, None] == of_k) & (of_k != 2)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"mask": of_documents(150, 200)}, 2),
        ({"mask": hides((2, 150, 1)), "causal": True}, 2),
        ({"causal": True, "lengths": torch.tensor([130])}, 1),
        ({"mask": adds((150, 200)).to(LOW), "lengths": torch.tensor([70])}, 1),
    ],
)
def test_tiles_that_nobody_sees(options, groups):
    """Several tiles, most of them hidden for some blocks, and rows and keys that see nothing."""
    op, ref = streams(joint_attention, **options), streams(joint_attention_ref, **options)
    given = masked_inputs((150,), (200,), heads=2, groups=groups)
    given = {name: x[:1] for name, x in given.items()}
    oracle.check_op(op, ref, given, list(given), LOW, terms=200)


@interpreted
@pytest.mark.parametrize("part", ["value", "bwd_kv"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_lists_of_tiles_hold_what_somebody_sees(part, causal, added):
    """Of each head; of queries whose heads share keys, all of them."""
    launcher = importlib.import_module("mfmjt.kernels.triton.joint_attention")
    n, m, group, block, tile = 37, 50, 2, 8, 16
    mask = torch.stack([of_documents(n, m), of_documents(m, n).t(), *hides((2, n, m)) & False])
    mask[3, 9, 20] = True
    length = torch.tensor([40, 3]) if part == "value" else None
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    rules = launcher.Rules(given[None], causal, group, m)
    options = {"BLOCK_N": block, "BLOCK_M": tile}
    found = launcher._mask(rules, part, options, n, length)
    shown = mask[None].expand(2 if length is not None else 1, -1, -1, -1).clone()
    if causal:
        shown &= torch.ones(n, m, dtype=torch.bool).tril()
    if length is not None:
        shown &= torch.arange(m) < length[:, None, None, None]
    seen = F.max_pool2d(shown.float(), (block, tile), ceil_mode=True).bool()
    if part == "bwd_kv":
        seen = seen.unflatten(1, (-1, group)).any(2).transpose(2, 3)
    assert found.visits.shape == (*seen.shape[:3], 1 + seen.shape[3])
    for row, tiles in zip(found.visits.flatten(0, 2), seen.flatten(0, 2), strict=True):
        assert row[1 : 1 + row[0]].tolist() == tiles.nonzero()[:, 0].tolist()


@interpreted
def test_only_listed_tiles_are_visited(monkeypatch):
    """64 keys whose tiles are left off the list are hidden, though the mask shows them."""
    launcher = importlib.import_module("mfmjt.kernels.triton.joint_attention")
    make = launcher._mask

    def without_first(rules, part, options, *rest):
        found = make(rules, part, options, *rest)
        tiles = 64 // options["BLOCK_M"]
        if part == "bwd_kv":
            found.visits[:, :, :tiles, 0] = 0
        else:
            found.visits[..., 0] -= tiles
            found.visits[..., 1:-tiles] = found.visits[..., 1 + tiles :].clone()
        return found

    q, k, v, o_bar = (randn(1, n, 1, 8).float().requires_grad_() for n in (9, 100, 100, 9))

    def run(k, v, **options):
        y, y_dot = torch.func.jvp(lambda *x: joint_attention(*x, **options), (q, k, v), (q, k, v))
        return y, y_dot, *torch.autograd.grad(y, (q, k, v), o_bar)

    truth = run(k[:, 64:], v[:, 64:])
    monkeypatch.setattr(launcher, "_mask", without_first)
    *found, k_bar, v_bar = run(k, v, mask=torch.ones(9, 100, dtype=torch.bool))
    for x in (k_bar, v_bar):
        assert torch.equal(x[:, :64], torch.zeros(1, 64, 1, 8))
    for x, exact in zip((*found, k_bar[:, 64:], v_bar[:, 64:]), truth, strict=True):
        assert oracle.error(x, exact) <= oracle.allowance(exact, torch.float32, terms=36)


def test_padding_of_grouped_streams_does_not_leak():
    q, k, v = (randn(2, 4, heads, 8) for heads in (2, 1, 1))
    lengths = (torch.tensor([2, 0]), None)
    k[0, 2:], v[0, 2:], k[1], v[1] = (torch.nan,) * 4
    rest = randn(2, 3, 1, 8)

    def run(k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y, y_dot = torch.func.jvp(
            lambda q, k, v: joint_attention(q, (k, rest), (v, rest), lengths=lengths),
            tuple(leaves),
            tuple(x.detach() for x in leaves),
        )
        return y, y_dot, *torch.autograd.grad(y.sum(), leaves)

    for x, exact in zip(run(k, v), run(k.nan_to_num(), v.nan_to_num()), strict=True):
        assert torch.equal(x, exact)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter, where an answer is NaN
@pytest.mark.parametrize("dtype", [dtype for dtype in STORED if dtype.itemsize > 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["causal", "bool", "added", "grouped"])
def test_what_is_hidden_does_not_leak(where, bad, dtype):
    """Key 3 is no number: NaN for the queries that see it, and nothing for the others."""
    q, dots = randn(1, 6, 2, 8).to(dtype), [randn(1, 6, 2, 8).to(dtype) for _ in range(3)]
    k, v = (randn(1, 6, 1 if where == "grouped" else 2, 8).to(dtype) for _ in range(2))
    dots[1:] = [x[:, :, : k.shape[2]] for x in dots[1:]]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    options = {"causal": True} if where == "causal" else {"mask": mask}
    if where == "added":
        options["mask"] = torch.zeros(6, 6, dtype=dtype).masked_fill(~mask, -torch.inf)

    def run(k, v, k_dot, v_dot):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y, y_dot = torch.func.jvp(
            lambda *xs: joint_attention(*xs, **options), tuple(leaves), (dots[0], k_dot, v_dot)
        )
        return y, y_dot, *torch.autograd.grad(y[:, :3].sum(), leaves)

    truth = run(k, v, *dots[1:])
    for what in range(4):
        given = [x.clone() for x in (k, v, *dots[1:])]
        given[what][:, 3] = bad
        found = run(*given)
        for i, (x, exact) in enumerate(zip(found[:2], truth, strict=False)):
            limit = oracle.allowance(exact, dtype, terms=8)
            assert oracle.error(x[:, :3], exact[:, :3]) <= limit
            seen = i == 1 or what < 2
            assert x[:, 3:].isnan().all() if seen else x.isfinite().all()
        if what > 1:
            for x, exact in zip(found[2:], truth[2:], strict=True):
                assert oracle.error(x, exact) <= oracle.allowance(exact, dtype, terms=8)


def test_agrees_with_pytorchs_masks_and_groups():
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 6)
    for mask in (hides((2, 1, 5, 7)), randn(4, 5, 7), None):
        causal = mask is None
        truth = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, enable_gqa=True)
        found = joint_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), mask=mask, causal=causal
        ).transpose(1, 2)
        assert oracle.error(found, truth) <= oracle.allowance(truth, torch.float64, terms=8)


def test_a_row_of_a_number_for_minus_infinity_has_its_digits():
    """All of a row at float32's least number: softmax cancels it, in the gradient too."""
    q, k, v, o_bar = (randn(1, 5, 2, 8).float().requires_grad_() for _ in range(4))
    mask = torch.zeros(5, 5)
    mask[2], mask[3, 1:] = torch.finfo(torch.float32).min, -1e9
    same = torch.zeros(5, 5).masked_fill(mask < 0, -torch.inf)
    same[2] = 0
    found, truth = (joint_attention(q, k, v, mask=m) for m in (mask, same))
    found, truth = ((y, *torch.autograd.grad(y, (q, k, v), o_bar)) for y in (found, truth))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_tangent_of_a_mask_is_refused():
    q, mask = randn(1, 3, 1, 8), randn(3, 3)
    with pytest.raises(NotImplementedError, match="does not propagate a tangent of its mask"):
        torch.func.jvp(lambda mask: joint_attention(q, q, q, mask=mask), (mask,), (mask,))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.zeros(3, 4),
            r"broadcasts to \(B, H, N, M\) = \(2, 2, 3, 3\).*mask \(3, 4\) float32",
        ),
        (torch.zeros(3, 3, dtype=torch.int64), r"of bool or of q's dtype; got mask \(3, 3\) int64"),
        (torch.zeros(1, 1, 1, 3, 3), r"broadcasts to"),
        (torch.zeros(3, 3, dtype=torch.float64), r"of one dtype.*mask \(1, 1, 3, 3\) float64"),
        (torch.zeros(3, 3, device="meta"), r"the mask on cpu as q, not on meta"),
    ],
)
def test_refuses_masks_that_do_not_fit(mask, message):
    q = torch.zeros(2, 3, 2, 8)
    with pytest.raises(ValueError, match=message):
        joint_attention(q, q, q, mask=mask)


def test_refuses_groups_that_do_not_divide():
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 3, 8)
    with pytest.raises(ValueError, match=r"heads of k divide those of q; got q\[0\]"):
        joint_attention(q, k, k)


def test_compiled_with_a_mask():
    given = masked_inputs(groups=2, values=6) | {"mask": adds((HEADS, N, M)).clamp(min=-9)}
    for options in ({}, {"causal": True, "lengths": torch.tensor([4, 2])}):

        def attend(mask, options=options, **streams_by_name):
            return streams(joint_attention, mask=mask, **options)(**streams_by_name)[0]

        oracle.check_compiled(attend, given, ("q0", "k0", "v0"), terms=64, backend="aot_eager")


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, LOW])
def test_lengths_and_scale(dtype, scale):
    values = inputs(3, (5, 4), (5, 4))
    options = {"lengths": (None, torch.tensor([4, 1, 0])), "scale": scale}
    op, ref = streams(joint_attention, **options), streams(joint_attention_ref, **options)
    oracle.check_op(op, ref, values, ALL, dtype, terms=16)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_sample_without_any_key(dtype):
    """Zeros, gradients included, where forward mode has left its sums to the backward pass too."""
    options = {"lengths": torch.tensor([0, 2])}
    op, ref = streams(joint_attention, **options), streams(joint_attention_ref, **options)
    oracle.check_op(op, ref, inputs(2, (3,), (2,)), ("q0", "k0", "v0"), dtype, terms=16)


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


@pytest.mark.skipif(_backends.INTERPRETED, reason="of the formulas, which do not run there")
@pytest.mark.parametrize("block", [1, 320])
def test_blocks_of_queries_make_no_difference(block, monkeypatch):
    monkeypatch.setattr(_attention, "BLOCK", block)
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    oracle.check_op(op, ref, inputs(2, (5, 3), (5, 3)), ALL, torch.float64, terms=16)


def test_explicit_form_that_other_devices_use():
    q, k, v, o_bar = ([randn(2, n, 2, 8) for n in (6, 3)] for _ in range(4))
    lengths = [torch.tensor([6, 2]), None]
    rest, needs = (None, lengths, False, 0.3), [True] * 3 + [False] * 2
    o, lse = module._fwd(q, k, v, *rest)
    found = (o, *module._bwd(o_bar, q, k, v, o, lse, *rest, needs)[:3])
    of_cpu = cpu.bwd(o_bar, q, k, v, o, lse, *rest, needs)[:3]
    truth = (cpu.flash(q, k, v, lengths, 0.3), *of_cpu)
    for pairs in map(zip, found, truth):
        for a, b in pairs:
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


@settings(max_examples=2 if _backends.INTERPRETED else 15, deadline=None, derandomize=True)
@given(
    st.integers(1, SAMPLES),
    st.lists(st.integers(1, 6), min_size=2, max_size=2),
    st.lists(st.integers(1, 6), min_size=2, max_size=2),
    st.integers(1, 1 + SAMPLES),
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
    values = inputs(1, (5, 3), (5, 3), heads=1)
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
    q, k, v = ([randn(2, n, 1, 8).to(LOW) for n in (5, 2)] for _ in range(3))
    rest = (randn(1, 1, 7, 7).to(LOW), [torch.tensor([5, 1]), None], True, 0.3)
    needs = [True] * 4 + [False]
    leaves = [[t.clone().requires_grad_() for t in streams] for streams in (q, k, v)]
    ops = torch.ops.mfmjt
    torch.library.opcheck(ops.joint_attention_fwd.default, (*leaves, *rest))
    o, lse = ops.joint_attention_fwd(q, k, v, *rest)
    torch.library.opcheck(ops.joint_attention_bwd.default, (o, q, k, v, o, lse, *rest, needs))
    torch.library.opcheck(
        ops.joint_attention_jvp.default,
        (*leaves, q, [None, None], [None, v[1]], *rest),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_autocast():
    q, k, v = (randn(2, 5, 2, 8).float() for _ in range(3))
    with torch.autocast("cpu", LOW):
        plain = joint_attention(q, k, v)
        y, y_dot = torch.func.jvp(lambda q: joint_attention(q, k, v), (q,), (q,))
    assert plain.dtype == y.dtype == y_dot.dtype == LOW
    truth = joint_attention_ref(q, k, v)
    for result in (plain, y):
        assert oracle.error(result, truth) <= oracle.allowance(truth, LOW, terms=16)


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


def test_refuses_dtypes_that_differ():
    q = torch.zeros(1, 3, 1, 8)
    with pytest.raises(ValueError, match=r"one dtype.*float32.*float64"):
        joint_attention(q, q.double(), q)


def test_refuses_lengths_on_another_device():
    """Which would be copied in every call, and cannot be inside a CUDA graph."""
    q = torch.zeros(2, 3, 1, 4, device="meta")
    lengths = torch.tensor([1, 2], device="cpu")
    with pytest.raises(ValueError, match="lengths on meta as q, not on cpu"):
        joint_attention(q, q, q, lengths=lengths)
    assert joint_attention(q, q, q, lengths=lengths.to("meta")).shape == q.shape


@pytest.mark.parametrize("name", ["q[0]", "k[1]"])
def test_refuses_streams_whose_elements_32_bits_do_not_count(name):
    pytest.importorskip("triton")
    triton = importlib.import_module("mfmjt.kernels.triton.joint_attention")
    short, long = (torch.empty(1, n, 1, 128, device="meta") for n in (3, 2**24))
    q, k = ([long], [short] * 2) if name == "q[0]" else ([short], [short, long])
    with pytest.raises(ValueError, match=re.escape(f"in each stream on a GPU; got {name}")):
        triton.fwd(q, k, k, None, [None, None], False, 1.0)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 77, 250, 391])
def test_lengths_of_networks(tokens, dtype):
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(1, (tokens,), (tokens,), heads=1, width=32)
    oracle.check_op(op, ref, values, ("q0", "k0", "v0"), dtype, terms=tokens)


@pytest.mark.parametrize("width", [8, 24, 64, 72, 80, 128, 256])
def test_widths_of_heads(width):
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(1, (17,), (5, 18), heads=1, width=width)
    oracle.check_op(op, ref, values, ("q0", "k0", "v0", "v1"), LOW, terms=width)


@pytest.mark.parametrize(("width", "keys"), [(8, 18), (80, 18), (136, 5)])
def test_widths_of_heads_in_float32(width, keys):
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(1, (9,), (keys,), heads=1, width=width)
    oracle.check_op(op, ref, values, ("q0", "k0", "v0"), torch.float32, terms=width)


@pytest.mark.parametrize(
    ("queries", "keys", "moving"),
    [
        ((250, 64, 77), (250, 64, 77), ("q0", "k0", "v0", "q1", "k1", "v1")),
        ((17,), (391,), ("k0", "v0")),
        ((391,), (17, 1), ("q0",)),
    ],
)
def test_streams_of_networks(queries, keys, moving):
    """Three streams, the text still; few queries of many keys; many of few."""
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(1, queries, keys, heads=1, width=32)
    oracle.check_op(op, ref, values, moving, LOW, terms=sum(keys))


@pytest.mark.parametrize("dtype", oracle.DTYPES[1:])  # float64 has no better truth
def test_huge_logits(dtype):
    """Half the keys at 10^4, half at -10^4, and the softmax decided by what lies behind.

    q and k are multiples of 2^-5, so that every processor has these scores exact, in whatever order
    it adds. A gradient is made from one number a row, whose rounding at 10^4 is not the reference's
    loss but that of PyTorch's fused attention.
    """
    values = inputs(1, (9,), (10,), heads=1)
    values["q0"], values["k0"] = ((32 * values[name]).round() / 32 for name in ("q0", "k0"))
    values["q0"][..., 0] = 100
    values["k0"][..., 0] = torch.tensor([100.0, -100.0]).repeat(5)[:, None]
    op, ref = (streams(f, scale=1.0) for f in (joint_attention, joint_attention_ref))

    def fused(q0, k0, v0):
        heads_first = (x.transpose(1, 2) for x in (q0, k0, v0))
        return F.scaled_dot_product_attention(*heads_first, scale=1.0).transpose(1, 2)

    oracle.check_op(op, ref, values, ("q0", "k0", "v0"), dtype, terms=10, fused=fused)


@pytest.mark.parametrize("mean", [3, 10])
def test_tangent_is_as_good_as_its_dtype(mean):
    """Where S_dot has a common offset and v a mean, rounding P and W costs ten times the digits,
    unless the offset is taken off first and the sums are those of what was rounded."""
    q, k, v = (randn(1, 77, 1, 32).to(LOW).float() for _ in range(3))
    k, v = (k + 8).to(LOW), (v + mean).to(LOW)
    q, q_dot = q.to(LOW), (torch.ones_like(q) + 0.1 * torch.randn_like(q)).to(LOW)

    def tangent(op, dtype):
        still = (k.to(dtype), v.to(dtype))
        return torch.func.jvp(lambda q: op(q, *still), (q.to(dtype),), (q_dot.to(dtype),))[1]

    truth = tangent(joint_attention_ref, torch.float64)
    reference = oracle.error(tangent(joint_attention_ref, torch.float32).to(LOW), truth)
    limit = 2 * reference + oracle.allowance(truth, LOW, terms=1)
    assert oracle.error(tangent(joint_attention, LOW), truth) <= limit


def test_tangent_keeps_its_digits_when_the_offset_drifts():
    """S_dot rises by 30 along the keys, and S with it: the last keys have most of the weight.

    With P, o and o_dot the truth, and c the mean of S_dot at the last new center, up to 128 keys
    away, what is rounded to the dtype's u = eps / 2 is P in both sums of o and in the weights of
    v_dot, W = P (S_dot - c), and the result:
    |error| <= u sum P (2 |S_dot - c| |v - o| + |v_dot|) + u |o_dot|, and a little of second order.
    """
    tokens, width = 300, 16
    q, k, v, q_dot, k_dot, v_dot = (randn(1, tokens, 1, width) for _ in range(6))
    q[..., 0], q_dot[..., 0], k_dot[..., 0] = 2, 30, 0
    k[..., 0] = torch.linspace(0, 1, tokens)[None, :, None]
    primals, dots = ([x.to(LOW) for x in xs] for xs in ((q, k, v), (q_dot, k_dot, v_dot)))
    found = torch.func.jvp(joint_attention, tuple(primals), tuple(dots))[1]
    if found.is_cpu and not _backends.INTERPRETED:
        pytest.skip("the centers are those of Triton's kernels")
    (q, k, v), (q_dot, k_dot, v_dot) = ([x[0, :, 0].double() for x in xs] for xs in (primals, dots))
    s, s_dot = (x / width**0.5 for x in (q @ k.T, q_dot @ k.T + q @ k_dot.T))
    p = s.softmax(-1)
    o = p @ v
    o_dot = (p * (s_dot - (p * s_dot).sum(-1, keepdim=True))) @ v + p @ v_dot
    center = torch.zeros_like(s_dot)
    for first in range(0, tokens, 128):
        seen = slice(0, min(first + 64, tokens))  # keys up to the first block with this center
        mean = (p[:, seen] * s_dot[:, seen]).sum(-1) / p[:, seen].sum(-1)
        center[:, first : first + 128] = mean[:, None]
    apart = (v[None] - o[:, None]).abs()
    bound = 2 * torch.einsum("nm,nmd->nd", p * (s_dot - center).abs(), apart) + p @ v_dot.abs()
    bound = torch.finfo(LOW).eps / 2 * (bound + o_dot.abs())
    assert ((found[0, :, 0].double() - o_dot).abs() <= 1.1 * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_value_by_pytorch(dtype, monkeypatch):
    """Where a table says that it is faster: the same results, for the gradient's kernels too."""
    pytest.importorskip("triton")
    triton = importlib.import_module("mfmjt.kernels.triton.joint_attention")
    q, k, v = (
        [x.to(dtype) for x in inputs(2, (5, 3), (5, 3)).values()][i : i + 2] for i in (0, 2, 4)
    )
    truth, sums = triton._by_pytorch(*([x.double() for x in xs] for xs in (q, k, v)), 0.3)
    monkeypatch.setattr(triton, "FASTER", {("cpu", dtype, 8)})
    found, lse = triton.fwd(q, k, v, None, [None, None], False, 0.3)
    ref = joint_attention_ref(
        [x.double() for x in q], [x.double() for x in k], [x.double() for x in v], 0.3
    )
    for a, b, c in zip(found, truth, ref, strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, dtype, terms=8)
        assert oracle.error(b, c) <= oracle.allowance(c, torch.float64, terms=8)
    assert oracle.error(lse, sums) <= oracle.allowance(sums, dtype, terms=8)


def test_blocks_of_padding():
    """Whole blocks of keys beyond the length, NaN in them, in one of two streams."""
    q, k, v = randn(2, 5, 1, 8), [randn(2, n, 1, 8) for n in (150, 3)], None
    v = [torch.randn_like(t) for t in k]
    k[0][0, 20:], v[0][0, 20:], k[0][1], v[0][1] = (torch.nan,) * 4
    short = [[k[0][:1, :20], k[1][:1]], [v[0][:1, :20], v[1][:1]]]
    k, v = ([t.requires_grad_() for t in streams] for streams in (k, v))

    def attention(q, lengths, k, v):
        return torch.func.jvp(lambda q: joint_attention(q, k, v, lengths=lengths), (q,), (q,))

    y, y_dot = attention(q, (torch.tensor([20, 0]), None), k, v)
    (y.sum() + 0).backward()
    for sample, (keys, values) in enumerate((short, [[t[1:] for t in s[1:]] for s in (k, v)])):
        alone = attention(q[sample : sample + 1], None, keys, values)
        for found, truth in zip((y, y_dot), alone, strict=True):
            limit = oracle.allowance(truth, torch.float64, terms=16)
            assert oracle.error(found[sample : sample + 1], truth) <= limit
    for t in (k[0], v[0]):
        assert not t.grad[0, 20:].any()
        assert not t.grad[1].any()
        assert t.grad[0, :20].all()


@pytest.mark.parametrize("same", [True, False], ids=["tangents alike", "tangents packed"])
def test_views_of_one_projection(same):
    """q, k and v as the norm leaves them, in (B, N, 3, H, D); tangents there too, or elsewhere."""
    qkv, dots = (randn(2, 7, 3, 2, 8).unbind(2) for _ in range(2))
    packed = [[t.contiguous() for t in x] for x in (qkv, dots)]
    truth = torch.func.jvp(joint_attention, *map(tuple, packed))
    found = torch.func.jvp(joint_attention, qkv, dots if same else tuple(packed[1]))
    for a, b in zip(found, truth, strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=8)


def test_gradient_of_one_stream_alone():
    leaves = {n: x.requires_grad_() for n, x in inputs(1, (5, 3), (5, 3)).items()}
    gradients = [
        torch.autograd.grad(
            streams(op)(**leaves)[0].sum(), list(leaves.values()), allow_unused=True
        )
        for op in (joint_attention, joint_attention_ref)
    ]
    for found, truth in zip(*gradients, strict=True):
        limit = oracle.allowance(truth, torch.float64, terms=16)
        assert oracle.error(found, truth) <= limit


def test_nothing_of_the_tangent_is_kept():
    leaves = {n: x.float().requires_grad_() for n, x in inputs(1, (5, 3), (5, 3)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        names, primals = zip(*leaves.items(), strict=True)
        y, _ = torch.func.jvp(
            lambda *xs: streams(joint_attention)(**dict(zip(names, xs, strict=True))),
            primals,
            tuple(torch.ones_like(x) for x in primals),
        )
    rows = sum(x[..., 0].numel() for x in y)
    wanted = sum(x.numel() for x in (*primals, *y)) + rows
    assert sum(x.numel() for x in kept) == wanted


def test_same_bits_twice():
    op, ref = streams(joint_attention), streams(joint_attention_ref)
    values = inputs(1, (70, 9), (70, 9), heads=1)
    testing.check_op(op, ref, values, ALL, LOW, terms=79)
