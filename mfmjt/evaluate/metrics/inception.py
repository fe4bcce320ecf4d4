"""Inception score: how sure a tagger is of each sound, and how much the sounds differ."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.intervals import jackknife
from mfmjt.evaluate.sounds import Sounds
from mfmjt.evaluate.statistics import inception_score

__all__ = ["IS_PANNS", "IS_PASST"]

SPLITS = 10


def _metric(network: str, title: str) -> Metric:
    key = f"is_{network}"

    def score(made: Sounds, real: Sounds, known: Known) -> Score | None:
        """Compute exp(mean KL(p(y|x) || p(y))): over 10 splits, as it is published, and over all.

        A split's score is at most its number of clips, so the first figure is too small for few
        clips. `_std` is the spread of the splits, which is no interval. That of the second figure
        is a jackknife over blocks of clips; no bootstrap, in which p(y) would have fewer clips.
        Real sound often gets less than generated sound: compare with its figure.
        """
        a, b = (np.stack(sounds.heard(network, "logits", "is")) for sounds in (made, real))
        figures: dict[str, float] = {}
        interval = {}
        for name, logits in (("", a), ("_real", b)):
            if len(logits) >= SPLITS:
                mean, std = inception_score(logits, SPLITS)
                figures |= {f"{key}{name}": mean, f"{key}_std{name}": std}
            figures[f"{key}_whole{name}"] = inception_score(logits, 1)[0]

        def without(own: np.ndarray) -> float:
            return inception_score(a[own], 1)[0]

        whole = figures[f"{key}_whole"]
        if (found := jackknife(whole, (len(a),), without)) is not None:
            interval[f"{key}_whole"] = found
        return Score(figures, interval)

    figures = (
        Figure(key, f"{title}, 10 splits", 3, f"{key}_real", "", "higher"),
        Figure(f"{key}_whole", f"{title}, one split", 3, f"{key}_whole_real", "", "higher"),
        *(Figure(f"{key}{name}") for name in ("_std", "_real", "_std_real", "_whole_real")),
    )
    return Metric(key, figures, score, (network,))


IS_PANNS = _metric("panns", "IS (PANNs)")
IS_PASST = _metric("passt", "IS (PaSST)")
