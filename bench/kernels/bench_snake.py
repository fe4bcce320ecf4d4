"""`snake` at every stage of BigVGAN on 8 s of sound: half of the vocoder's time in eager PyTorch.

Its filters are counted as passes over memory and not as matrix products.
"""

from __future__ import annotations

from bench.cases import MODES, VALUE, Case, Cost, Input, vocoder_stages
from mfmjt.kernels.snake import snake, snake_ref

__all__ = ["cases"]


def cases(scale: str) -> list[Case]:
    """Cases of a scale; vocoders run forward only, so little is timed in other modes."""
    found = []
    for model, channels, samples in vocoder_stages(scale):
        n = channels * samples
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
                flops=Cost(0),
                elements=Cost(2 * n, 2 * n, 3 * n),
                terms=samples,
                modes=MODES if every else (VALUE,),
                headline=scale != "tiny",
            )
        )
    return found
