"""`conv1d` as the two convolutions of three taps into the feed-forward, and as a vocoder has it.

The feed-forward's w1 and w3 are one weight here. BigVGAN's convolutions with few channels are where
oneDNN falls far below the rate that it reaches with many.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Input, shapes, vocoder_stages
from bench.providers import OURS, Provider
from mfmjt.kernels.conv1d import conv1d, conv1d_ref
from mfmjt.testing import VALUE

__all__ = ["cases", "providers"]

FEW = 96
"""Channels up to which BigVGAN's convolutions are timed: the slow ones."""


def _sizes(n: int, length: int, channels: int, outs: int, taps: int) -> dict[str, Any]:
    """Return what a product over windows of n rows costs."""
    moved, weight = n * (channels + outs), outs * channels * taps
    return {
        "flops": Cost(1, 1, 2).times(2 * n * channels * taps * outs),
        "elements": Cost(moved + weight, moved, moved + n * channels + 2 * weight),
        "terms": max(n, channels * taps, outs * taps),
        "length": length,
    }


def _weight(outs: int, channels: int, taps: int) -> Input:
    return Input((outs, channels, taps), moves=False, scale=(channels * taps) ** -0.5)


def _dilated(op: Any, dilation: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute channels-first in and out, as the vocoder calls it."""
    y: Tensor = op(x.transpose(1, 2), weight, bias, dilation)
    return y.transpose(1, 2)


def _vocoder(scale: str) -> list[Case]:
    found = []
    for model, channels, samples in vocoder_stages(scale):
        if channels > FEW:
            continue
        for taps, dilation in ((3, 1), (3, 5), (7, 3), (11, 1), (11, 5)):
            found.append(
                Case(
                    op="conv1d",
                    name=f"{model} {channels}x{samples} k={taps} d={dilation}",
                    model=model,
                    batch=1,
                    inputs={
                        "x": Input((1, channels, samples)),
                        "weight": _weight(channels, channels, taps),
                        "bias": Input((channels,), moves=False),
                    },
                    function=functools.partial(_dilated, conv1d, dilation),
                    reference=functools.partial(_dilated, conv1d_ref, dilation),
                    modes=(VALUE,),
                    compile_too=scale != "tiny" and (taps, dilation) == (11, 5),
                    **_sizes(samples, samples, channels, channels, taps),
                )
            )
    return found


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale; where ops are compiled, also the way back, both with a bias."""
    found = []
    for s in shapes(scale):
        for channels, outs in ((s.dim, 2 * s.hidden), (s.hidden, s.dim))[: 1 + (scale == "aot")]:
            inputs = {"x": Input((s.batch, s.length, channels))}
            inputs["weight"] = _weight(outs, channels, 3)
            if scale == "aot":
                inputs["bias"] = Input((outs,), moves=False)
            sizes = _sizes(s.batch * s.length, s.length, channels, outs, 3)
            name = s.name if channels == s.dim else f"{s.name} back"
            function = {"function": conv1d, "reference": conv1d_ref}
            found.append(s.case("conv1d", inputs, name=name, **function, **sizes))
    return found + _vocoder(scale)


def providers(case: Case) -> list[Provider]:
    """Return ours for inference in a vocoder; of a channels-last image PyTorch's in two axes."""
    if isinstance(case.function, functools.partial):
        _, dilation = case.function.args
        fast = functools.partial(_dilated, functools.partial(conv1d, fast=True), dilation)
        return [Provider(f"{OURS}_fast", fast, devices=("cpu",))]

    def image(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), padding=(0, 1))
        return y.squeeze(2).transpose(1, 2)

    return [Provider("eager_channels_last", image)]
