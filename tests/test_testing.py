"""The judge of ops finds what is wrong with one, and passes one that rounds as PyTorch does."""

from __future__ import annotations

import pytest
import torch

from mfmjt.testing import (
    BACKWARD,
    JVP_BACKWARD,
    MODES,
    VALUE,
    Truth,
    check_compiled,
    check_op,
    draw,
    poisoned,
    runner,
    strided,
)


def scaled_ref(x, weight):
    return x * weight.exp(), x.sum(dim=-1)


def inputs(layout=lambda x: x):
    x = torch.randn(3, 7, dtype=torch.float64)
    return {"x": layout(x), "weight": torch.randn(7, dtype=torch.float64)}


def check(op, dtype=torch.float32, values=None):
    check_op(op, scaled_ref, values or inputs(), ("x",), dtype, terms=7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_rounds_as_pytorch_does_passes(dtype):
    check(lambda x, weight: (weight.exp() * x, x.flip(-1).sum(dim=-1)), dtype)


class Frozen(torch.autograd.Function):
    """The identity, whose gradient and tangent are off by a thousandth."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, given, output):
        pass

    @staticmethod
    def backward(ctx, y_bar):
        return 1.001 * y_bar

    @staticmethod
    def jvp(ctx, x_dot):
        return 1.001 * x_dot


def one_off(y):
    y = y.clone()
    y[-1, -1] += 0.01
    return y


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (one_off, "value 0: error"),
        (lambda y: y * (1 + 1.2e-6), "mean square error"),
        (lambda y: y * torch.nan, "value 0: error nan"),
        (lambda y: y.double(), "value 0 is .3, 7., torch.float64"),
        (lambda y: y + torch.empty_like(y) * 0, "value 0: error nan"),  # reads what nobody wrote
        (Frozen.apply, "gradient of x: error"),
    ],
    ids=["one element", "all a little", "nan", "dtype", "unwritten memory", "gradient"],
)
def test_what_is_wrong_is_found(spoil, reason):
    with pytest.raises(AssertionError, match=reason):
        check(lambda x, weight: (spoil(x * weight.exp()), x.sum(dim=-1)))


def test_results_of_another_shape_are_wrong():
    given = draw(scaled_ref, inputs(), ("x",), torch.float32)
    found = runner(lambda x, weight: (x * weight.exp(), x.sum(-1, keepdim=True)), VALUE)(given)
    verdict = Truth(scaled_ref, given, terms=7).judge(found)
    assert verdict.wrong.startswith("value 1 is (3, 1), torch.float32")


def test_a_second_call_gives_the_same_bits():
    calls = iter(range(9))
    with pytest.raises(AssertionError, match="differs between two equal calls"):
        check(lambda x, weight: (x * weight.exp() + next(calls) * 2**-24, x.sum(dim=-1)))


def test_a_wrong_tangent_is_found():
    given = draw(scaled_ref, inputs(), ("x",), torch.float32)
    found = runner(scaled_ref, JVP_BACKWARD)(given)
    found["tangent"] = (1.001 * found["tangent"][0], found["tangent"][1])
    verdict = Truth(scaled_ref, given, terms=7).judge(found)
    assert verdict.wrong.startswith("tangent 0: error")
    assert {kind: row["ok"] for kind, row in verdict.errors.items()} == {
        "value": True,
        "tangent": False,
        "gradient": True,
    }


@pytest.mark.parametrize(
    "layout",
    [strided, lambda x: x.T.contiguous().T, lambda x: torch.cat((x, x), -1)[:, 7:]],
    ids=["strided", "transposed", "part of a wider one"],
)
def test_an_op_meets_the_strides_it_is_given(layout):
    values = inputs(layout)
    given = draw(scaled_ref, values, ("x",), torch.bfloat16)
    assert given.inputs["x"].stride() == values["x"].stride()
    assert torch.equal(given.inputs["x"].detach(), values["x"].bfloat16())
    check(scaled_ref, torch.bfloat16, values)


@pytest.mark.parametrize("layout", [lambda x: x[:1].expand(3, 7), lambda x: x[:0]])
def test_expanded_and_empty_inputs_are_judged_too(layout):
    check(scaled_ref, values=inputs(layout))


def test_every_mode_gives_what_it_names():
    given = draw(scaled_ref, inputs(), ("x",), torch.float32)
    kinds = {mode: set(runner(scaled_ref, mode)(given)) for mode in MODES}
    assert kinds[BACKWARD] == {"value", "gradient"}
    assert kinds[JVP_BACKWARD] == kinds[BACKWARD] | kinds["jvp"]


def test_memory_is_poisoned_inside_and_only_there():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(9).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_compiled_op_is_held_to_the_eager_one():
    def op(x, weight):
        factor = 1.001 if torch.compiler.is_compiling() else 1.0
        return factor * x * weight.exp()

    check_compiled(lambda x, weight: x * weight.exp(), inputs(), ("x",), 7, "aot_eager")
    with pytest.raises(AssertionError, match="value 0: compiled differs"):
        check_compiled(op, inputs(), ("x",), 7, "aot_eager")
