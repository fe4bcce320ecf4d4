"""What the scores of two modalities share: a mean of cosines."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.metrics.base import Score
from mfmjt.evaluate.metrics.intervals import bootstrap_mean, derangement
from mfmjt.evaluate.statistics import cosine

__all__ = ["cosine_score"]


def cosine_score(
    key: str, made: list[np.ndarray], real: list[np.ndarray], wanted: list[np.ndarray]
) -> Score:
    """Score sounds by the cosine of their embeddings with those of what they should go with.

    Args:
        key: Of the figure; `_real` and `_shuffled` are added for those of the real sounds and of
            sounds against what another clip wants.
        made: Embedding (d,) of each generated sound.
        real: Of each real sound.
        wanted: Of each caption or video.
    """
    a, b, c = (np.stack(rows) for rows in (made, real, wanted))
    each = cosine(a, c)
    figures = {key: float(each.mean()), f"{key}_real": float(cosine(b, c).mean())}
    if len(c) > 1:
        other = c[derangement(len(c), np.random.default_rng(0))]
        figures[f"{key}_shuffled"] = float(cosine(a, other).mean())
    return Score(figures, {key: bootstrap_mean(each)}, per_clip={key: each})
