"""`conv1d` as the two convolutions of three taps into the feed-forward, and as a vocoder has it.

The feed-forward's w1 and w3 are one weight here. BigVGAN's convolutions with few channels are where
oneDNN falls far below the rate that it reaches with many.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from bench.cases import VALUE, Case, Cost, Input, shapes, vocoder_stages
from bench.providers import OURS, Provider
from mfmjt.kernels.conv1d import conv1d, conv1d_ref

__all__ = ["cases", "providers"]

FEW = 96
"""Channels up to which BigVGAN's convolutions are timed: the slow ones."""


def _case(
    name: str, model: str, rows: tuple[int, int, int], wide: int, taps: int, **more: object
) -> Case:
    batch, length, dim = rows
    product = 2 * batch * length * dim * taps * wide
    moved, weight = batch * length * (dim + wide), wide * dim * taps
    fields: dict[str, object] = {
        "function": conv1d,
        "reference": conv1d_ref,
        "inputs": {
            "x": Input(rows),
            "weight": Input((wide, dim, taps), moves=False, scale=(dim * taps) ** -0.5),
        },
        "elements": Cost(moved + weight, moved, moved + batch * length * dim + 2 * weight),
    }
    return Case(
        op="conv1d",
        name=name,
        model=model,
        batch=batch,
        length=length,
        flops=Cost(product, product, 2 * product),
        terms=max(batch * length, dim * taps, wide * taps),
        **(fields | more),  # type: ignore[arg-type]
    )


def _dilated(op: object, dilation: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Channels-first in and out, as the vocoder calls it."""
    y: Tensor = op(x.transpose(1, 2), weight, bias, dilation)  # type: ignore[operator]
    return y.transpose(1, 2)


def _vocoder(scale: str) -> list[Case]:
    found = []
    for model, channels, samples in vocoder_stages(scale):
        if channels > FEW:
            continue
        for taps, dilation in ((3, 1), (3, 5), (7, 3), (11, 1), (11, 5)):
            size = (1, channels, samples)
            case = _case(
                f"{model} {channels}x{samples} k={taps} d={dilation}",
                model,
                (1, samples, channels),
                channels,
                taps,
                function=functools.partial(_dilated, conv1d, dilation),
                reference=functools.partial(_dilated, conv1d_ref, dilation),
                inputs={
                    "x": Input(size),
                    "weight": Input(
                        (channels, channels, taps), moves=False, scale=(channels * taps) ** -0.5
                    ),
                    "bias": Input((channels,), moves=False),
                },
                modes=(VALUE,),
                headline=scale != "tiny" and (taps, dilation) == (11, 5),
            )
            found.append(case)
    return found


def cases(scale: str) -> list[Case]:
    """Cases of a scale."""
    found = [
        _case(s.name, s.model, (s.batch, s.length, s.dim), 2 * s.hidden, 3, headline=s.headline)
        for s in shapes(scale)
    ]
    return found + _vocoder(scale)


def providers(case: Case) -> list[Provider]:
    """Ours for inference in a vocoder; of a channels-last image PyTorch's in two dimensions."""
    if isinstance(case.function, functools.partial):
        _, dilation = case.function.args
        fast = functools.partial(_dilated, functools.partial(conv1d, fast=True), dilation)
        return [Provider(f"{OURS}_fast", fast, devices=("cpu",))]

    def image(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), padding=(0, 1))
        return y.squeeze(2).transpose(1, 2)

    return [Provider("eager_channels_last", image)]
