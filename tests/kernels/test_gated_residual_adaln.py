from __future__ import annotations

import pytest
import torch

from mfmjt.kernels import _backends, gated_residual_adaln
from mfmjt.kernels.gated_residual_adaln import gated_residual_adaln_ref
from tests import oracle
from tests.kernels.over_streams import check_streams, launches
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
    "no token": (lambda: inputs(2, 0, 16, 1), ALL),
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


@pytest.mark.parametrize(
    ("tokens", "width", "modulated", "dtype"),
    [
        (1, 449, 1, torch.float16),
        (17, 7, 17, torch.float32),
        (17, 448, 1, torch.float32),
        (77, 63, 77, torch.float16),
        (250, 7, 1, torch.float32),
        (391, 31, 1, torch.float16),
    ],
)
def test_lengths_and_widths(tokens, width, modulated, dtype):
    values = inputs(1, tokens, width, modulated)
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, values, ALL, dtype, terms=max(tokens, width))


@pytest.mark.parametrize("modulated", [1, 19], ids=["per sample", "per token"])
def test_programs_of_several_blocks_of_rows(modulated, monkeypatch):
    """As for far more rows than a test can have."""
    tuning = pytest.importorskip("mfmjt.kernels.triton.tuning", reason="needs Triton")
    monkeypatch.setattr(tuning, "norm_chunk", lambda rows, block_rows, summed: 4 * block_rows)
    values = inputs(1, 19, 300, modulated)
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, values, ALL, torch.float32, terms=300)


@pytest.mark.parametrize("width", [1, 1500, 8200])
def test_one_channel_and_many(width):
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, inputs(1, 2, width, 1), ALL, torch.float32, terms=width)


@pytest.mark.parametrize("modulated", [1, 5], ids=["per sample", "per token"])
def test_views_of_larger_tensors(modulated):
    """The network's way: some tokens of a stream, and a few of many modulations side by side."""

    def of_views(op):
        def run(x, h, modulations):
            gate, _, shift, scale = modulations.chunk(4, -1)
            return op(x[:, 2:], h[:, :5], gate, shift, scale)

        return run

    values = {"x": randn(2, 7, 24), "h": randn(2, 6, 24), "modulations": randn(2, modulated, 96)}
    op, ref = of_views(gated_residual_adaln), of_views(gated_residual_adaln_ref)
    oracle.check_op(op, ref, values, tuple(values), torch.float32, terms=24)


STREAMS = {  # and what moves; all where nothing is said
    "alike": ([inputs(2, n, 33, n) for n in (7, 5, 1)], ()),
    "kinds apart": ([inputs(2, 7, 16, 7), inputs(2, 5, 16, 1), inputs(2, 3, 16, 1)], ()),
    "one stream moves": ([inputs(2, n, 16, 1) for n in (7, 5, 3)], ("x0", "gate0")),
    "one moves in h alone": ([inputs(2, n, 16, n) for n in (4, 3)], ("h1", "scale1")),
    "widths apart": ([inputs(2, 5, 16, 1), inputs(2, 3, 9, 3)], ()),
    "one empty": ([inputs(2, 5, 16, 1), inputs(2, 0, 16, 1)], ()),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", STREAMS)
def test_streams(case, dtype):
    streams, moving = STREAMS[case]
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    check_streams(op, ref, streams, moving, dtype, terms=33)


@pytest.mark.parametrize("used", [(0, 0), (0, 1), (1, 1)])
def test_gradient_when_few_results_of_streams_are_used(used):
    """What no gradient reaches gets zeros, in a launch with streams that it does reach."""
    streams = [inputs(2, 5, 16, 5), inputs(2, 3, 16, 1)]
    names, (result, stream) = list(streams[0]), used
    leaves = [{n: x.clone().requires_grad_() for n, x in s.items()} for s in streams]
    y = gated_residual_adaln(**{n: tuple(s[n] for s in leaves) for n in names})[result][stream]
    bar = torch.randn_like(y)
    flat = [s[n] for s in leaves for n in names]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(y, flat, bar, **options)
    y = gated_residual_adaln_ref(**leaves[stream])[result]
    for a, b in zip(found, torch.autograd.grad(y, flat, bar, **options), strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=16)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_streams_share_launches(monkeypatch):
    streams = [inputs(2, n, 16, n) for n in (7, 5, 3)]
    found = launches(gated_residual_adaln, streams, ("x", "h", "gate"), monkeypatch)
    assert found == ["_norm_fwd_kernel", "_norm_bwd_kernel"]


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_picked_rows_when_one_result_is_used(used):
    rows = torch.tensor([0, 0, 3, 1])
    leaves = {n: x.requires_grad_() for n, x in inputs(2, 4, 16, 5).items()}
    ys, truths = (
        op(**leaves, rows=rows)[used] for op in (gated_residual_adaln, gated_residual_adaln_ref)
    )
    flat, options = list(leaves.values()), {"allow_unused": True, "materialize_grads": True}
    bar = torch.randn_like(ys)
    found = torch.autograd.grad(ys, flat, bar, **options)
    for a, b in zip(found, torch.autograd.grad(truths, flat, bar, **options), strict=True):
        assert oracle.error(a, b) <= oracle.allowance(b, torch.float64, terms=16)


def picked_ref(x, h, gate, shift, scale, rows):
    picked = (m if rows is None or m.shape[1] == 1 else m[:, rows] for m in (gate, shift, scale))
    return gated_residual_adaln_ref(x, h, *picked)


@pytest.mark.parametrize("derivative", [True, False])
def test_rows_of_modulations(derivative):
    rows = torch.tensor([0, 0, 2, 1, 2])
    streams = [inputs(2, 5, 16, 3), inputs(2, 4, 16, 1)]
    streams[0]["gate"] = randn(1, 3, 16)
    if derivative:
        op, both = gated_residual_adaln, {"rows": [rows, None]}
        check_streams(op, picked_ref, streams, (), torch.float32, 16, both)
        return
    single = [{n: x.float() for n, x in stream.items()} for stream in streams]
    tuples = {n: tuple(s[n] for s in single) for n in single[0]}
    found = gated_residual_adaln(**tuples, rows=(rows, None))
    for i, row in enumerate((rows, None)):
        truths = picked_ref(**{n: x.double() for n, x in single[i].items()}, rows=row)
        for ys, truth in zip(found, truths, strict=True):
            assert oracle.error(ys[i], truth) <= oracle.allowance(truth, torch.float32, terms=16)
    alone = gated_residual_adaln(**single[0], rows=rows)
    assert all(torch.equal(y, ys[0]) for y, ys in zip(alone, found, strict=True))


SHAPES = {  # of x, gate, shift and scale
    "sequence": ((5, 8), (8,), (5, 8), ()),
    "one for all": ((2, 5, 8), (8,), (1, 1, 8), (5, 8)),
    "a number for each token": ((2, 5, 8), (2, 5, 1), (2, 1, 8), (2, 5, 8)),
    "single tokens": ((3, 1, 8), (3, 1, 8), (3, 1, 8), (3, 1, 8)),
    "four axes": ((2, 3, 4, 8), (2, 1, 1, 8), (2, 3, 1, 8), (4, 8)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_whatever_broadcasts(case):
    x, *modulations = SHAPES[case]
    values = {"x": randn(*x), "h": randn(*x)}
    for name, shape in zip(("gate", "shift", "scale"), modulations, strict=True):
        values[name] = torch.randn(shape, dtype=torch.float64)
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, values, ALL, torch.float32, terms=192)


def test_constant_rows_and_large_offsets():
    values = inputs(1, 5, 16, 1)
    x, h, gate = values["x"], values["h"], values["gate"]
    x[:, 0] += 1e4
    x[:, 1:4] = torch.tensor([300, 0, 1e-20])[:, None]
    h[:, 1:4] = torch.tensor([4, 0, 1e-20])[:, None]
    gate[:] = 2
    op, ref = gated_residual_adaln, gated_residual_adaln_ref
    oracle.check_op(op, ref, values, ALL, torch.float32, terms=16)


@pytest.mark.parametrize("modulated", [1, 77], ids=["per sample", "per token"])
def test_same_bits_twice(modulated):
    def everything():
        leaves = {name: t.float().requires_grad_() for name, t in values.items()}
        results = gated_residual_adaln(**leaves)
        bars = [y.detach().cos() for y in results]
        return (*results, *torch.autograd.grad(results, list(leaves.values()), bars))

    values = inputs(2, 77, 33, modulated)
    for once, again in zip(everything(), everything(), strict=True):
        assert torch.equal(once, again)


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


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0, 1])])
def test_library_ops(rows):
    values = list(inputs(2, 3, 8, 3).values())
    leaves = [t.clone().requires_grad_() for t in values]
    ops = torch.ops.mfmjt
    torch.library.opcheck(ops.gated_residual_adaln_fwd.default, (*leaves, 1e-6, rows))
    total, y, mean, rstd = ops.gated_residual_adaln_fwd(*values, 1e-6, rows)
    saved = (total, *values[1:], mean, rstd, rows)
    for bars in ((total, y), (total, None), (None, y)):
        torch.library.opcheck(ops.gated_residual_adaln_bwd.default, (*bars, *saved))
    torch.library.opcheck(
        ops.gated_residual_adaln_jvp.default,
        (*leaves, *values[:2], None, values[3], None, 1e-6, rows),
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
