from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mfmjt.kernels import _backends, reference, vocoder
from tests import oracle
from tests.kernels.test_streams import judge
from tests.oracle import randn, strided

KERNELS = (3, 7, 11)


def convolved(batch, length, channels, outs, kernels=KERNELS, layout=lambda x: x):
    """Inputs, weights, biases and residuals of blocks."""
    return (
        [layout(randn(batch, length, channels)) for _ in kernels],
        [randn(outs, channels, k) / (channels * k) ** 0.5 for k in kernels],
        [randn(outs) for _ in kernels],
        [layout(randn(batch, length, outs)) for _ in kernels],
    )


def activated(batch, length, channels, blocks=1, layout=lambda x: x):
    return (
        [layout(randn(batch, length, channels)) for _ in range(blocks)],
        [randn(channels) / 3 for _ in range(blocks)],
        [randn(channels) / 3 for _ in range(blocks)],
    )


ACTIVATED = {
    "three blocks": lambda: activated(2, 21, 6, 3),
    "odd channels": lambda: activated(1, 19, 5),
    "views": lambda: activated(1, 9, 4, layout=strided),
    "one token": lambda: activated(2, 1, 3),
    "a run off both ends": lambda: activated(1, 40, 256),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", ACTIVATED)
def test_activate(case, dtype):
    judge(vocoder.activate, ACTIVATED[case](), dtype, terms=74)


CONVOLVED = {
    "a stage of 24": (convolved, (1, 37, 24, 24), {"dilation": 5}),
    "the mean of blocks": (convolved, (2, 17, 12, 12), {"mean": True}),
    "odd channels": (convolved, (2, 9, 5, 7), {"dilation": 3}),
    "windows longer than the signal": (convolved, (1, 3, 4, 4), {"dilation": 5}),
    "two sums and two tiles": (convolved, (1, 20, 8, 200, (3, 1)), {}),
    "views": (convolved, (2, 9, 8, 8, (7,), strided), {}),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CONVOLVED)
def test_convolve(case, dtype):
    make, sizes, how = CONVOLVED[case]

    def run(xs, weights, biases, residuals):
        return vocoder.convolve(xs, weights, biases, residuals=residuals, **how)

    judge(run, make(*sizes), dtype, terms=300)


@pytest.mark.parametrize("mean", [False, True])
def test_biases_and_residuals_are_optional(mean):
    xs, weights, biases, residuals = convolved(1, 12, 4, 4)
    for given in ({}, {"biases": biases}, {"residuals": residuals}):

        def run(xs, weights, given):
            return vocoder.convolve(xs, weights, mean=mean, **given)

        judge(run, (xs, weights, given), torch.float32, terms=100)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("rate", [2, 4, 8])
def test_upsample(rate, dtype):
    def run(x, weight, bias):
        return vocoder.upsample(x, weight, bias, rate)

    for batch, length in ((2, 9), (1, 1)):
        given = randn(batch, length, 6), randn(6, 3, 2 * rate) / 5, randn(3)
        (y,) = judge(run, given, dtype, terms=40)
        assert y.shape == (batch, length * rate, 3)


def test_arranged_weights_are_the_same_and_read_in_place():
    x, weight = randn(1, 9, 4).float(), torch.nn.Parameter(randn(6, 4, 3).float())
    known, values = F.conv1d(x.transpose(1, 2), weight, padding=1), weight.detach().clone()
    with torch.inference_mode():
        vocoder.arrange(weight, 2, 0, 1)
    place = weight.data_ptr()
    vocoder.arrange(weight, 2, 0, 1)
    assert weight.data_ptr() == place == weight.permute(2, 0, 1).contiguous().data_ptr()
    assert torch.equal(weight, values)
    assert weight.requires_grad
    with torch.no_grad():
        (y,) = vocoder.convolve([x], [weight])
    assert oracle.error(y, known.transpose(1, 2)) <= oracle.allowance(known, x.dtype, terms=12)
    F.conv1d(x.transpose(1, 2), weight).sum().backward()  # it can be trained on
    assert weight.grad.shape == weight.shape


def test_suits_where_kernels_are_and_nothing_is_differentiated():
    x, weight = torch.zeros(1, 2, 3), torch.zeros(2, requires_grad=True)
    here = _backends.AVAILABLE and (x.is_cuda or _backends.ON_CPU)
    with torch.no_grad():
        assert vocoder.suits(x, [weight]) == here
        with reference():
            assert not vocoder.suits(x, [weight])
        with torch.autocast(x.device.type, torch.bfloat16):
            assert not vocoder.suits(x, [weight])
    assert not vocoder.suits(x, [weight])
    found = []

    def watched(x):
        found.append(vocoder.suits(x, []))
        return x

    torch.func.jvp(watched, (x,), (x,))
    assert found == [False]


def test_refuses_derivatives_and_what_does_not_fit():
    xs, weights, biases, residuals = convolved(1, 5, 2, 2, (3,))
    with pytest.raises(NotImplementedError, match=r"vocoder\.convolve.*requires a gradient"):
        vocoder.convolve([xs[0].requires_grad_()], weights)
    xs = [xs[0].detach()]
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(lambda x: vocoder.activate([x], biases, biases)[0], (xs[0],), (xs[0],))
    for wrong in (
        {"xs": [], "weights": []},
        {"xs": xs, "weights": [weights[0][..., :2]]},
        {"xs": xs, "weights": [weights[0].float()]},
        {"xs": xs, "weights": weights * 2},
        {"xs": xs, "weights": weights, "residuals": [residuals[0][:, 1:]]},
        {"xs": xs, "weights": weights, "biases": [biases[0][1:]]},
        {"xs": xs, "weights": weights, "dilation": 0},
        {"xs": [xs[0][:, :0]], "weights": weights},
    ):
        with pytest.raises(ValueError, match=r"vocoder\.convolve needs x \(B, N, C\)"):
            vocoder.convolve(**wrong)
    with pytest.raises(ValueError, match=r"vocoder\.activate needs"):
        vocoder.activate(xs, biases, [])
    with pytest.raises(ValueError, match="even rate"):
        vocoder.upsample(xs[0], randn(2, 2, 6), biases[0], 3)


def test_library_ops():
    xs, weights, biases, residuals = ([t.float() for t in g] for g in convolved(1, 5, 2, 2, (3,)))
    ops = torch.ops.mfmjt
    tests = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.vocoder_activate.default, (xs, biases, biases)),
        (ops.vocoder_convolve.default, (xs, weights, biases, 1, residuals, False)),
        (ops.vocoder_upsample.default, (xs[0], randn(2, 2, 4).float(), biases[0], 2)),
    ):
        torch.library.opcheck(op, args, test_utils=tests)
