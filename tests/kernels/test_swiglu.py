from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfmjt.kernels import _backends, swiglu
from mfmjt.kernels.swiglu import swiglu_ref
from tests import oracle
from tests.kernels.over_streams import check_streams, launches
from tests.oracle import randn, strided


def inputs(*shape, layout=lambda x: x):
    return {"gate": layout(3 * randn(*shape)), "up": layout(randn(*shape))}


BOTH = ("gate", "up")
CASES = {
    "sequences": (lambda: inputs(2, 5, 16), BOTH),
    "odd width": (lambda: inputs(2, 3, 7), BOTH),
    "strided": (lambda: inputs(2, 5, 16, layout=strided), BOTH),
    "one token": (lambda: inputs(2, 1, 16), BOTH),
    "no sample": (lambda: inputs(0, 4, 16), BOTH),
    "one axis": (lambda: inputs(9), BOTH),
    "no axis": (lambda: {name: x[0] for name, x in inputs(1).items()}, BOTH),
    "no width": (lambda: inputs(2, 0), BOTH),
    "one channel": (lambda: inputs(2, 5, 1), BOTH),
    "wider than a block": (lambda: inputs(3, 1100), BOTH),
    "only gate moves": (lambda: inputs(2, 4, 16), ("gate",)),
    "only up moves": (lambda: inputs(2, 4, 16), ("up",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_modes(case, dtype):
    make, moving = CASES[case]
    oracle.check_op(swiglu, swiglu_ref, make(), moving, dtype, terms=1)


STREAMS = {  # and what moves; all where nothing is said
    "lengths apart": ([inputs(2, n, 16) for n in (7, 5, 1)], ()),
    "shapes apart": ([inputs(2, 5, 16), inputs(3, 16), inputs(16)], ()),
    "widths apart": ([inputs(2, 5, 16), inputs(2, 5, 9)], ()),
    "one empty": ([inputs(2, 5, 16), inputs(2, 0, 16)], ()),
    "strided": ([inputs(2, 5, 16, layout=strided), inputs(2, 3, 16)], ()),
    "some move": ([inputs(2, 5, 16), inputs(2, 3, 16)], ("gate0", "up1")),
    "one moves": ([inputs(2, 5, 16), inputs(2, 3, 16)], ("up0",)),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", STREAMS)
def test_streams(case, dtype):
    streams, moving = STREAMS[case]
    check_streams(swiglu, swiglu_ref, streams, moving, dtype, terms=1)


@pytest.mark.skipif(not _backends.INTERPRETED, reason="counts launches of interpreted kernels")
def test_streams_share_launches(monkeypatch):
    streams = [inputs(2, n, 16) for n in (7, 5, 3)]
    found = launches(swiglu, streams, BOTH, monkeypatch)
    assert found == ["_swiglu_fwd_kernel", "_swiglu_bwd_kernel"]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_any_shape(shape, packed):
    values = inputs(*shape, layout=(lambda x: x) if packed else strided)
    oracle.check_op(swiglu, swiglu_ref, values, BOTH, torch.float32, terms=1)


@pytest.mark.parametrize("length", [1, 17, 77, 250, 391])
def test_lengths(length):
    oracle.check_op(swiglu, swiglu_ref, inputs(2, length, 13), BOTH, torch.float32, terms=1)


def everything(gate, up):
    """Value, tangent and gradients, of fixed tangents and cotangents."""
    leaves = [t.requires_grad_() for t in (gate, up)]
    y, y_dot = torch.func.jvp(swiglu, tuple(leaves), (up.detach(), gate.detach()))
    return [y.detach(), y_dot.detach(), *torch.autograd.grad(y, leaves, 2 * y.detach())]


def test_halves_of_one_tensor_and_two_runs_are_bit_equal():
    """As the network passes them: halves of one projection, rows apart by twice their width."""
    whole = torch.randn(2, 77, 2 * 53)
    apart = everything(*(half.contiguous() for half in whole.chunk(2, dim=-1)))
    for _ in range(2):
        gate, up = (half.detach() for half in whole.chunk(2, dim=-1))
        assert not gate.is_contiguous()
        for found, known in zip(everything(gate, up), apart, strict=True):
            assert torch.equal(found, known)


def test_expanded_inputs_and_cotangents():
    gate, up = torch.randn(1, 9), torch.randn(4, 1)
    leaves = [gate.expand(4, 9).requires_grad_(), up.expand(4, 9).requires_grad_()]
    assert leaves[1].stride() == (1, 0)
    y = swiglu(*leaves)
    packed = [leaf.detach().contiguous().requires_grad_() for leaf in leaves]
    y_packed = swiglu(*packed)
    assert torch.equal(y, y_packed)
    found = torch.autograd.grad(y.sum(), leaves)
    known = torch.autograd.grad(y_packed, packed, torch.ones(4, 9))
    assert all(map(torch.equal, found, known))


def test_extreme_gates_stay_finite():
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    y, y_dot = torch.func.jvp(lambda g: swiglu(g, torch.ones(5)), (gate,), (torch.ones(5),))
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.0, 200.0, 1e4]))
    assert torch.equal(y_dot, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    oracle.check_compiled(swiglu, inputs(2, 5, 16), BOTH, terms=80, backend=backend)


def test_reference_is_differentiable_in_both_modes():
    values = tuple(x.requires_grad_() for x in inputs(2, 3).values())
    assert torch.autograd.gradcheck(swiglu_ref, values, check_forward_ad=True)


def test_library_ops():
    gate, up = inputs(2, 3, 8).values()
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    torch.library.opcheck(torch.ops.mfmjt.swiglu_fwd.default, leaves)
    torch.library.opcheck(torch.ops.mfmjt.swiglu_bwd.default, (gate, gate, up))
    torch.library.opcheck(
        torch.ops.mfmjt.swiglu_jvp.default,
        (*leaves, gate, None),
        test_utils=oracle.OPCHECKS_OF_A_DUAL,
    )


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"up \(2, 1\) float32"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"up \(2, 3\) float64"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))


def test_refuses_a_gradient_at_the_tangent():
    x = torch.randn(2, 3, requires_grad=True)
    y, y_dot = torch.func.jvp(lambda x: swiglu(x, x), (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="detach the tangent"):
        (y + y_dot).sum().backward()
