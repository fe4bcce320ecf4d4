"""What the scores of two modalities share: a mean of cosines."""

from __future__ import annotations

import contextlib

import numpy as np

from mfmjt.evaluate.listening import Unheard
from mfmjt.evaluate.metrics.base import Score
from mfmjt.evaluate.metrics.intervals import bootstrap_mean, derangement
from mfmjt.evaluate.sounds import Sounds
from mfmjt.evaluate.statistics import cosine

__all__ = ["cosine_score"]


def cosine_score(
    key: str, network: str, purpose: str, made: Sounds, real: Sounds, wanted: list[np.ndarray]
) -> Score:
    """Score sounds by the cosine of their embeddings with those of what they should go with.

    Args:
        key: Of the figure; `_real` and `_shuffled` are added for those of the real sounds, where
            there are features of them, and of sounds against what another clip wants.
        network: That embeds sounds.
        purpose: As for `Sounds.heard`.
        made: The generated sounds.
        real: The real sounds.
        wanted: Embedding (d,) of each caption or video.
    """
    a, c = np.stack(made.heard(network, "embedding", purpose)), np.stack(wanted)
    each = cosine(a, c)
    figures = {key: float(each.mean())}
    with contextlib.suppress(Unheard):  # caches of av-benchmark have none of real sounds
        b = np.stack(real.heard(network, "embedding", purpose))
        figures[f"{key}_real"] = float(cosine(b, c).mean())
    if len(c) > 1:
        other = c[derangement(len(c), np.random.default_rng(0))]
        figures[f"{key}_shuffled"] = float(cosine(a, other).mean())
    return Score(figures, {key: bootstrap_mean(each)}, per_clip={key: each})
