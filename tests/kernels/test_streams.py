from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mfmjt.kernels import _backends, conv1d, reference, streams
from mfmjt.kernels.cpu.product import blocked as blocked_weight
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln
from mfmjt.kernels.qk_norm_rope import qk_norm_rope
from mfmjt.kernels.swiglu import swiglu
from mfmjt.meanflow import guide as guide_of_meanflow
from tests import oracle
from tests.oracle import randn, strided


def as_dtype(values, dtype):
    """Floating tensors in another dtype, as they lie in memory; angles keep theirs below double."""

    def move(x):
        if not x.is_floating_point() or (x.dtype == torch.float32 and dtype != torch.float64):
            return x
        moved = x.to(dtype)
        return moved.as_strided(x.shape, x.stride()) if moved.numel() < x.numel() else moved

    return tree_map_only(torch.Tensor, move, values)


def judge(op, arguments, dtype, terms):
    """The oracle's rule: at most twice the error of the plain reference, and a few roundings.

    Arguments are float64, but for angles and tables; all runs start from the same numbers.
    """
    rounded = as_dtype(arguments, dtype)
    with reference():
        truth = tree_leaves(op(*as_dtype(rounded, torch.float64)))
        plain = tree_leaves(op(*rounded))
    found = tree_leaves(op(*rounded))
    assert len(found) == len(truth)
    slack = max(oracle.allowance(y, dtype, terms) for y in truth)
    for got, known, other in zip(found, truth, plain, strict=True):
        assert got.dtype == dtype
        assert not got.isnan().any()
        limit = 2 * oracle.error(other, known) + slack
        assert oracle.error(got, known) <= limit, f"{oracle.error(got, known):.3g} > {limit:.3g}"
    return found


def assert_close(found, truth, dtype, terms):
    assert found.dtype == dtype
    assert oracle.error(found, truth) <= oracle.allowance(truth, dtype, terms)


def conv(outs, channels, taps):
    return randn(outs, channels, taps) / (channels * taps) ** 0.5


def gated(outs, channels, taps):
    return streams.pack(conv(outs, channels, taps), conv(outs, channels, taps))


def single(outs, channels, taps=1):
    return streams.pack(conv(outs, channels, taps))


def angles(tokens, width):
    angle = torch.rand(tokens, width // 2, dtype=torch.float64) * 6
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


PRODUCTS = {
    "input stage": lambda: (
        [randn(2, 17, 20), randn(2, 5, 32), randn(1, 8, 24), randn(2, 3, 32)],
        [single(24, 20, 7), single(24, 32), single(24, 24, 7), single(24, 32)],
        [randn(24), randn(24), randn(8, 24), None],
        ["selu", "none", "silu", "none"],
    ),
    "gated units": lambda: (
        [randn(2, 9, 16), randn(2, 4, 16), randn(2, 3, 16)],
        [gated(40, 16, 3), gated(40, 16, 3), gated(40, 16, 1)],
    ),
    "odd sizes": lambda: (
        [randn(3, 7, 5), randn(1, 1, 3)],
        [single(7, 5, 3), single(1, 3, 7)],
        [None, randn(1, 1)],
        "silu",
    ),
    "gated odd": lambda: ([randn(1, 5, 7)], [gated(9, 7, 3)]),
    "many outs": lambda: ([randn(2, 1, 12), randn(2, 3, 12)], [single(150, 12), single(70, 12)]),
    "empty": lambda: (
        [randn(2, 0, 8), randn(2, 3, 8), randn(0, 3, 8)],
        [single(6, 8, 3), single(5, 8), single(4, 8)],
        [randn(6), None, None],
    ),
    "all empty": lambda: ([randn(0, 3, 8)], [single(6, 8, 3)]),
    "views": lambda: (
        [
            randn(1, 6, 8).expand(3, -1, -1),
            randn(2, 6, 24)[:, 1:, 8:16],
            randn(5, 2, 8).transpose(0, 1),
            strided(randn(2, 3, 8)),
        ],
        [single(6, 8, 3), single(6, 8), single(6, 8, 3), single(6, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_project(case, dtype):
    judge(streams.project, PRODUCTS[case](), dtype, terms=200)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 9), st.integers(1, 20), st.sampled_from((1, 3, 7))
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_project_any_shape(sizes, glu):
    xs = [randn(batch, tokens, channels) for batch, tokens, channels, _ in sizes]
    make = gated if glu else single
    weights = [make(10 + i, c, taps) for i, (_, _, c, taps) in enumerate(sizes)]
    judge(streams.project, (xs, weights), torch.float32, terms=150)


@pytest.mark.parametrize("length", [1, 77, 250])
def test_project_lengths(length):
    arguments = [randn(1, length, 8), randn(1, 17, 8)], [single(12, 8, 3), single(12, 8)]
    judge(streams.project, arguments, torch.float32, terms=24)


HEADS = {
    "joint block": lambda: (
        [randn(2, 9, 16), randn(2, 4, 16), randn(1, 3, 16)],
        [single(48, 16)] * 3,
        [randn(48) for _ in range(3)],
        [randn(8) for _ in range(3)],
        [randn(8) for _ in range(3)],
        [angles(9, 8), angles(4, 8), None],
        2,
    ),
    "wide heads": lambda: (
        [randn(1, 3, 24)], [single(6 * 64, 24)], None, [randn(64)], [randn(64)], [angles(3, 64)], 2,
    ),
    "widest heads": lambda: (
        [randn(1, 3, 5)], [single(3 * 128, 5)], None, [randn(128)], [randn(128)], None, 1,
    ),
    "too wide for a kernel": lambda: (
        [randn(1, 3, 5)], [single(3 * 130, 5)], None, [randn(130)], [randn(130)], None, 1,
    ),
    "no power of two": lambda: (
        [randn(1, 3, 9), randn(1, 0, 9)],
        [single(3 * 3 * 6, 9)] * 2,
        None,
        [randn(6)] * 2,
        [randn(6)] * 2,
        [angles(3, 6), None],
        3,
    ),
    "odd heads": lambda: ([randn(2, 3, 9)], [single(21, 9)], None, [randn(7)], [randn(7)], None, 1),
    "views": lambda: (
        [randn(1, 6, 8).expand(3, -1, -1), randn(2, 6, 24)[:, 1:, 8:16]],
        [single(24, 8)] * 2,
        None,
        [randn(4)] * 2,
        [randn(4)] * 2,
        [None, angles(5, 4)],
        2,
    ),
}  # fmt: skip


def blocked(op):
    """The op on weights as this CPU likes them, which it takes without a library op."""

    def call(xs, weights, *others):
        ready = [w._replace(blocked=blocked_weight(w.data)) for w in weights]
        if xs[0].dtype == torch.float32 and torch.backends.mkldnn.is_available():
            narrow = torch.backends.cpu.get_cpu_capability() == "AVX2"
            assert all(
                (w.blocked is not None) == (not narrow or w.data.shape[1] == 3) for w in ready
            )
        return op(xs, ready, *others)

    return call


@pytest.mark.skipif(_backends.ON_CPU, reason="the CPU runs the Triton kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*PRODUCTS, *HEADS])
def test_blocked_weights_give_the_same(case, dtype):
    if case in HEADS:
        judge(blocked(streams.project_qkv), HEADS[case](), dtype, 64)
    else:
        judge(blocked(streams.project), PRODUCTS[case](), dtype, 7 * 64)


def test_whoever_counts_sees_the_library_op():
    xs, weights = [torch.randn(2, 9, 16)], [streams.pack(torch.randn(8, 16))]
    with FlopCounterMode(display=False) as counter:
        streams.project(xs, weights)
    assert counter.get_total_flops() == 2 * 2 * 9 * 16 * 8


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_project_qkv(case, dtype):
    judge(streams.project_qkv, HEADS[case](), dtype, terms=64)


def chunks(parts, *shape):
    """Views of one tensor of modulations."""
    return list(randn(*shape[:-1], parts * shape[-1]).chunk(parts, dim=-1))


def norm_case(width, added=True, integers=torch.int64):
    xs = [randn(2, 9, width), randn(2, 4, width), randn(1, 3, width), randn(2, 0, width)]
    hs = [torch.randn_like(x) for x in xs] if added else None
    modulations = [
        chunks(3, 2, 5, width),
        chunks(3, 1, 1, width),
        chunks(3, 1, 3, width),
        [m.expand(2, 1, -1) for m in chunks(3, 1, 1, width)],
    ]
    gates, shifts, scales = map(list, zip(*modulations, strict=True))
    rows = [torch.tensor([0, 0, 1, 1, 2, 3, 3, 4, 4], dtype=integers), None, None, None]
    return xs, hs, gates if added else None, shifts, scales, rows, 1e-5


NORMS = {
    "joint block": lambda: norm_case(48),
    "nothing added": lambda: norm_case(48, added=False),
    "odd width": lambda: norm_case(7, integers=torch.int32),
    "one channel": lambda: norm_case(1),
    "wide": lambda: norm_case(600),
    "views": lambda: (
        [randn(1, 6, 8).expand(3, -1, -1), strided(randn(2, 3, 8))],
        [randn(6, 3, 8).transpose(0, 1), randn(2, 3, 24)[..., 8:16]],
        *([randn(3, 1, 16)[..., :8], strided(randn(1, 3, 8))] for _ in range(3)),
        None,
        1e-5,
    ),
    "rows of the gate alone": lambda: (
        [randn(2, 4, 8)], [randn(2, 4, 8)], [randn(2, 3, 8)], *([randn(2, 1, 8)],) * 2,
        [torch.tensor([0, 2, 2, 1])], 1e-5,
    ),
    "all empty": lambda: ([randn(0, 3, 8)], None, None, *([randn(1, 1, 8)],) * 2, None, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", NORMS)
def test_gated_residual_norm(case, dtype):
    judge(streams.gated_residual_norm, NORMS[case](), dtype, terms=600)


def product_and_norm(depth, taps, biased):
    """Products of few elements and much depth, which are made in parts."""
    xs = [randn(2, n, 48) for n in (9, 4, 3)]
    ins = [randn(*x.shape[:2], depth) for x in xs]
    weights = [single(48, depth, k) for k in taps]
    biases = [randn(48), None, randn(3, 48)] if biased else None
    modulations = [chunks(3, 2, 5, 48), chunks(3, 1, 1, 48), chunks(3, 2, 3, 48)]
    rows = [torch.tensor([0, 0, 1, 1, 2, 3, 3, 4, 4]), None, None]
    return ins, weights, biases, xs, *map(list, zip(*modulations, strict=True)), rows, 1e-5


PRODUCTS_AND_NORMS = {
    "one part": lambda: product_and_norm(24, (3, 3, 1), True),
    "parts": lambda: product_and_norm(700, (3, 3, 1), True),
    "parts beyond a stream's depth": lambda: product_and_norm(360, (7, 1, 1), False),
    "other numbers of samples": lambda: (
        [randn(2, 3, 8), randn(1, 4, 8)], [single(8, 8)] * 2, None,
        [randn(2, 3, 8), randn(1, 4, 8)], *([randn(1, 1, 8)] * 2,) * 3, None, 1e-5,
    ),
    "no token": lambda: (
        [randn(2, 0, 8)], [single(8, 8)], None, [randn(2, 0, 8)], *([randn(2, 1, 8)],) * 3, None,
        1e-5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", PRODUCTS_AND_NORMS)
def test_project_norm(case, dtype):
    judge(streams.project_norm, PRODUCTS_AND_NORMS[case](), dtype, terms=3000)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_products_of_much_depth(dtype):
    """Their parts are added up, and activated, by another launch."""
    sizes = ((9, 900, 7), (4, 2000, 1), (3, 500, 1))
    xs, weights = [randn(2, n, c) for n, c, _ in sizes], [single(96, c, k) for _, c, k in sizes]
    biases, acts = [randn(96), randn(4, 96), None], ["selu", "none", "silu"]
    judge(streams.project, (xs, weights, biases, acts), dtype, terms=6300)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="asks the tuning of kernels")
def test_few_products_of_much_depth_are_made_in_parts():
    from mfmjt.kernels.triton.tuning import product_parts

    assert product_parts([18, 8, 3], [48] * 3, [2100, 2100, 700], 4, False)["PARTS"] > 1
    assert product_parts([14, 8, 3], [48] * 3, [2520, 360, 360], 4, False)["PARTS"] > 1
    assert product_parts([18, 8, 6], [96] * 3, [6300, 2000, 500], 4, True)["PARTS"] > 1
    assert product_parts([18, 8, 3], [48] * 3, [72, 72, 24], 4, False)["PARTS"] == 1
    assert product_parts([64000], [448], [3840], 2, False)["PARTS"] == 1


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_norm_of_what_is_far_from_zero(scale):
    """Large offsets cost no more digits than they cost PyTorch's own layer norm."""
    xs, _, _, shifts, scales, rows, eps = norm_case(48, added=False)
    xs = [scale * x + 100 * scale for x in xs]
    arguments = xs, None, None, shifts, scales, rows, eps
    judge(streams.gated_residual_norm, arguments, torch.float32, terms=48)


def test_nothing_added_returns_the_streams_themselves():
    xs, *others = norm_case(8, added=False)
    totals, _ = streams.gated_residual_norm(xs, *others)
    assert all(total is x for total, x in zip(totals, xs, strict=True))


POOLS = {
    "video and text": lambda: [randn(2, 9, 16), randn(2, 70, 12)],
    "odd": lambda: [randn(1, 1, 5), strided(randn(1, 3, 7)), randn(1, 130, 3)],
    "expanded": lambda: [randn(1, 1, 8).expand(2, 5, 8)],
    "no sample": lambda: [randn(0, 4, 8)],
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", POOLS)
def test_pool(case, dtype):
    xs = as_dtype(POOLS[case](), dtype)
    truth = torch.cat([x.double().sum(1, keepdim=True) / x.shape[1] for x in xs], -1)
    assert_close(streams.pool(xs), truth, dtype, terms=130)


CONDITIONS = {
    "all rows": lambda: (randn(2, 1, 16), randn(2, 7, 16)),
    "picked rows": lambda: (randn(2, 1, 7), randn(1, 5, 7), torch.tensor([0, 2, 4])),
    "repeated rows": lambda: (
        randn(2, 1, 12), randn(2, 3, 24)[..., :12], torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32)
    ),
    "one row": lambda: (randn(2, 1, 8), randn(2, 1, 8), torch.tensor([0, 0, 0])),
    "no row": lambda: (randn(2, 1, 16), randn(2, 0, 16)),
    "no sample": lambda: (randn(0, 1, 16), randn(1, 3, 16)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CONDITIONS)
def test_silu_conditions(case, dtype):
    shared, frames, *rows = as_dtype(CONDITIONS[case](), dtype)
    sums = shared.double() + (frames.double()[:, rows[0]] if rows else frames.double())
    for found, x in zip(
        streams.silu_conditions(shared, frames, *rows), (shared, sums), strict=True
    ):
        assert_close(found, x.double() * x.double().sigmoid(), dtype, terms=2)


GUIDED = {
    "scaled": lambda: (randn(2, 25, 20), randn(4, 25, 20), 1.5),
    "plain": lambda: (randn(2, 5, 3), randn(4, 5, 3), 4.5, "cfg", 0.25),
    "one pass": lambda: (randn(2, 5, 3), randn(2, 5, 3), 1.0, "none"),
    "out of the network's space": lambda: (
        randn(3, 7, 5), randn(6, 7, 5), 2.0, "cfg_scaled", 1.0, randn(1, 1, 5), randn(1, 1, 5)
    ),
    "scale of every sample": lambda: (randn(2, 9, 4), randn(4, 9, 4), torch.tensor([1.5, 3.0])),
    "scale in memory": lambda: (randn(2, 9, 4), randn(4, 9, 4), torch.tensor(1.5), "cfg"),
    "views": lambda: (randn(1, 9, 4).expand(2, -1, -1), strided(randn(4, 9, 4)), 2.0),
    "more than one block": lambda: (randn(1, 300, 20), randn(2, 300, 20), 1.5),
    "no unconditional velocity": lambda: (
        randn(1, 3, 2), torch.cat((randn(1, 3, 2), torch.zeros(1, 3, 2).double())), 1.5
    ),
    "empty": lambda: (randn(2, 0, 4), randn(4, 0, 4), 1.5),
}  # fmt: skip


def guided_in_double(z, u, w, mode="cfg_scaled", step=1.0, std=None, mean=None):
    u, w = u.double(), w.double().reshape(-1, 1, 1) if isinstance(w, torch.Tensor) else w
    x = z.double() - step * (u if mode == "none" else guide_of_meanflow(*u.chunk(2), w, mode))
    return x if std is None else x * std.double() + mean.double()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", GUIDED)
def test_guide(case, dtype):
    arguments = as_dtype(GUIDED[case](), dtype)
    assert_close(streams.guide(*arguments), guided_in_double(*arguments), dtype, terms=6000)


def test_guide_keeps_the_dtype_of_the_noise():
    half = torch.float16 if _backends.INTERPRETED else torch.bfloat16
    z, u = randn(1, 5, 3).float(), randn(2, 5, 3).to(half)
    x = streams.guide(z, u, 1.5)
    assert x.dtype == torch.float32
    known = streams.guide(z, u.float(), 1.5)
    assert oracle.error(x, known) <= oracle.allowance(known, torch.float32, terms=15)


def test_one_call_is_what_the_trainable_ops_give():
    """The projections, norms and gated units of streams are the ops that a network trains with."""
    xs = [torch.randn(2, n, 16) for n in (9, 4)]
    filters, ups, qkvs = (
        [torch.randn(s) / 7 for _ in xs] for s in ((24, 16, 3),) * 2 + ((48, 16),)
    )
    found = streams.project(xs, [streams.pack(*pair) for pair in zip(filters, ups, strict=True)])
    known = [swiglu(conv1d(x, a), conv1d(x, b)) for x, a, b in zip(xs, filters, ups, strict=True)]
    weights, ropes = torch.randn(2, 8), [angles(9, 8), angles(4, 8)]
    qkv = streams.project_qkv(
        xs, list(map(streams.pack, qkvs)), None, [weights[0]] * 2, [weights[1]] * 2, ropes, 2
    )
    for i, x in enumerate(xs):
        one = (x @ qkvs[i].t()).unflatten(-1, (3, 2, 8))
        found += [part[i] for part in qkv]
        known += qk_norm_rope(one, *weights, ropes[i])
    gates, shifts, scales = ([torch.randn(2, n, 16) for n in (9, 1)] for _ in range(3))
    totals, ys = streams.gated_residual_norm(xs, xs, gates, shifts, scales, None, 1e-5)
    found += [*totals, *ys]
    pairs = [
        gated_residual_adaln(x, x, *m, eps=1e-5)
        for x, *m in zip(xs, gates, shifts, scales, strict=True)
    ]
    known += [total for total, _ in pairs] + [y for _, y in pairs]
    for one, other in zip(found, known, strict=True):
        assert oracle.error(one, other) <= oracle.allowance(other, torch.float32, terms=96)


ONCE = {
    "pool": (streams.pool, lambda: (POOLS["video and text"](),)),
    "silu_conditions": (streams.silu_conditions, CONDITIONS["all rows"]),
    "guide": (streams.guide, GUIDED["scaled"]),
}
CALLS = {
    "project": (streams.project, PRODUCTS["input stage"]),
    "project, gated": (streams.project, PRODUCTS["gated units"]),
    "project_qkv": (streams.project_qkv, HEADS["joint block"]),
    "project_norm": (streams.project_norm, PRODUCTS_AND_NORMS["parts"]),
}


@pytest.mark.parametrize("call", [*CALLS, *ONCE])
def test_two_runs_are_equal_to_the_bit(call):
    op, make = (CALLS | ONCE)[call]
    arguments = as_dtype(make(), torch.float32)
    one, other = (tree_leaves(op(*arguments)) for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
@pytest.mark.parametrize("call", [*CALLS, *ONCE])
def test_a_call_is_one_launch(call, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched, launch = [], GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    op, make = (CALLS | ONCE)[call]
    op(*as_dtype(make(), torch.float32))
    assert len(launched) == (2 if call == "project_norm" else 1)


@pytest.mark.parametrize("call", ONCE)
def test_derivatives_of_what_is_done_once_a_step_are_pytorchs(call):
    op, make = ONCE[call]
    first = tree_leaves(make())[0]
    others = tree_map_only(torch.Tensor, lambda x: x + 1, make())

    def of_first(x):
        found = op(*tree_map_only(torch.Tensor, lambda t: x if t.shape == x.shape else t, others))
        return torch.stack([y.sum() for y in tree_leaves(found)]).sum()

    assert torch.autograd.gradcheck(of_first, first.requires_grad_(), check_forward_ad=True)


@pytest.mark.parametrize("call", [*CALLS, *ONCE])
def test_compiled_in_one_graph(call):
    op, make = (CALLS | ONCE)[call]
    arguments = as_dtype(make(), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, known = tree_leaves(compiled(*arguments)), tree_leaves(op(*arguments))
    assert all(map(torch.equal, found, known))


@pytest.mark.parametrize("call", CALLS)
def test_no_derivative_is_dropped(call):
    op, make = CALLS[call]
    arguments = as_dtype(make(), torch.float32)
    first = tree_leaves(arguments)[0]

    def of_first(x):
        return op(*tree_map_only(torch.Tensor, lambda t: x if t is first else t, arguments))

    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(lambda x: tuple(tree_leaves(of_first(x))), (first,), (first,))
    trained = first.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        of_first(trained)
    with torch.no_grad():
        of_first(trained)


def opcheck_arguments():
    make = {name: as_dtype(make(), torch.float32) for name, (_, make) in CALLS.items()}
    xs, weights, biases, _ = make["project"]
    ops = torch.ops.mfmjt
    yield ops.streams_project, (xs, [w.data for w in weights], biases, [2, 0, 1, 0], False)
    xs, weights = make["project, gated"]
    yield ops.streams_project, (xs, [w.data for w in weights], [None] * 3, [0] * 3, True)
    xs, weights, *others = make["project_qkv"]
    yield ops.streams_project_qkv, (xs, [w.data for w in weights], *others, 1e-6)
    ins, weights, *others = make["project_norm"]
    yield ops.streams_project_norm, (ins, [w.data for w in weights], *others)
    once = {name: as_dtype(make(), torch.float32) for name, (_, make) in ONCE.items()}
    yield ops.streams_pool, once["pool"]
    yield ops.streams_silu_conditions, once["silu_conditions"]
    z, u, w = once["guide"]
    yield ops.streams_guide, (z, u, w, None, "cfg_scaled", 1.0, 1e-8)
    yield ops.streams_guide, (z, u, 1.0, torch.tensor([1.5, 2.0]), "cfg", 0.5, 1e-8)


@pytest.mark.parametrize("case", range(8))
def test_library_ops_are_what_they_say(case):
    op, arguments = list(opcheck_arguments())[case]
    torch.library.opcheck(op.default, arguments)


WRONG = {
    "channels": lambda: streams.project([randn(1, 2, 3)], [single(4, 5)]),
    "dtypes": lambda: streams.project([randn(1, 2, 3).float()], [single(4, 3)]),
    "count": lambda: streams.project([randn(1, 2, 3)] * 2, [single(4, 3)]),
    "activation": lambda: streams.project([randn(1, 2, 3)], [single(4, 3)], act="relu"),
    "activation of a gated unit": lambda: streams.project(
        [randn(1, 2, 3)], [gated(4, 3, 1)], act="silu"
    ),
    "bias of a gated unit": lambda: streams.project([randn(1, 2, 3)], [gated(4, 3, 1)], [randn(4)]),
    "bias": lambda: streams.project([randn(1, 2, 3)], [single(4, 3)], [randn(3)]),
    "gated and not": lambda: streams.project(
        [randn(1, 2, 3)] * 2, [gated(4, 3, 1), single(4, 3)]
    ),
    "even kernel": lambda: streams.pack(randn(4, 3, 2)),
    "three weights": lambda: streams.pack(*[randn(4, 3)] * 3),
    "heads": lambda: streams.project_qkv(
        [randn(1, 2, 3)], [single(21, 3)], None, [randn(3)], [randn(3)], None, 2
    ),
    "rows": lambda: streams.gated_residual_norm(
        [randn(1, 2, 3)], None, None, *([randn(1, 4, 3)],) * 2, [torch.tensor([0])], 1e-6
    ),
    "rows that are missing": lambda: streams.gated_residual_norm(
        [randn(1, 2, 3)], None, None, *([randn(1, 4, 3)],) * 2, None, 1e-6
    ),
    "gate without h": lambda: streams.gated_residual_norm(
        [randn(1, 2, 3)], None, *([randn(1, 1, 3)],) * 3, None, 1e-6
    ),
    "residual of another shape": lambda: streams.project_norm(
        [randn(1, 2, 3)], [single(4, 3)], None, *([randn(1, 2, 3)],) * 4, None, 1e-6
    ),
    "nothing to pool": lambda: streams.pool([randn(1, 0, 3)]),
    "condition": lambda: streams.silu_conditions(randn(1, 2, 3), randn(1, 2, 3)),
    "w elsewhere": lambda: streams.guide(
        randn(1, 2, 3), randn(2, 2, 3), torch.empty(1, device="meta")
    ),
    "one velocity": lambda: streams.guide(randn(1, 2, 3), randn(1, 2, 3), 1.5),
    "mode": lambda: streams.guide(randn(1, 2, 3), randn(2, 2, 3), 1.5, "more"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    with pytest.raises(
        ValueError, match=r"mfmjt\.kernels\.(streams\.|adaln|gated)\w* needs .*; got"
    ):
        WRONG[case]()
