"""`vocoder` on every stage of BigVGAN on 8 s of sound, for inference: upsampling and blocks.

The reference does the same block by block with PyTorch's convolutions, channels first. FLOPs are
those of the convolutions; weights count among the elements that move.
"""

from __future__ import annotations

import functools

from torch import Tensor

from bench.case import VOCODERS, Case, Cost, Input, vocoder_stages
from mfmjt.kernels import reference, vocoder
from mfmjt.testing import VALUE

__all__ = ["cases"]

KERNELS, DILATIONS = (3, 7, 11), (1, 3, 5)


def _stage(rate: int, x: Tensor, up: Tensor, up_bias: Tensor, **given: Tensor) -> Tensor:
    """Compute a stage of (B, N, 2 C), (B, N rate, C)."""

    def of(name: str) -> list[Tensor]:
        return [given[f"{name}_{j}"] for j in range(len(KERNELS))]

    vocoder.arrange(up, 2, 1, 0)
    xs = [vocoder.upsample(x, up, up_bias, rate)] * len(KERNELS)
    for i, dilation in enumerate(DILATIONS):
        hs = xs
        for k in (2 * i, 2 * i + 1):
            weights = of(f"weight{k}")
            for weight in weights:
                vocoder.arrange(weight, 2, 0, 1)  # once, as a network's
            hs = vocoder.activate(hs, of(f"alpha{k}"), of(f"beta{k}"))
            if k == 2 * i:
                hs = vocoder.convolve(hs, weights, of(f"bias{k}"), dilation)
        last = dilation == DILATIONS[-1]
        xs = vocoder.convolve(hs, weights, of(f"bias{k}"), residuals=xs, mean=last)
    return xs[0]


def _case(model: str, channels: int, samples: int, rate: int) -> Case:
    inputs = {
        "x": Input((1, samples // rate, 2 * channels)),
        "up": Input((2 * channels, channels, 2 * rate), False, (4 * channels) ** -0.5),
        "up_bias": Input((channels,), moves=False),
    }
    for k in range(2 * len(DILATIONS)):
        for j, taps in enumerate(KERNELS):
            weight = Input((channels, channels, taps), False, (channels * taps) ** -0.5)
            rows = {n: Input((channels,), False, 0.1) for n in ("bias", "alpha", "beta")}
            inputs |= {f"{n}{k}_{j}": i for n, i in {"weight": weight, **rows}.items()}
    taps = 2 * len(DILATIONS) * sum(KERNELS)
    weights = channels**2 * (taps + 4 * rate)
    function = functools.partial(_stage, rate)
    return Case(
        op="vocoder",
        name=f"{model} {channels}x{samples}",
        model=model,
        batch=1,
        length=samples,
        inputs=inputs,
        function=function,
        reference=reference()(function),
        elements=Cost(samples * channels + samples // rate * 2 * channels + weights),
        terms=max(KERNELS) * channels * 2 * len(DILATIONS),
        flops=Cost(2 * samples * channels**2 * (taps + 4)),
        modes=(VALUE,),
        inference=True,
    )


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale; to compile, stages of different tiles."""
    if scale == "aot":
        few = (("small_16k", 96), ("bigvgan_16k", 192), ("bigvgan_16k", 24))
        return [_case(model, c, 3072000 // c, 2) for model, c in few]
    found = []
    stages = vocoder_stages(scale)
    for (model, channels, samples), before in zip(stages, [*stages[1:], None], strict=True):
        name = model.removeprefix("bigvgan_")
        start = VOCODERS.get(scale, {}).get(name, samples // 2)
        tokens = before[2] if before and before[0] == model else start
        found.append(_case(model, channels, samples, samples // tokens))
    return found
