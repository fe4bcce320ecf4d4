from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import _backends, conv1d, linear, swiglu, swiglu_product
from mfmjt.kernels.swiglu_product import swiglu_product_ref
from tests import oracle
from tests.kernels.over_streams import check_streams, launches
from tests.oracle import randn, strided


def inputs(batch, tokens, width, out=6, taps=3, layout=lambda x: x):
    """As a network has them; no taps are a linear layer."""
    shape = (out, width, taps) if taps else (out, width)
    scale = (width * max(1, taps)) ** 0.5
    weights = {f"{name}_weight": layout(randn(*shape)) / scale for name in ("gate", "up")}
    return {"x": layout(randn(batch, tokens, width)), **weights}


def sliced(x):
    """The same numbers as part of wider rows, of which it keeps the dense last axis."""
    return torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]


CASES = {
    "k3": lambda: inputs(2, 9, 8),
    "k7": lambda: inputs(2, 9, 8, taps=7),
    "linear": lambda: inputs(2, 9, 8, taps=0),
    "odd sizes": lambda: inputs(3, 7, 5, out=9),
    "strided": lambda: inputs(2, 9, 8, layout=strided),
    "slice of wider rows": lambda: inputs(2, 9, 16, layout=sliced),
    "one token": lambda: inputs(2, 1, 8),
    "one channel": lambda: inputs(2, 5, 1, out=1),
    "several blocks": lambda: inputs(2, 77, 20, out=70),
    "no sample": lambda: inputs(0, 4, 8),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    oracle.check_op(swiglu_product, swiglu_product_ref, CASES[case](), ("x",), dtype, terms=200)


STREAMS = {  # and what moves; all x where nothing is said
    "joint block": (
        [inputs(2, 9, 8), inputs(2, 5, 8), inputs(2, 4, 8, taps=0)],
        (),
    ),
    "widths apart": ([inputs(2, 5, 8), inputs(3, 4, 7, out=9)], ()),
    "rows alone": ([{**inputs(1, 5, 8, taps=0), "x": randn(5, 8)}, inputs(2, 5, 8)], ()),
    "one empty": ([inputs(2, 5, 8), inputs(0, 5, 8)], ()),
    "one moves": ([inputs(2, 5, 8), inputs(2, 3, 8, layout=strided)], ("x1",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", STREAMS)
def test_streams(case, dtype):
    streams, moving = STREAMS[case]
    moving = moving or [f"x{i}" for i in range(len(streams))]
    check_streams(swiglu_product, swiglu_product_ref, streams, moving, dtype, terms=100)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_value_and_tangent_of_all_streams_are_one_launch(monkeypatch):
    streams = [inputs(2, n, 8, taps=taps) for n, taps in ((7, 3), (5, 3), (3, 0))]
    found = launches(swiglu_product, streams, ("x",), monkeypatch)
    weights = ["_conv1d_bwd_weight_kernel"] * 2  # those of the linear layer are the vendor's
    assert found == ["_product_gated_kernel", "_swiglu_bwd_kernel", "_product_kernel", *weights]


@pytest.mark.skipif(_backends.ON_CPU, reason="there the kernels are Triton's")
@pytest.mark.parametrize("taps", [3, 0])
def test_a_cpu_computes_the_ops_that_it_is_made_of(taps):
    given = {name: x.float() for name, x in inputs(2, 9, 8, taps=taps).items()}
    x, gate, up = given.values()
    product = conv1d if taps else linear
    assert torch.equal(swiglu_product(**given), swiglu(product(x, gate), product(x, up)))


def test_the_tape_keeps_what_separate_ops_keep():
    """The products, which `swiglu` keeps, beside what `conv1d` does; no tangent."""
    given = {name: x.float().requires_grad_() for name, x in inputs(2, 9, 8).items()}
    kept: dict[int, int] = {}

    def keep(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = given.pop("x")
        torch.func.jvp(functools.partial(swiglu_product, **given), (x,), (torch.ones_like(x),))
    products = 2 * 2 * 9 * 6
    assert sum(kept.values()) == x.numel() + sum(w.numel() for w in given.values()) + products


def test_both_runs_of_halves_and_of_one_piece_agree():
    """A tangent that lies in memory in another way than its value does."""
    given = {name: x.float() for name, x in inputs(2, 9, 16).items()}
    x, x_dot = given.pop("x"), torch.randn(2, 9, 16)
    call = functools.partial(swiglu_product, **given)
    known = torch.func.jvp(call, (x,), (x_dot,))
    for here, there in ((sliced(x), x_dot), (x, sliced(x_dot)), (sliced(x), strided(x_dot))):
        found = torch.func.jvp(call, (here,), (there,))
        for y, truth in zip(found, known, strict=True):
            assert oracle.error(y, truth) <= oracle.allowance(truth, y.dtype, terms=48)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1, 3, 5]))
def test_any_shape(batch, tokens, width, taps):
    values = inputs(batch, tokens, width, taps=taps)
    oracle.check_op(swiglu_product, swiglu_product_ref, values, ("x",), torch.float32, terms=150)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    oracle.check_compiled(swiglu_product, inputs(2, 5, 8), ("x",), terms=200, backend=backend)


def test_reference_is_differentiable_in_both_modes():
    for taps in (3, 0):
        values = tuple(x.requires_grad_() for x in inputs(1, 3, 2, out=2, taps=taps).values())
        assert torch.autograd.gradcheck(swiglu_product_ref, values, check_forward_ad=True)


@pytest.mark.parametrize("taps", [3, 0])
def test_library_ops(taps):
    x, gate, up = (t.requires_grad_() for t in inputs(2, 5, 8, taps=taps).values())
    ops = torch.ops.mfmjt
    torch.library.opcheck(ops.swiglu_product_fwd.default, (x, gate, up))
    leaves = x.detach(), gate.detach(), up.detach()
    y, both = ops.swiglu_product_fwd(*leaves)
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ops.swiglu_product_bwd.default, (y, *leaves, both, needs))
    torch.library.opcheck(
        ops.swiglu_product_jvp.default,
        (x, gate, up, x.detach()),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("taps", [3, 0])
def test_formulas(taps, dtype):
    """What serves float64 on a GPU, judged where nothing else calls it."""
    given = {name: x.to(dtype) for name, x in inputs(2, 9, 8, taps=taps).items()}
    x, gate, up = given.values()
    ops = torch.ops.mfmjt
    wide = tuple(t.double().requires_grad_() for t in (x, gate, up))

    def truth_of(x):
        return swiglu_product_ref(x, *wide[1:])

    truth, truth_dot = torch.func.jvp(truth_of, wide[:1], (torch.ones_like(wide[0]),))
    y, y_dot, both = ops.swiglu_product_jvp(x, gate, up, torch.ones_like(x))
    bars = ops.swiglu_product_bwd(y, x, gate, up, both, [True] * 3)
    known = torch.autograd.grad(truth, wide, y.double())
    for found, right in zip((y, y_dot, *bars), (truth, truth_dot, *known), strict=True):
        # Rounded products go through a slope of at most 1.1, and the sums that follow
        assert oracle.error(found, right) <= 4 * oracle.allowance(right, dtype, terms=48)


def test_autocast():
    dtype = oracle.DTYPES[-1]
    given = {name: x.float() for name, x in inputs(2, 5, 16).items()}
    x = given.pop("x")
    weight = given["gate_weight"].requires_grad_()
    with torch.autocast("cpu", dtype):
        plain = swiglu_product(x, **given)
        y, y_dot = torch.func.jvp(functools.partial(swiglu_product, **given), (x,), (x,))
    assert plain.dtype == y.dtype == y_dot.dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_refuses_what_does_not_fit():
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"on one device; got x \(2, 5, 8\) float32"):
        swiglu_product(x, torch.zeros(6, 8, 4), torch.zeros(6, 8, 4))
    with pytest.raises(ValueError, match=r"up_weight \(7, 8, 3\)"):
        swiglu_product(x, torch.zeros(6, 8, 3), torch.zeros(7, 8, 3))
    with pytest.raises(ValueError, match="two weights alike"):
        swiglu_product(x, torch.zeros(6, 7), torch.zeros(6, 7))


@pytest.mark.parametrize("name", ["gate_weight", "up_weight"])
def test_refuses_a_tangent_of_a_weight(name):
    values = {n: x.float() for n, x in inputs(2, 3, 8).items()}
    moving = values.pop(name)
    with pytest.raises(NotImplementedError, match="does not propagate a tangent of its"):
        torch.func.jvp(lambda w: swiglu_product(**values, **{name: w}), (moving,), (moving,))


def test_refuses_a_gradient_at_the_tangent():
    given = {name: x.float().requires_grad_() for name, x in inputs(2, 3, 8).items()}
    x = given.pop("x")
    _, y_dot = torch.func.jvp(functools.partial(swiglu_product, **given), (x,), (x.detach(),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        y_dot.sum().backward()
