"""`conv1d(fast=True)`: Toom and Cook's method, held to the bound that its matrices give."""

from __future__ import annotations

import importlib
from fractions import Fraction

import pytest
import torch

from mfmjt.kernels import _native, conv1d, reference
from mfmjt.kernels.conv1d import conv1d_ref
from tests import oracle
from tests.oracle import error

POINTS = [Fraction(*p) for p in ((0, 1), (1, 1), (-1, 1), (1, 2), (-1, 2), (2, 1))]  # and infinity
TILE = 4
BUILT = _native.status().get("cpu", "portable") != "portable"
pytestmark = pytest.mark.skipif(not BUILT, reason="no C++ kernel for this CPU")

WAYS = ("portable", "avx2", "avx512")


@pytest.fixture(params=WAYS[1:])
def way(request):
    """A test on each instruction set."""
    extension = importlib.import_module("mfmjt._C")
    best = extension.build_info()["used"]
    if WAYS.index(request.param) > WAYS.index(best):
        pytest.skip(f"{request.param} is beyond this CPU, or beyond what --avx2 allows")
    extension.limit_isa(request.param)
    yield request.param
    extension.limit_isa(best)


def product(factors):
    """Coefficients of the product of the polynomials x - f, lowest first."""
    result = [Fraction(1)]
    for f in factors:
        shifted, scaled = [Fraction(0), *result], [*(-f * c for c in result), Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


def matrices():
    """A (outputs, points), G (points, taps) and B (points, inputs) from their definition."""
    degree = len(POINTS)
    a = [[p**r for p in POINTS] + [Fraction(int(r == TILE - 1))] for r in range(TILE)]
    g, b = [], []
    for p in POINTS:
        others = [q for q in POINTS if q != p]
        lagrange = product(others)
        at_p = sum(c * p**i for i, c in enumerate(lagrange))
        g.append([p**j / at_p for j in range(TILE)])
        b.append([*lagrange, Fraction(0)])
    g.append([Fraction(int(j == TILE - 1)) for j in range(TILE)])
    b.append(product(POINTS))
    assert len(b[-1]) == degree + 1
    return tuple(
        torch.tensor([[float(c) for c in row] for row in m], dtype=torch.float64) for m in (a, g, b)
    )


def flow(x, weight, dilation):
    """R: what is added and taken away on the way to an output, all counted as positive.

    B goes through t[j] = x[j + 1] - 2 x[j], whose terms partly cancel in B itself.
    """
    a, g, _ = (m.abs() for m in matrices())
    taps, samples = weight.shape[2], x.shape[2]
    segments = -(-taps // TILE)
    tiles = -(-samples // (TILE * dilation))
    needed = TILE * dilation * (tiles + segments)
    pad = taps // 2 * dilation
    x = torch.nn.functional.pad(x.abs(), (pad, needed - samples - pad))
    # (B, C, tiles + segments, TILE, dilation) to (B, C, phase, sample of the phase)
    x = x.reshape(*x.shape[:2], -1, dilation).transpose(2, 3)
    t = x[..., 1:] + 2 * x[..., :-1]
    t = torch.nn.functional.pad(t, (0, 8)).unfold(3, 6, TILE)[:, :, :, : tiles + segments - 1]
    far = torch.nn.functional.pad(x, (0, 8))[..., 1:].unfold(3, 5, TILE)
    far = far[:, :, :, : tiles + segments - 1, ::2] @ torch.tensor([0.25, 1.25, 1]).double()
    rows = torch.tensor(
        [
            [0.25, 0, 1.25, 0, 1, 0],
            *2 * [[0, 0.25, 0.25, 1, 1, 0]],
            *2 * [[0, 0.5, 1, 0.5, 1, 0]],
            [0, 0.25, 0, 1.25, 0, 1],
        ]
    ).double()
    v = t @ rows.T
    v = torch.cat((v[..., :5], far[..., None], v[..., 5:]), -1)
    weight = torch.nn.functional.pad(weight.abs(), (0, TILE * segments - taps))
    u = weight.reshape(*weight.shape[:2], segments, TILE) @ g.T
    m = sum(
        torch.einsum("ocp,bcftp->boftp", u[:, :, s], v[:, :, :, s : s + tiles])
        for s in range(segments)
    )
    y = m @ a.T  # (B, O, phase, tile, sample of a tile)
    return y.permute(0, 1, 3, 4, 2).reshape(*y.shape[:2], -1)[..., :samples]


def test_the_matrices_convolve():
    a, g, b = matrices()
    x, w = oracle.randn(2 * TILE - 1), oracle.randn(TILE)
    truth = torch.stack([(x[i : i + TILE] * w).sum() for i in range(TILE)])
    assert error(a @ ((g @ w) * (b @ x)), truth) <= oracle.allowance(truth, x.dtype, terms=200)


SIZES = {
    "a tile": (1, 16, 16, 4),
    "one sample": (2, 16, 24, 1),
    "odd": (2, 17, 19, 333),
    "several blocks": (1, 24, 24, 1700),
    "groups of outputs": (1, 24, 100, 500),
    "many channels": (1, 260, 70, 301),
    "many channels in blocks": (2, 800, 16, 2100),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("taps", "dilation"), [(3, 1), (7, 3), (11, 5), (15, 2), (1, 1), (5, 4)])
def test_errs_no_more_than_its_matrices_allow(way, size, taps, dilation):
    batch, channels, outs, samples = SIZES[size]
    x, bias = torch.randn(batch, channels, samples), torch.randn(outs)
    weight = torch.randn(outs, channels, taps)
    result = torch.ops.mfmjt_cpu.conv1d_toom(x, weight, bias, dilation)
    exact = [t.double() for t in (x.transpose(1, 2), weight, bias)]
    truth = conv1d_ref(*exact, dilation).transpose(1, 2)
    terms = channels * -(-taps // TILE) + 13
    limit = (
        terms
        * torch.finfo(x.dtype).eps
        * (flow(exact[0].mT, exact[1], dilation) + bias.abs().max())
    )
    assert ((result - truth).abs() <= limit).all()


@pytest.mark.parametrize("taps", [3, 7, 11])
def test_errs_as_much_more_than_pytorch_as_was_reckoned(way, taps):
    x, weight = torch.randn(1, 96, 4000), torch.randn(96, 96, taps)
    truth = conv1d_ref(x.double().mT, weight.double()).mT

    def rounding(y):
        return (y - truth).square().mean().sqrt()

    a, g, b = (m.square() for m in matrices())
    growth = float((a @ (g.sum(1) * b.sum(1)) / TILE).mean().sqrt())
    fast = rounding(torch.ops.mfmjt_cpu.conv1d_toom(x, weight, None, 1))
    assert fast <= 2 * growth * rounding(conv1d_ref(x.mT, weight).mT)


def vocoder_like(samples=2**12, channels=16):
    x, weight = torch.randn(1, channels, samples), torch.randn(channels, channels, 7)
    return x.transpose(1, 2), weight


def test_is_chosen_by_its_keyword_alone():
    x, weight = vocoder_like()
    fast = torch.ops.mfmjt_cpu.conv1d_toom(x.transpose(1, 2), weight, None, 3).transpose(1, 2)
    assert torch.equal(conv1d(x, weight, None, 3, fast=True), fast)
    direct = conv1d(x, weight, None, 3)
    assert not torch.equal(direct, fast)
    assert torch.equal(conv1d(x.contiguous(), weight, None, 3, fast=True), fast)
    with reference():
        assert torch.equal(conv1d(x, weight, None, 3, fast=True), conv1d_ref(x, weight, None, 3))


def test_is_left_out_where_it_does_not_pay_or_fit():
    for samples, channels in ((2**12, 8), (500, 160)):
        x, weight = vocoder_like(samples, channels)
        assert torch.equal(conv1d(x, weight, fast=True), conv1d(x, weight))
    x, weight = vocoder_like()
    low = x.bfloat16(), weight.bfloat16()
    assert torch.equal(conv1d(*low, fast=True), conv1d(*low))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv1d(x, weight, fast=True).dtype == torch.bfloat16


def test_gradients_and_tangents_are_those_of_the_direct_form():
    x, weight = vocoder_like()
    dot = torch.randn_like(x)

    def results(fast):
        w = weight.clone().requires_grad_()
        y = conv1d(x, w, fast=fast)
        (grad,) = torch.autograd.grad(y.square().sum(), w)
        dual = torch.func.jvp(lambda x: conv1d(x, weight, fast=fast), (x,), (dot,))
        return y.detach(), grad, *dual

    for fast, direct in zip(results(True), results(False), strict=True):
        assert torch.equal(fast, direct)


def test_compiled_it_is_one_op():
    x, weight = vocoder_like()
    with torch.no_grad():
        call = torch.compile(
            lambda x: conv1d(x, weight, fast=True), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(call(x), conv1d(x, weight, fast=True))
    torch.library.opcheck(torch.ops.mfmjt.conv1d_toom.default, (x.transpose(1, 2), weight, None, 1))


def test_two_runs_are_equal_to_the_bit():
    x, weight = vocoder_like()
    assert torch.equal(conv1d(x, weight, fast=True), conv1d(x, weight, fast=True))
