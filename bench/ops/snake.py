"""`snake` at every stage of BigVGAN on 8 s of sound: half of the vocoder's time in eager PyTorch.

Its filters are counted as passes over memory and not as matrix products. `published` is the
activation operation by operation as BigVGAN's authors have it in PyTorch; the reference, `eager`,
saves it a pass over the doubled signal and a power.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Input, vocoder_stages
from bench.providers import Provider
from mfmjt.kernels._filter import taps
from mfmjt.kernels.snake import snake, snake_ref
from mfmjt.testing import MODES, VALUE

__all__ = ["cases", "providers"]


def cases(scale: str) -> list[Case]:
    """Return the cases of a scale; vocoders run forward only, so few have other modes."""
    found = []
    for model, channels, samples in vocoder_stages(scale):
        every = scale in ("check", "tiny") or (scale == "gpu" and channels == 96)
        found.append(
            Case(
                op="snake",
                name=f"{model} {channels}x{samples}",
                model=model,
                batch=1,
                length=samples,
                inputs={
                    "x": Input((1, channels, samples)),
                    "alpha": Input((channels,), moves=False, scale=0.1),
                    "beta": Input((channels,), moves=False, scale=0.1),
                },
                function=snake,
                reference=snake_ref,
                elements=Cost(2, 2, 3).times(channels * samples),
                terms=samples,
                modes=MODES if every else (VALUE,),
                compile_too=scale != "tiny",
            )
        )
    return found


def providers(case: Case) -> list[Provider]:
    """Return the activation as published."""
    return [Provider("published", _published, modes=(VALUE,))]


def _published(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    channels, ratio = x.shape[1], 2
    filters = taps(x).expand(channels, 1, -1)
    padded = F.pad(x, (5, 5), mode="replicate")
    up = ratio * F.conv_transpose1d(padded, filters, stride=ratio, groups=channels)
    up = up[..., 15:-15]
    frequency, inverse = alpha[None, :, None].exp(), beta[None, :, None].exp()
    up = up + (1.0 / (inverse + 1e-9)) * torch.pow(torch.sin(up * frequency), 2)
    padded = F.pad(up, (5, 6), mode="replicate")
    return F.conv1d(padded, filters, stride=ratio, groups=channels)
