"""Where an op steps out of functorch and of the dispatcher, and where it must not."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mfmjt import kernels
from mfmjt.kernels import _backends, _eager, _native
from tests import oracle


def rows():
    return torch.randn(2, 5, 8)


def heads():
    return torch.randn(2, 5, 2, 8)


ROPE = torch.randn(5, 4, 2)
# Inputs that move, inputs that do not, and the op of both.
OPS = {
    "adaln": ((rows, rows, rows), (), kernels.adaln),
    "gated_residual_adaln": ((rows,) * 5, (), kernels.gated_residual_adaln),
    "swiglu": ((rows, rows), (), kernels.swiglu),
    "qk_norm_rope": (
        (lambda: torch.randn(2, 5, 3, 2, 8),),
        (lambda: torch.randn(8), lambda: torch.randn(8), lambda: ROPE),
        kernels.qk_norm_rope,
    ),
    "linear": ((rows,), (lambda: torch.randn(6, 8), lambda: torch.randn(6)), kernels.linear),
    "conv1d": ((rows,), (lambda: torch.randn(6, 8, 3), lambda: torch.randn(6)), kernels.conv1d),
    "swiglu_product": (
        (rows,),
        (lambda: torch.randn(6, 8, 3), lambda: torch.randn(6, 8, 3)),
        kernels.swiglu_product,
    ),
    "snake": ((rows,), (lambda: torch.randn(5) / 3, lambda: torch.randn(5) / 3), kernels.snake),
    "joint_attention": ((heads,) * 3, (), kernels.joint_attention),
    "joint_attention of streams": (
        (heads,) * 4,
        (lambda: torch.tensor([3, 5]),),
        lambda q, k, m, v, n: kernels.joint_attention((q,), (k, m), (v, v), lengths=(n, None)),
    ),
}


@pytest.fixture(params=OPS)
def call(request):
    """An op, its moving inputs, their tangents, and its other inputs."""
    moving, still, op = OPS[request.param]
    xs, dots, others = ([make() for make in group] for group in (moving, moving, still))

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        y = op(*args, *others[len(args) - len(xs) :])
        return (y,) if isinstance(y, Tensor) else tuple(y)

    return run, tuple(xs), tuple(dots), others


@contextlib.contextmanager
def through_functorch():
    """Every call takes the library op, as where PyTorch lacks what is needed to step out."""
    before, _eager.ENABLED = _eager.ENABLED, False
    try:
        yield
    finally:
        _eager.ENABLED = before


@pytest.fixture
def below(monkeypatch):
    """For each call of an op, whether it took the shortcut."""
    seen = []
    real = _eager.run

    def watched(*args):
        results = real(*args)
        seen.append(results is not None)
        return results

    monkeypatch.setattr(_eager, "run", watched)
    return seen


def assert_same(found, truth):
    assert len(found) == len(truth)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
        assert torch.equal(a, a.clone())  # not only as the wrapper of something else


def flat(results):
    return [y for group in results for y in group]


@pytest.mark.parametrize(
    "context",
    [contextlib.nullcontext, torch.no_grad, torch.inference_mode],
    ids=lambda c: c.__name__,
)
def test_same_bits_as_through_functorch(call, context, below):
    run, xs, dots, _ = call
    with context():
        found = flat(torch.func.jvp(run, xs, dots))
        assert below
        assert all(below)
        with through_functorch():
            truth = flat(torch.func.jvp(run, xs, dots))
        assert not below[-1]
    assert_same(found, truth)
    assert all(y_dot.abs().max() > 0 for y_dot in found[len(found) // 2 :])


def test_same_gradients_as_through_functorch(call, below):
    run, xs, dots, others = call

    def gradients():
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        weights = [w.requires_grad_(w.is_floating_point() and w is not ROPE) for w in others]
        # Tangents on a tape of their own: nothing of it may be reached
        slopes = tuple(2 * dot.clone().requires_grad_() for dot in dots)
        ys, y_dots = torch.func.jvp(run, tuple(leaves), slopes)
        loss = sum(
            (y * (y + y_dot.detach()).sin()).sum() for y, y_dot in zip(ys, y_dots, strict=True)
        )
        wanted = [t for t in (*leaves, *weights) if t.requires_grad]
        found = torch.autograd.grad(loss, wanted)
        with pytest.raises(RuntimeError, match="detach the tangent"):
            sum(y_dot.sum() for y_dot in torch.func.jvp(run, tuple(leaves), slopes)[1]).backward()
        return [*(y.detach() for y in (*ys, *y_dots)), *found]

    found = gradients()
    assert all(below)
    with through_functorch():
        truth = gradients()
    assert_same(found, truth)


def test_same_bits_where_only_the_first_input_moves(call, below):
    run, (x, *xs), (x_dot, *_), others = call
    still = (*xs, *others)
    found = flat(torch.func.jvp(lambda x: run(x, *still), (x,), (x_dot,)))
    assert all(below)
    with through_functorch():
        assert_same(found, flat(torch.func.jvp(lambda x: run(x, *still), (x,), (x_dot,))))


def test_a_value_alone_within_forward_mode(call, below):
    """It is of functorch's level all the same, so that what follows may be in place."""
    run, xs, _, others = call
    weights = [w.requires_grad_(w.is_floating_point() and w is not ROPE) for w in others]
    leaves = [x.requires_grad_() for x in xs]

    def mixed(z):
        # of the level, but without a tangent; and not of the level
        for given in (tuple(x * 1 for x in xs), xs):
            ys = run(*given, *(w + 0 if w.is_floating_point() else w for w in others))
            z = z * ys[0].clone().mul_(2).sum() + ys[0].mul(z.sum()).sum()
        return z

    def everything():
        results = torch.func.jvp(mixed, (torch.ones(3),), (torch.ones(3),))
        wanted = [t for t in (*leaves, *weights) if t.requires_grad]
        return [*results, *torch.autograd.grad(results[0].sum(), wanted)]

    found = everything()
    assert all(below)
    with through_functorch():
        assert_same(found, everything())


def test_results_may_be_changed_in_place(below):
    a, b = rows(), rows()

    def run(x):
        y = kernels.swiglu(x, b)  # dual
        y.mul_(x)
        c = kernels.swiglu(a, b)  # not dual, and becomes it
        c.add_(x)
        return y[:, 1:].mul_(c[:, 1:]) + 1

    found = torch.func.jvp(run, (a,), (b,))
    assert below == [True, True]
    with kernels.reference():
        truth = torch.func.jvp(run, (a,), (b,))
    for y, y_ref in zip(found, truth, strict=True):
        assert oracle.error(y, y_ref) <= oracle.allowance(y_ref, y.dtype, terms=4)


def test_inputs_changed_in_place_and_views_of_them(below):
    a, b = rows(), rows()

    def run(x):
        x = x.clone()
        part = x[:, 1:]
        x.mul_(x.sin())  # the view's tangent with it
        return kernels.adaln(part, x[:, :1], part.transpose(0, 1).contiguous().transpose(0, 1))

    found = torch.func.jvp(run, (a,), (b,))
    assert all(below)
    with kernels.reference():
        truth = torch.func.jvp(run, (a,), (b,))
    for y, y_ref in zip(found, truth, strict=True):
        assert oracle.error(y, y_ref) <= oracle.allowance(y_ref, y.dtype, terms=64)


class Cube(torch.autograd.Function):
    """A rule of someone else's."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, y_bar):
        return 3 * ctx.saved_tensors[0] ** 2 * y_bar

    @staticmethod
    def jvp(ctx, x_dot):
        return 3 * ctx.saved_tensors[0] ** 2 * x_dot


def test_beside_a_rule_of_the_user_and_functions_of_pytorch(below):
    a, b, w = rows(), rows(), torch.randn(8, 8)

    def run(x, w):
        y = Cube.apply(torch.tanh(kernels.linear(Cube.apply(x), w)))
        y = kernels.swiglu(y, torch.nn.functional.layer_norm(y, (8,)))
        return kernels.adaln(y, x, y.mean(1, keepdim=True)).cos()

    def everything(dtype=torch.float32):
        x, weight = (t.to(dtype, copy=True).requires_grad_() for t in (a, w))
        y, y_dot = torch.func.jvp(lambda x: run(x, weight), (x,), (b.to(dtype),))
        return [y.detach(), y_dot.detach(), *torch.autograd.grad(y.sum(), (x, weight))]

    found = everything()
    assert below == [True] * 3
    with kernels.reference():
        theirs, truth = everything(), everything(torch.float64)
    for y, their, t in zip(found, theirs, truth, strict=True):
        rounding = oracle.allowance(t, torch.float32, terms=64)
        assert oracle.error(y, t) <= 2 * oracle.error(their, t) + rounding


def outcome(function):
    """Results, or what was raised."""
    try:
        results = function()
    except Exception as error:  # compared with another run's
        return type(error), str(error)
    return torch.utils._pytree.tree_leaves(results)


def vmap_of_jvp(run, xs, dots):
    return torch.vmap(lambda *d: torch.func.jvp(run, xs, d)[1])(
        *(torch.stack((d, 2 * d)) for d in dots)
    )


def jvp_of_vmap(run, xs, dots):
    wide = (tuple(t[None] for t in group) for group in (xs, dots))
    return torch.func.jvp(torch.vmap(run), *wide)


def grad_of_jvp(run, xs, dots):
    def loss(x):
        ys, _ = torch.func.jvp(run, (x, *xs[1:]), dots)
        return ys[0].square().sum()

    return torch.func.grad(loss)(xs[0])


def jvp_of_grad(run, xs, dots):
    grad = torch.func.grad(lambda x: run(x, *xs[1:])[0].square().sum())
    return torch.func.jvp(grad, xs[:1], dots[:1])


def nested(run, xs, dots):
    def inner(x):
        return torch.func.jvp(lambda x: run(x, *xs[1:])[0], (x,), dots[:1])[1]

    return torch.func.jvp(inner, xs[:1], dots[:1])


def jvp_of_functionalize(run, xs, dots):
    return torch.func.jvp(torch.func.functionalize(lambda *x: run(*x)[0]), xs, dots)


def linearized(run, xs, dots):
    ys, jvp = torch.func.linearize(run, *xs)
    return ys, jvp(*dots)


def without_functorch(run, xs, dots):
    with forward_ad.dual_level():
        ys = run(*(forward_ad.make_dual(x, dot) for x, dot in zip(xs, dots, strict=True)))
        return [t for y in ys for t in forward_ad.unpack_dual(y)]


def tangents_switched_off(run, xs, dots):
    def still(*x):
        with forward_ad._set_fwd_grad_enabled(False):
            return run(*x)

    return torch.func.jvp(still, xs, dots)


OTHERS = (
    vmap_of_jvp,
    jvp_of_vmap,
    grad_of_jvp,
    jvp_of_grad,
    nested,
    jvp_of_functionalize,
    linearized,
    without_functorch,
    tangents_switched_off,
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what PyTorch has no batching rule for is slow
@pytest.mark.parametrize("transform", OTHERS, ids=lambda f: f.__name__)
def test_other_transforms_give_what_they_gave(call, transform, below):
    run, xs, dots, _ = call
    found = outcome(lambda: transform(run, xs, dots))
    if transform not in (without_functorch, tangents_switched_off):
        assert not any(below[transform is linearized :])  # which takes the value by itself first
    with through_functorch():
        truth = outcome(lambda: transform(run, xs, dots))
    assert len(found) == len(truth)
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    torch.func.jvp(run, xs, dots)  # nothing was left open
    assert torch._C._functorch.maybe_current_level() is None


class Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Mode, FunctionMode])
def test_modes_see_every_op(mode, below):
    a, b = rows(), rows()
    with mode() as watch:
        kernels.swiglu(a, b)
        torch.func.jvp(lambda x: kernels.swiglu(x, b), (a,), (b,))
    assert below == [False, False]
    for part in ("fwd", "jvp"):
        assert [name for name in watch.seen if name == f"mfmjt.swiglu_{part}.default"]


def test_fake_tensors(call, below):
    run, xs, dots, others = call
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        xs, dots = (tuple(map(mode.from_tensor, group)) for group in (xs, dots))
        others[:] = map(mode.from_tensor, others)
        for y in (*run(*xs), *flat(torch.func.jvp(run, xs, dots))):
            assert type(y) is type(xs[0])
    for y in flat(torch.func.jvp(run, xs, dots)):  # the mode closed
        assert type(y) is type(xs[0])
    assert not any(below)


class Loud(torch.Tensor):
    """A subclass that follows PyTorch's functions."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_are_asked(below):
    Loud.seen.clear()
    a, b = rows(), rows().as_subclass(Loud)
    y = kernels.swiglu(a, b)
    assert "mfmjt.swiglu_fwd.default" in Loud.seen
    assert type(y) is Loud
    _, y_dot = torch.func.jvp(lambda x: kernels.swiglu(x, b), (a,), (a,))
    assert below == [False, False]
    assert "mfmjt.swiglu_jvp.default" in Loud.seen
    _, truth = torch.func.jvp(lambda x: kernels.swiglu(x, b.as_subclass(Tensor)), (a,), (a,))
    assert torch.equal(y_dot.as_subclass(Tensor), truth)


def test_parameters_are_plain(below):
    a, w = rows(), torch.nn.Parameter(torch.randn(6, 8))
    y, _ = torch.func.jvp(lambda x: kernels.linear(x, w), (a,), (a,))
    assert below == [True]
    assert torch.autograd.grad(y.sum(), w)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", oracle.DTYPES[2:])  # 16 bits
def test_autocast(call, dtype, below):
    run, xs, dots, others = call
    others[:] = [
        w.requires_grad_() if w.is_floating_point() and w is not ROPE else w for w in others
    ]

    def everything():
        leaves = tuple(x.clone().requires_grad_() for x in xs)
        with torch.autocast("cpu", dtype):
            ys, y_dots = torch.func.jvp(run, leaves, dots)
        return [*ys, *y_dots, *torch.autograd.grad(ys[0].float().square().sum(), leaves[:1])]

    found = everything()
    assert all(below)
    with through_functorch():
        assert_same([t.detach() for t in found], [t.detach() for t in everything()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, below):
    a, b, w = rows(), rows(), torch.randn(8, 8)

    def block(x, weight):
        def inner(z):
            y = kernels.swiglu(kernels.linear(z, weight), kernels.adaln(z, b, b))
            return kernels.gated_residual_adaln(z, y, b, b, b)[1]

        y, y_dot = torch.func.jvp(inner, (x,), (b,))
        return y, y_dot.detach()

    def gradients(call):
        leaves = a.clone().requires_grad_(), w.clone().requires_grad_()
        y, y_dot = call(*leaves)
        return [y.detach(), y_dot, *torch.autograd.grad((y * y_dot).sum(), leaves)]

    if reentrant:  # its backward is called in another place
        leaves = a.clone().requires_grad_(), w.clone().requires_grad_()
        y, y_dot = checkpoint(block, *leaves, use_reentrant=True)
        (y * y_dot).sum().backward()
        found = [y.detach(), y_dot.detach(), *(leaf.grad for leaf in leaves)]
    else:
        found = gradients(lambda *leaves: checkpoint(block, *leaves, use_reentrant=False))
    assert len(below) > 4  # again in the backward pass
    assert all(below)
    with through_functorch():
        assert_same(found, gradients(block))


def test_an_error_leaves_the_level_open(below):
    q, dot = heads(), heads()

    def run(x):
        with pytest.raises(ValueError, match="q, k, v, and a mask that is added, of one dtype"):
            kernels.joint_attention(x, x.double(), x)
        assert torch._C._functorch.maybe_current_level() == 1
        with pytest.raises(NotImplementedError, match="tangent of its weight"):
            kernels.linear(x, x[0, 0])
        return kernels.joint_attention(x.sin(), x, x).cos()

    found = torch.func.jvp(run, (q,), (dot,))
    assert torch._C._functorch.maybe_current_level() is None
    assert below == [True]
    truth = torch.func.jvp(lambda x: kernels.joint_attention(x.sin(), x, x).cos(), (q,), (dot,))
    assert_same(found, truth)


def test_tensors_of_a_finished_transform(below):
    """They have a tape that they do not show."""
    kept = []
    b = rows()

    def run(x):
        kept.append(x * 1)
        return x.sin()

    x = rows().requires_grad_()
    torch.func.jvp(run, (x,), (b,))
    (dead,) = kept
    assert not dead.requires_grad
    truth = torch.autograd.grad(kernels.swiglu(x, b).sum(), x)[0]
    y = kernels.swiglu(dead, b)
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], truth)
    y, y_dot = torch.func.jvp(lambda z: kernels.swiglu(dead, z), (b,), (b,))
    assert below == [True, False, False]  # that of x and b first
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], truth)
    assert torch.equal(y_dot, y)  # linear in what moves


def test_tangents_that_are_known_to_be_zero(call, below):
    run, xs, _, _ = call
    zeros = tuple(torch._efficientzerotensor(x.shape) for x in xs)
    found = flat(torch.func.jvp(run, xs, zeros))
    assert all(below)
    with through_functorch():
        assert_same(found, flat(torch.func.jvp(run, xs, zeros)))


def test_another_thread_in_forward_mode():
    """PyTorch counts levels for all threads together, and keeps transforms for each."""
    a, b = rows(), rows()
    y, y_dot = torch.func.jvp(lambda x: kernels.swiglu(x, b), (a,), (b,))
    inside, done = threading.Event(), threading.Event()
    found = []

    def other():
        def run(x):
            inside.set()
            assert done.wait(60)
            return kernels.swiglu(x, b)

        found.extend(torch.func.jvp(run, (a,), (b,)))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    value = kernels.swiglu(a, b)
    done.set()
    thread.join(60)
    assert_same([value, *found], [y, y, y_dot])


def test_traced(below):
    a, b = rows(), rows()

    def run(x, b):
        return torch.func.jvp(lambda x: kernels.swiglu(x, b), (x,), (b,))

    graph = torch.fx.experimental.proxy_tensor.make_fx(run)(a, b)
    assert below == [False]
    assert any("swiglu_jvp" in str(node.target) for node in graph.graph.nodes)
    other, dot = rows(), rows()
    assert_same(graph(other, dot), run(other, dot))


# --- Outside of forward mode


@pytest.mark.parametrize(
    "name", ["adaln", "gated_residual_adaln", "swiglu", "qk_norm_rope", "snake", "joint_attention"]
)
def test_values_and_gradients_are_those_of_the_library_op(name, below):
    moving, still, op = OPS[name]
    given = [make() for make in (*moving, *still)]

    def results(wanted=()):
        ys = op(*given)
        ys = (ys,) if isinstance(ys, Tensor) else ys
        assert [y.requires_grad for y in ys] == [bool(wanted)] * len(ys)
        # One result may have no gradient, and a second pass may follow
        loss = ys[-1].sin().sum()
        for _ in wanted[:2]:
            ys = (*ys, *torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))
        return [y.detach() for y in ys if y is not None]

    def both_ways(wanted=()):
        below.clear()
        found = results(wanted)
        assert all(below)
        with through_functorch():
            below.clear()
            assert_same(found, results(wanted))
        assert not any(below)
        return found

    value = both_ways()
    leaves = [t for t in given if t is not ROPE]
    for wanted in (leaves, leaves[:1], leaves[-1:]):
        for leaf in wanted:
            leaf.requires_grad_()
        assert_same(both_ways(wanted)[: len(value)], value)
        with torch.no_grad():
            assert_same(both_ways(), value)
        with torch.inference_mode():
            y = op(*given)
            assert (y if isinstance(y, Tensor) else y[0]).is_inference()
        for leaf in wanted:
            leaf.requires_grad_(False)


FRAMES = 8  # functions of ours on the way to a kernel


@pytest.mark.skipif("missing" in _native.status(), reason=_native.status().get("missing", ""))
def test_few_frames_lie_before_the_kernel():
    if _backends.ON_CPU or rows().is_cuda:
        pytest.skip("counted on the way to a C++ kernel")
    package = os.path.dirname(kernels.__file__)
    seen: list[str] = []

    def profile(frame, event, _):
        code = frame.f_code
        if event != "call" or "kernel" in seen:
            return
        if code.co_filename == torch._ops.__file__ and code.co_name == "__call__":
            seen.append("kernel")
        elif code.co_filename.startswith(package) and "<" not in code.co_name:
            seen.append(code.co_name)

    def call(x):
        sys.setprofile(profile)
        y = kernels.adaln(x, shift, scale)
        sys.setprofile(None)
        return y

    x, shift, scale = rows(), rows(), rows()
    with torch.overrides._pop_mode_temporarily():  # the device of these tests
        torch.func.jvp(call, (x,), (x,))
    assert seen[-1] == "kernel"
    assert len(seen) - 1 <= FRAMES, "\n".join(seen)


def test_a_second_derivative_is_refused_as_by_the_op():
    def second():
        x = rows().requires_grad_()
        slope = torch.autograd.grad(kernels.swiglu(x, x).sum(), x, create_graph=True)[0]
        return [torch.autograd.grad(slope.sum(), x)[0]]

    found = outcome(second)
    with through_functorch():
        assert found == outcome(second)
    assert found[0] is RuntimeError


def test_what_is_refused_is_refused_by_the_op():
    a = rows()
    with pytest.raises(ValueError, match="dense and real; got sparse_coo"):
        kernels.swiglu(a.to_sparse(), a.to_sparse())
    with pytest.raises(ValueError, match="got meta"):
        kernels.adaln(a, a.to("meta"), a)


# --- Compiled and exported


class _Adaln(torch.nn.Module):
    def forward(self, x, shift, scale):
        return kernels.adaln(x, shift, scale)


def test_what_is_exported_names_the_op():
    """It may be run on another machine."""
    given = (rows(), rows(), rows())
    with torch.no_grad():
        program = torch.export.export(_Adaln(), given)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "mfmjt.adaln_fwd.default" in targets
    assert torch.equal(program.module()(*given), kernels.adaln(*given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_sizes_left_open(backend):
    torch.compiler.reset()
    op = torch.compile(kernels.gated_residual_adaln, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 7, 1):
            given = [torch.randn(2, tokens, 8) for _ in range(5)]
            assert_same(op(*given), kernels.gated_residual_adaln(*given))


def test_a_tangent_of_another_shape_is_refused():
    x = rows()
    with pytest.raises(ValueError, match="shift_dot of the shape of shift"):
        torch.ops.mfmjt.adaln_jvp(x, x, x, x, x[:, :1], x, 1e-6, None)
