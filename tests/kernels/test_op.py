from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.autograd import forward_ad

from mfmjt import kernels
from mfmjt.kernels import _backends, _dual, _eager, _native, _op
from tests import oracle


def test_split_and_join_are_inverse():
    x, x_dot = torch.randn(3), torch.randn(3)
    with forward_ad.dual_level():
        value, tangent = _dual.split(_dual.join(x, x_dot))
    assert torch.equal(value, x)
    assert torch.equal(tangent, x_dot)


def test_split_takes_the_tangent_off_the_tape():
    x_dot = torch.randn(3, requires_grad=True)
    with forward_ad.dual_level():
        value, tangent = _dual.split(
            forward_ad.make_dual(torch.randn(3, requires_grad=True), x_dot)
        )
    assert value.requires_grad
    assert not tangent.requires_grad


def test_split_without_forward_mode_returns_its_input():
    x = torch.randn(3)
    assert _dual.split(x) == (x, None)
    assert _dual.split(None) == (None, None)


def test_dual_numbers_without_func():
    x, x_dot = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    truth = torch.func.jvp(lambda x: kernels.adaln(x, x, x), (x,), (x_dot,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x_dot)
        found = forward_ad.unpack_dual(kernels.adaln(dual, dual, dual))
    assert torch.equal(found.primal, truth[0])
    assert torch.equal(found.tangent, truth[1])


def test_nested_forward_mode_is_refused():
    x = torch.randn(2, 3, 8)

    def first(y):
        return torch.func.jvp(lambda x: kernels.adaln(x, y, y), (x,), (x,))[1]

    with pytest.raises(NotImplementedError, match="nested forward-mode"):
        torch.func.jvp(first, (x,), (x,))
    with kernels.reference():
        assert torch.func.jvp(first, (x,), (x,))[1].shape == x.shape


def test_reference_runs_plain_pytorch_and_ends():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    with Watch():
        with kernels.reference(), kernels.reference():
            plain = kernels.swiglu(x, x)
        assert not any("mfmjt" in name for name in seen)
        ours = kernels.swiglu(x, x)
    assert "mfmjt.swiglu_fwd.default" in seen
    assert oracle.error(ours, plain) <= oracle.allowance(plain, x.dtype, terms=1)
    with _native.formulas():
        assert _backends.INTERPRETED or torch.equal(plain, kernels.swiglu(x, x))
    with pytest.raises(ZeroDivisionError), kernels.reference():
        raise ZeroDivisionError
    assert not _op.use_reference()


def test_tangent_returned_from_a_compiled_region_may_be_left_alone():
    """Its cotangent is zeros then, which must pass, while a real one must not."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def dual(x):
        return torch.func.jvp(lambda x: kernels.swiglu(x, x), (x,), (torch.ones_like(x),))

    torch.compiler.reset()
    x = torch.randn(3, 4, requires_grad=True)
    y, _ = dual(x)
    y.sum().backward()
    found, x.grad = x.grad, None
    kernels.swiglu(x, x).sum().backward()
    assert torch.equal(found, x.grad)
    if x.is_cuda:
        return  # what follows would end the use of the GPU
    y, y_dot = dual(x)
    with pytest.raises(RuntimeError, match="detach the tangent"):
        (y + y_dot).sum().backward()


def test_what_is_not_deterministic_may_run():
    """The mode that fills memory with NaN refuses it by default; gradients of padding on a GPU."""
    x = torch.zeros(3)
    x.put_(torch.tensor([1]), torch.ones(1))
    assert x.tolist() == [0, 1, 0]


def test_in_compiled_code_no_host_waits_to_refuse_a_gradient():
    """It is asked in every step there, and a CUDA graph cannot read a value."""

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def look(graph, _):
        asked.extend(n.args for n in graph.graph.nodes if "refuse_gradient" in str(n.target))
        return make_boxed_func(graph.forward)

    asked, seen = [], []

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    def dual(x):
        return torch.func.jvp(lambda x: kernels.swiglu(x, x), (x,), (torch.ones_like(x),))

    torch.compiler.reset()
    x = torch.randn(3, 4, requires_grad=True)
    dual(x)[0].sum().backward()
    assert [wait for _, _, wait in asked] == [False]
    with Names():
        assert torch.equal(_dual._refuse(x, torch.zeros_like(x), False), x)
    refusing = seen[: seen.index("clone")]
    assert "_assert_async" in refusing
    assert "_local_scalar_dense" not in refusing
    assert len(_dual._ARRIVED) < 256  # what a GPU prints


def test_import_is_light():
    """No compiler stack, no device is touched; Triton comes with PyTorch's FLOP counter."""
    code = (
        "import sys, mfmjt.kernels, torch; "
        "print([m for m in ('torch._inductor', 'torch._dynamo') if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare
    )
    assert done.stdout.strip() == "[] False"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_after_a_call_without_a_tangent(backend):
    """Dynamo keeps what it once read of a global: here, that no forward mode was on."""
    a, b, v = (torch.randn(2, 4) for _ in range(3))

    def step(a, b, v):
        return kernels.swiglu(a, b), *torch.func.jvp(lambda a: kernels.swiglu(a, b), (a,), (v,))

    torch.compiler.reset()
    for found, truth in zip(
        torch.compile(step, fullgraph=True, backend=backend)(a, b, v), step(a, b, v), strict=True
    ):
        assert oracle.error(found, truth) <= oracle.allowance(truth, a.dtype, terms=1)


# --- An op made here: y = weight x^power + bias, with a statistic x^power


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, power: float) -> tuple[Tensor, Tensor]:
    raised = x**power
    return weight * raised + (0 if bias is None else bias), raised


def _jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_dot: Tensor | None, power: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, raised = _fwd(x, weight, bias, power)
    return (
        y,
        torch.zeros_like(y) if x_dot is None else weight * power * x ** (power - 1) * x_dot,
        raised,
    )


def _bwd(
    y_bar: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raised: Tensor,
    power: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight, _ = needs
    return (
        y_bar * weight * power * x ** (power - 1) if of_x else x.new_empty(0),
        y_bar * raised if of_weight else x.new_empty(0),
        x.new_empty(0),  # that of the bias is y_bar
    )


POWER = _op.Op("test_power", _fwd, _jvp, _bwd, passes={"bias": "y"}, streams=True)
WAYS = ("eager", "library", "compiled")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A function that runs another as eager code, by the library ops, or compiled."""
    torch.compiler.reset()
    if request.param == "library":
        monkeypatch.setattr(_eager, "ENABLED", False)
    if request.param == "compiled":
        return lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    return lambda f: f


def numbers(*shape):
    return (torch.rand(*shape, dtype=torch.float64) + 0.5).requires_grad_()


def judged(way, run, truth, leaves, x_dots):
    """Compare value, tangent and gradients of `run` with PyTorch's own of `truth`."""
    flat = torch.utils._pytree.tree_leaves

    def both(function):
        def results(*leaves):
            def moving(*xs):
                return function(*xs, *leaves[len(xs) :])

            return torch.func.jvp(moving, leaves[: len(x_dots)], x_dots), function(*leaves)

        return results

    outcomes = []
    for results in (way(both(run)), both(truth)):
        (ys, y_dots), plain = results(*leaves)
        loss = sum(y.sin().sum() for y in flat(ys))
        found = torch.autograd.grad(loss, leaves)
        outcomes.append([*flat(ys), *flat(plain), *flat(y_dots), *found])
    for found, exact in zip(*outcomes, strict=True):
        assert oracle.error(found, exact) <= oracle.allowance(exact, torch.float64, terms=16)


def test_three_formulas_make_an_op(way):
    leaves = numbers(2, 3), numbers(2, 3), numbers(2, 3)

    def truth(x, weight, bias):
        return weight * x**3 + bias

    judged(way, lambda *given: POWER(*given, 3.0), truth, leaves, (torch.rand(2, 3).double(),))
    judged(
        way, lambda x, w, b: POWER(x, w, None, 3.0) + b, truth, leaves, (torch.rand(2, 3).double(),)
    )


def test_of_tuples_of_streams(way):
    leaves = numbers(2, 3), numbers(4), numbers(2, 3), numbers(4), numbers(2, 3), numbers(4)

    def ours(x, x_2, w, w_2, b, b_2):
        return POWER((x, x_2), (w, w_2), (b, b_2), 3.0)

    def truth(x, x_2, w, w_2, b, b_2):
        return w * x**3 + b, w_2 * x_2**3 + b_2

    dots = torch.rand(2, 3).double(), torch.rand(4).double()
    judged(way, ours, truth, leaves, dots)
    judged(way, ours, truth, leaves, dots[:1])  # one of two streams moves


def test_of_streams_one_of_which_lacks_an_input(way):
    leaves = numbers(2, 3), numbers(4), numbers(2, 3), numbers(4), numbers(2, 3)

    def ours(x, x_2, w, w_2, b):
        return POWER((x, x_2), (w, w_2), (b, None), 3.0)

    def truth(x, x_2, w, w_2, b):
        return w * x**3 + b, w_2 * x_2**3

    judged(way, ours, truth, leaves, (torch.rand(2, 3).double(), torch.rand(4).double()))


def test_what_an_op_refuses(way):
    x, w = numbers(3), numbers(3)
    run = way(lambda x, w: torch.func.jvp(lambda x: POWER(x, w, None, 3.0), (x,), (x.detach(),)))
    y, y_dot = run(x, w)
    with pytest.raises(RuntimeError, match="detach the tangent"):
        (y + y_dot).sum().backward()
    run = way(lambda x, w: torch.func.jvp(lambda w: POWER(x, w, None, 3.0), (w,), (w.detach(),)))
    with pytest.raises(Exception, match="does not propagate a tangent of its weight"):
        run(x, w)
    with pytest.raises(ValueError, match="test_power needs weight for each of 2 streams; got 1"):
        POWER((x, x), (w,), None, 3.0)


def test_library_ops_of_an_op():
    x, w, b = numbers(2, 3), numbers(2, 3), numbers(2, 3)
    torch.library.opcheck(POWER.fwd.library, (x, w, b, 3.0))
    torch.library.opcheck(POWER.over_streams.fwd.library, ([x, x], [w, b], [b, b], 3.0))
    schema = str(POWER.over_streams.jvp.library._schema)
    assert "Tensor[] x, Tensor[] weight, Tensor?[] bias, Tensor?[] x_dot, float power" in schema


def test_no_gradient_is_computed_in_vain(monkeypatch):
    asked = []
    monkeypatch.setattr(POWER.bwd, "_on_cpu", lambda *args: asked.append(args[-1]) or _bwd(*args))
    x, w = numbers(3), numbers(3)
    POWER(x, w.detach(), None, 3.0).sum().backward()
    POWER(x.detach(), w, None, 3.0).sum().backward()
    assert asked == [[True, False, False], [False, True, False]]
