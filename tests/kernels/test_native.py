"""The C++ kernels: the same judge as their formulas, on every instruction set; bad arguments."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfmjt import kernels
from mfmjt.kernels import _native
from tests import oracle
from tests.kernels.inputs import inputs, moving
from tests.kernels.native import NAMES, arguments, kernel
from tests.oracle import strided

WAYS = ("formulas", "portable", "avx2", "avx512")
BUILT = "missing" not in _native.status()
needs_extension = pytest.mark.skipif(not BUILT, reason=_native.status().get("missing", ""))


@pytest.fixture(params=WAYS)
def way(request):
    """Run a test with PyTorch's formulas, then with the C++ kernels of each instruction set."""
    if request.param == "formulas":
        with _native.formulas():
            yield request.param
        return
    if not BUILT:
        pytest.skip(_native.status()["missing"])
    extension = importlib.import_module("mfmjt._C")
    best = extension.build_info()["used"]
    if WAYS.index(request.param) > WAYS.index(best):
        pytest.skip(f"{request.param} is beyond this CPU, or beyond what --avx2 allows")
    extension.limit_isa(request.param)
    yield request.param
    extension.limit_isa(best)


def reference_of(op):
    return getattr(importlib.import_module(f"mfmjt.kernels.{op}"), f"{op}_ref")


# Whole vectors of every width, an odd width, one channel, one token, more than one chunk of a sum
# over tokens.
SIZES = [(2, 3, 32), (1, 1, 7), (2, 70, 21), (1, 2, 133), (1, 130, 2), (2, 3, 1)]
DTYPES = (torch.float32, torch.bfloat16)


def judge(op, given, dtype, terms, moves=None):
    """Hold an op to its reference in all modes; inputs of float64 have gradients, others are fixed.

    Args:
        op: Name of the op.
        given: Its inputs in float64.
        dtype: What it is run in.
        terms: Length of the longest sum.
        moves: Inputs with a tangent, if they are not all that may have one.
    """
    values = {k: x for k, x in given.items() if getattr(x, "dtype", None) == torch.float64}
    fixed = {k: x for k, x in given.items() if k not in values}
    function = functools.partial(getattr(kernels, op), **fixed)
    reference = functools.partial(reference_of(op), **fixed)
    moves = moving(op) if moves is None else moves
    oracle.check_op(function, reference, values, moves, dtype, terms)


def wide(op, *args, **options):
    return inputs(op, *args, dtype=torch.float64, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln"])
def test_norms(way, op, size, rows, dtype):
    judge(op, wide(op, size, rows), dtype, size[1] * size[2])


@pytest.mark.parametrize("far", ["x", "x_dot", "first", "last"])
@pytest.mark.parametrize("width", [21, 133, 448])
def test_norms_of_what_is_far_from_zero(way, width, far):
    """A large offset, and outliers where the centre of the sums is taken and where it is not."""
    if way == "formulas" and far == "x_dot":
        pytest.skip("a large offset of a tangent costs the formula digits")
    given = arguments("adaln_jvp", (1, 3, width), rows=None)
    some = {"first": slice(32), "last": slice(width - 5, None)}.get(far, slice(None))
    given["x_dot" if far == "x_dot" else "x"][..., some] += 1000
    wide = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in given.items()}
    plain = torch.func.jvp(*_modulated_norm(given))
    truth = torch.func.jvp(*_modulated_norm(wide))
    found = torch.ops.mfmjt.adaln_jvp(*given.values())
    for y, near, exact in zip(found, plain, truth, strict=False):
        limit = 2 * oracle.error(near, exact) + oracle.allowance(exact, y.dtype, terms=width)
        assert oracle.error(y, exact) <= limit


def _modulated_norm(given):
    x, shift, scale, x_dot, shift_dot, scale_dot, eps, _ = given.values()

    def function(x, shift, scale):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    return function, (x, shift, scale), (x_dot, shift_dot, scale_dot)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("size", "heads"), [((2, 3, 64), 2), ((1, 70, 80), 1), ((1, 1, 2), 3)])
def test_qk_norm_rope(way, size, heads, rotate, dtype):
    given = wide("qk_norm_rope", size, heads=heads)
    given |= {} if rotate else {"rope": None}
    judge("qk_norm_rope", given, dtype, heads * size[1] * size[2], moves=("qkv",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moves", [("gate",), ("up",), ("gate", "up")])
@pytest.mark.parametrize("layout", [lambda x: x, strided])
def test_swiglu(way, moves, layout, dtype):
    given = {name: layout(x) for name, x in wide("swiglu", (3, 5, 37)).items()}
    judge("swiglu", given, dtype, 1, moves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moves", [("q", "k", "v"), ("q",), ("v",)])
@pytest.mark.parametrize(("size", "heads"), [((2, 3, 8), 2), ((1, 131, 16), 1), ((3, 1, 4), 1)])
def test_joint_attention(way, size, heads, moves, dtype):
    keys = size[1] + 2
    lengths = torch.tensor([keys, 1, 0][: size[0]])
    mask = torch.rand(size[1], keys) < 0.7
    mask[0] = False
    for hides in ({"lengths": None}, {}, {"mask": mask}, {"causal": True}):
        given = wide("joint_attention", size, heads=heads) | {"lengths": lengths} | hides
        judge("joint_attention", given, dtype, keys, moves)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_what_is_no_number(way, dtype):
    """NaN and infinite scores, in whole vectors and in what is left over."""
    for position in (3, 66):
        for bad in (torch.nan, torch.inf, -torch.inf):
            s = torch.randn(1, 2, 67).to(dtype)
            s[0, 0, position] = bad
            truth, p = s.double().softmax(-1), s.clone()
            torch.ops.mfmjt_cpu.joint_attention_softmax(p, None, None, 1.0)
            assert torch.equal(p.isnan(), truth.isnan())
            limit = oracle.allowance(truth[:, 1], dtype, terms=67)
            assert oracle.error(p.nan_to_num(), truth.nan_to_num()) <= limit


@needs_extension
def test_one_exponential_serves_softmax_and_sigmoid(way):
    """Its polynomial's error, that of rounding r, and the roundings of what is made of it."""
    of_rounding = 6e-8 if way == "portable" else 2e-9  # without a fused multiply-add, and with it
    x = torch.linspace(-87, 87, 4002)
    truth = x.double().sigmoid()
    limit = (1e-7 + of_rounding * x.abs() + 4 * torch.finfo(x.dtype).eps) * truth
    scores = torch.stack((torch.zeros_like(x), x), -1)[None]
    torch.ops.mfmjt_cpu.joint_attention_softmax(scores, None, None, 1.0)
    sigmoid = kernels.swiglu(x, torch.ones_like(x)) / x
    for result in (scores[0, :, 1], sigmoid):
        assert ((result.double() - truth).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", [87.0, 88.2, 89.0, 104.0, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("sign", [1, -1])
def test_swiglu_far_from_zero(way, sign, far, dtype):
    """Where the exponential ends: whole vectors and what is left over, and NaN stays NaN."""
    gate = torch.full((67,), sign * far).to(dtype)
    ones = torch.ones_like(gate)
    y, y_dot = torch.func.jvp(kernels.swiglu, (gate, ones), (ones, ones))
    wide = gate.double(), ones.double()
    truth, truth_dot = torch.func.jvp(reference_of("swiglu"), wide, (wide[1], wide[1]))
    if not gate.isfinite().all():
        assert torch.equal(y.isnan(), truth.isnan())
        assert y.isnan().all() or torch.equal(y.double(), truth)
        return
    # A sigmoid below the smallest normal number may be zero
    lost = min(far, 104.0) * torch.finfo(torch.float32).tiny
    for result, expected in ((y, truth), (y_dot, truth_dot)):
        limit = oracle.allowance(expected, dtype, terms=1) + lost
        assert oracle.error(result, expected) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 3, 1), (1, 2, 2), (2, 1, 1030), (1, 1, 4094), (1, 2, 8210)])
def test_snake(way, size, dtype):
    judge("snake", wide("snake", size), dtype, 24, moves=())


@pytest.mark.parametrize("stretches", [0, 1])
def test_snake_of_every_length_modulo_its_vectors(way, stretches):
    """Ends fall on each lane of a vector, and on each of a vector that begins a stretch."""
    for samples in range(1, 40):
        given = wide("snake", (1, 2, 4096 * stretches + samples))
        judge("snake", given, torch.float32, 24, moves=())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_formula(dtype):
    x = torch.randn(2, 3, 8).to(dtype)
    with _native.formulas():
        truth = kernels.adaln(x, x, x)
    assert torch.equal(kernels.adaln(x, x, x), truth)


@needs_extension
def test_far_from_zero_the_sine_stays_a_sine():
    """Phases whose rounding error is many turns: any value of sin^2 will do, but only such."""
    x = torch.tensor([1e6, 1e9, 1e20, -1e30]).view(1, 1, 4)
    y = kernels.snake(x, torch.zeros(1), torch.zeros(1))
    with kernels.reference():
        assert oracle.error(y, kernels.snake(x, torch.zeros(1), torch.zeros(1))) <= (
            oracle.allowance(x, x.dtype, terms=24) + 1
        )
    for bad in (torch.nan, torch.inf):
        assert (
            kernels.snake(torch.full((1, 1, 40), bad), torch.zeros(1), torch.zeros(1)).isnan().all()
        )


@needs_extension
def test_threads_make_no_difference():
    x = torch.randn(4, 300, 96)
    bars = torch.randn_like(x)

    def everything():
        y, mean, rstd = torch.ops.mfmjt.adaln_fwd(x, x[:, :1], x[:, :1], 1e-6, None)
        grads = torch.ops.mfmjt.adaln_bwd(bars, x, x[:, :1], x[:, :1], mean, rstd, None)
        some = x[:, :200]
        grads += torch.ops.mfmjt.adaln_bwd(bars, x, some, some, mean, rstd, torch.arange(300) % 200)
        wave = torch.ops.mfmjt.snake_fwd(x, torch.zeros(300), torch.zeros(300))
        odd = x.bfloat16()[:, :, :95]
        dual = torch.ops.mfmjt.swiglu_jvp(odd, odd, odd, odd)
        return (y, *grads, wave, torch.ops.mfmjt.swiglu_fwd(x, bars), *dual)

    one = everything()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


DAMAGE = {
    "dtype": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "rank": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "size": lambda t: torch.cat((t, t), -1),
    "device": lambda t: t.to("meta"),
}

FREE = {("conv1d_toom", "x"), ("snake_fwd", "x")}  # any number of samples will do
ANY_DTYPE = {"mean", "rstd", "q_rstd", "k_rstd", "lse", "alpha", "beta"}  # not that of the others


# Those that this CPU runs, and `--avx2` allows.
PAIRS = torch.cpu._is_avx512_bf16_supported() and _native.status().get("used") == "avx512"
RUN = [n for n in NAMES if "rows" not in n or PAIRS]


@needs_extension
@pytest.mark.parametrize("name", [name for name in NAMES if "adaln" in name])
@pytest.mark.parametrize("rows", [[0, 1, 4, 0, 0], [0, -1, 0, 0, 0], [0], [[0] * 5], [0.0] * 5])
def test_bad_rows_raise_and_are_named(name, rows):
    given = arguments(name, (2, 5, 8), 4)
    kernel(name)(**given)
    with pytest.raises(RuntimeError, match="rows must"):
        kernel(name)(**{**given, "rows": torch.tensor(rows)})
    with pytest.raises(RuntimeError, match="whose rows are picked"):
        kernel(name)(**{**given, "shift": given["shift"][:, :3]})


@needs_extension
@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_argument_raises_and_is_named(name, damage):
    given = arguments(name)
    kernel(name)(**given)
    tensors = [key for key, value in given.items() if isinstance(value, torch.Tensor)]
    leaders = {"x", "total", "qkv", "gate", "s", "q"}  # to whose shape others are held
    for key in tensors:
        if damage == "size" and (name, key) in FREE:
            continue
        if damage == "dtype" and key in {
            "mean",
            "rstd",
            "q_rstd",
            "k_rstd",
            "lse",
            "alpha",
            "beta",
        }:
            match = key
        elif damage == "device":
            match = "mfmjt_cpu|Meta|meta"
        else:
            match = r"\w+ (is|must)" if key in leaders else key
        with pytest.raises((RuntimeError, NotImplementedError, ValueError), match=match):
            kernel(name)(**{**given, key: DAMAGE[damage](given[key])})


@needs_extension
@pytest.mark.parametrize("name", NAMES)
def test_sizes_beyond_memory_raise(name):
    given = arguments(name)
    for key, value in given.items():
        if isinstance(value, torch.Tensor):
            huge = torch.zeros(()).expand((2**20,) * value.ndim if value.ndim < 4 else (2**12,) * 5)
            with pytest.raises((RuntimeError, MemoryError)):
                kernel(name)(**{**given, key: huge})


@needs_extension
@pytest.mark.parametrize("dilation", [0, -1, 2**40, 2**62])
def test_dilations_that_make_no_sense(dilation):
    with pytest.raises(RuntimeError, match="dilation"):
        kernel("conv1d_toom")(**{**arguments("conv1d_toom"), "dilation": dilation})


@st.composite
def any_tensor(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    x = torch.ones(shape, dtype=dtype)
    if draw(st.booleans()) and x.ndim > 1:
        x = x.transpose(0, -1)
    return x if draw(st.booleans()) else x.expand(draw(st.integers(1, 3)), *x.shape)


@needs_extension
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.sampled_from(NAMES), st.data())
def test_any_arguments_give_a_result_or_an_exception(name, data):
    given = arguments(name)
    for key, value in given.items():
        if isinstance(value, torch.Tensor) and data.draw(st.booleans()):
            given[key] = data.draw(any_tensor())
    try:
        results = kernel(name)(**given)
    except RuntimeError:
        return
    results = results if isinstance(results, tuple) else (results,)
    assert all(isinstance(r, torch.Tensor) for r in results)


def test_status_says_what_runs_or_why_not():
    status = _native.status()
    assert set(status) in ({"missing"}, {"compiler", "cpu", "used", "ops"})


@needs_extension
def test_an_extension_of_older_sources_says_so():
    with pytest.raises(ImportError, match=r"of_tomorrow.*older sources"):
        _native.op("of_tomorrow", required=True)
