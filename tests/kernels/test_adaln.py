from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import _backends, adaln
from mfmjt.kernels.adaln import adaln_ref
from tests import oracle
from tests.kernels.over_streams import check_streams, launches
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
    "no token": (lambda: inputs(2, 0, 16, 1), ("x", "shift", "scale")),
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
    oracle.check_op(adaln, adaln_ref, values, tuple(values), dtype, terms=max(tokens, width))


@pytest.mark.parametrize("modulated", [1, 19], ids=["per sample", "per token"])
def test_programs_of_several_blocks_of_rows(modulated, monkeypatch):
    """As for far more rows than a test can have."""
    tuning = pytest.importorskip("mfmjt.kernels.triton.tuning", reason="needs Triton")
    monkeypatch.setattr(tuning, "norm_chunk", lambda rows, block_rows, summed: 4 * block_rows)
    values = inputs(1, 19, 300, modulated)
    oracle.check_op(adaln, adaln_ref, values, tuple(values), torch.float32, terms=300)


@pytest.mark.parametrize("width", [1, 1500, 8192, 8200])
def test_one_channel_and_many(width):
    values = inputs(1, 2, width, 1)
    oracle.check_op(adaln, adaln_ref, values, tuple(values), torch.float32, terms=width)


@pytest.mark.parametrize("modulated", [1, 5], ids=["per sample", "per token"])
def test_views_of_larger_tensors(modulated):
    """The network's way: some tokens of a stream, and a few of many modulations side by side."""

    def of_views(op):
        def run(x, modulations):
            _, shift, scale = modulations.chunk(3, -1)
            return op(x[:, 2:], shift, scale)

        return run

    values = {"x": randn(2, 7, 24), "modulations": randn(2, modulated, 72)}
    oracle.check_op(
        of_views(adaln), of_views(adaln_ref), values, tuple(values), torch.float32, terms=24
    )


STREAMS = {  # and what moves; all where nothing is said
    "alike": ([inputs(2, n, 33, n) for n in (7, 5, 1)], ()),
    "kinds apart": ([inputs(2, 7, 16, 7), inputs(2, 5, 16, 1), inputs(2, 3, 16, 1)], ()),
    "one kind of each": (
        [inputs(2, 7, 16, 1) | {"shift": randn(2, 7, 16)}, inputs(2, 3, 16, 1)],
        (),
    ),
    "one stream moves": ([inputs(2, n, 16, 1) for n in (7, 5, 3)], ("x0", "scale0")),
    "modulations move": ([inputs(2, n, 16, n) for n in (4, 3)], ("shift0", "scale1")),
    "strided": ([inputs(2, n, 16, 1, strided) for n in (4, 3)], ()),
    "widths apart": ([inputs(2, 5, 16, 1), inputs(2, 3, 9, 3)], ()),
    "batches apart": ([inputs(2, 5, 16, 1), inputs(3, 5, 16, 1)], ()),
    "one empty": ([inputs(2, 5, 16, 1), inputs(2, 0, 16, 1)], ()),
    "one": ([inputs(2, 5, 16, 1)], ()),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", STREAMS)
def test_streams(case, dtype):
    streams, moving = STREAMS[case]
    check_streams(adaln, adaln_ref, streams, moving, dtype, terms=33)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_streams_share_launches(monkeypatch):
    alike = [inputs(2, n, 16, 1) for n in (7, 5, 3)]
    found = launches(adaln, alike, ("x", "shift"), monkeypatch)
    assert found == ["_norm_fwd_kernel", "_norm_bwd_kernel", "_sum_kernel"]
    apart = [inputs(2, 7, 16, 7), *alike[1:]]
    assert len(launches(adaln, apart, ("x", "shift"), monkeypatch)) == 4  # a gradient of each kind


def picked_ref(x, shift, scale, rows):
    picked = (m if rows is None or m.shape[1] == 1 else m[:, rows] for m in (shift, scale))
    return adaln_ref(x, *picked)


@pytest.mark.parametrize("derivative", [True, False])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rows_of_modulations(integers, derivative):
    rows = torch.tensor([0, 0, 2, 1, 2], dtype=integers)
    streams = [
        {"x": randn(2, 5, 16), "shift": randn(2, 3, 16), "scale": randn(1, 3, 16)},
        {"x": randn(2, 4, 16), "shift": randn(1, 1, 16), "scale": randn(2, 4, 16)},
    ]
    both = {"rows": [rows, None]}
    if derivative:
        check_streams(adaln, picked_ref, streams, (), torch.float32, 16, both)
        one = {n: [c[0]] for n, c in both.items()}
        check_streams(
            lambda rows, **one: (adaln(**{n: x for n, (x,) in one.items()}, rows=rows[0]),),
            picked_ref, streams[:1], (), torch.float32, 16, one,
        )  # fmt: skip
        return
    single = [{n: x.float() for n, x in stream.items()} for stream in streams]
    ys = adaln(**{n: tuple(s[n] for s in single) for n in single[0]}, rows=(rows, None))
    for y, stream, row in zip(ys, single, (rows, None), strict=True):
        truth = picked_ref(**{n: x.double() for n, x in stream.items()}, rows=row)
        assert oracle.error(y, truth) <= oracle.allowance(truth, y.dtype, terms=16)
    assert torch.equal(adaln(**single[0], rows=rows), ys[0])


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_rows_are_added_up_where_they_are_computed(monkeypatch):
    streams = [inputs(2, 7, 16, 3), inputs(2, 5, 16, 1)]
    rows = (torch.arange(7) // 3, None)
    found = launches(adaln, streams, ("x", "shift"), monkeypatch, rows=rows)
    # A gradient of each kind, and the second step of sums over a sample
    assert found == ["_norm_fwd_kernel", "_norm_bwd_kernel", "_norm_bwd_kernel", "_sum_kernel"]


@pytest.mark.parametrize("rows", [[2, 1, 1, 4, 0, 0, 0], [0] * 7, [3] * 6 + [1]])
def test_rows_in_any_order_and_rows_of_no_token(rows):
    constants = {"rows": [torch.tensor(rows)]}

    def ref(rows, **given):
        return picked_ref(**given, rows=rows)

    check_streams(adaln, ref, [inputs(2, 7, 33, 5)], (), torch.float32, 33, constants)


def test_more_tokens_than_a_row_has_channels():
    constants = {"rows": [torch.arange(100) * 3 // 5]}
    check_streams(adaln, picked_ref, [inputs(1, 100, 16, 60)], (), torch.float32, 100, constants)


SHAPES = {  # of x, shift and scale
    "one axis": ((8,), (8,), ()),
    "sequence": ((5, 8), (8,), (5, 8)),
    "one for all": ((2, 5, 8), (8,), (1, 1, 8)),
    "one for all single tokens": ((3, 1, 8), (1, 8), (3, 1, 8)),
    "all of one token": ((1, 1, 8), (1, 1, 8), (8,)),
    "the same for all samples": ((2, 5, 8), (1, 5, 8), (5, 8)),
    "a number for each token": ((2, 5, 8), (2, 5, 1), (2, 1, 1)),
    "several per token, others per sample": ((2, 5, 8), (2, 5, 8), (2, 1, 8)),
    "four axes, per sample": ((2, 3, 4, 8), (2, 1, 1, 8), (1, 1, 1, 8)),
    "four axes, per row": ((2, 3, 4, 8), (2, 3, 1, 8), (2, 1, 1, 8)),
    "four axes, per column": ((2, 3, 4, 8), (2, 1, 4, 8), (4, 8)),
    "four axes, single tokens": ((2, 3, 1, 8), (3, 1, 8), (2, 3, 1, 8)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_whatever_broadcasts(case):
    shapes = dict(zip(("x", "shift", "scale"), SHAPES[case], strict=True))
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    oracle.check_op(adaln, adaln_ref, values, tuple(values), torch.float32, terms=192)


@pytest.mark.parametrize("width", [16, 63])
def test_constant_rows_and_large_offsets(width):
    x = randn(1, 5, width)
    x[:, 0] += 1e4
    x[:, 1] = 300
    x[:, 2] = 0
    x[:, 3] = 1e-20
    x[:, 4] *= -1e4
    values = {**inputs(1, 5, width, 5), "x": x}
    oracle.check_op(adaln, adaln_ref, values, tuple(values), torch.float32, terms=width)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_constant_rows_are_normalised_to_zeros(dtype):
    x = torch.full((1, 4, 448), 0.1) * torch.tensor([1, 1e5, 0, -1e-3])[:, None]
    x, scale = x.to(dtype), torch.randn(1, 1, 448).to(dtype)
    shift = torch.randn(1, 1, 448).to(dtype)
    y, _, rstd = torch.ops.mfmjt.adaln_fwd(x, shift, scale, 1e-6, None)
    assert oracle.error(y, shift.expand_as(x)) <= oracle.allowance(shift, dtype, terms=1)
    truth = torch.full_like(rstd, 1e-6**-0.5)
    assert oracle.error(rstd, truth) <= oracle.allowance(truth, rstd.dtype, terms=1)


def test_gradients_of_modulations_are_summed_in_steps():
    tokens = 100_000
    y_bar = torch.rand(1, tokens, 1)  # all of one sign: errors of a running sum would pile up
    x, zeros = torch.randn(1, tokens, 1), torch.zeros(1, 1, 1)
    bwd = torch.ops.mfmjt.adaln_bwd
    _, shift_bar, _ = bwd(y_bar, x, zeros, zeros, x, torch.ones_like(x), None)
    truth = y_bar.double().sum(1, keepdim=True)
    limit = oracle.allowance(truth, x.dtype, terms=math.isqrt(tokens))
    assert oracle.error(shift_bar, truth) <= limit


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
    for rows in (None, torch.tensor([1, 0, 1])):
        torch.library.opcheck(torch.ops.mfmjt.adaln_fwd.default, (*leaves, 1e-6, rows))
        y, mean, rstd = torch.ops.mfmjt.adaln_fwd(x, shift, scale, 1e-6, rows)
        torch.library.opcheck(
            torch.ops.mfmjt.adaln_bwd.default, (y, x, shift, scale, mean, rstd, rows)
        )
        torch.library.opcheck(
            torch.ops.mfmjt.adaln_jvp.default,
            (*leaves, x, None, scale, 1e-6, rows),
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
    with pytest.raises(ValueError, match=r"x \(B, N, C\); got x \(\) float32"):
        adaln(x.sum(), x.sum(), x.sum())
    with pytest.raises(ValueError, match=r"scale for each of 2 streams; got 1"):
        adaln((x, x), (x, x), (x,))
    with pytest.raises(ValueError, match=r"shift for each of 2 streams; got Tensor"):
        adaln((x, x), x, (x, x))
    with pytest.raises(ValueError, match=r"rows \(N,\) of integers"):
        adaln(x, x, x, rows=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"rows \(N,\) of integers"):
        adaln(x, x[:, :2], x, rows=torch.tensor([0, 1, 1]))


def test_refuses_a_gradient_at_the_tangent():
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, y_dot = torch.func.jvp(lambda x: adaln(x, x, x), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()


@pytest.mark.parametrize("modulated", [1, 77], ids=["per sample", "per token"])
def test_same_bits_twice(modulated):
    def everything():
        leaves = {n: t.float().requires_grad_() for n, t in values.items()}
        y, y_dot = torch.func.jvp(lambda x: adaln(**{**leaves, "x": x}), (leaves["x"],), (x_dot,))
        y_bar = y.detach().cos()
        return (y, y_dot, *torch.autograd.grad(y, list(leaves.values()), y_bar))

    values = inputs(2, 77, 33, modulated)
    x_dot = torch.randn(2, 77, 33)
    for once, again in zip(everything(), everything(), strict=True):
        assert torch.equal(once, again)
