"""Kullback-Leibler divergence between what a tagger says of the real and the generated sound."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.intervals import bootstrap_mean, derangement
from mfmjt.evaluate.sounds import Sounds
from mfmjt.evaluate.statistics import softmax_divergences

__all__ = ["KL_PANNS", "KL_PASST"]


def _metric(network: str, title: str) -> Metric:
    key = f"kl_{network}"

    def score(made: Sounds, real: Sounds, known: Known) -> Score | None:
        """Average KL(real || generated) over pairs, in nats, of the softmax of the logits.

        Shuffled: against the real sound of another clip, which is what sound that ignores its
        condition gets. The interval is a bootstrap of the mean over clips.
        """
        a, b = (np.stack(sounds.heard(network, "logits", "kl")) for sounds in (made, real))
        each = softmax_divergences(a, b)
        figures = {key: float(each.mean())}
        if len(b) > 1:
            other = b[derangement(len(b), np.random.default_rng(0))]
            figures[f"{key}_shuffled"] = float(softmax_divergences(a, other).mean())
        return Score(figures, {key: bootstrap_mean(each)}, per_clip={key: each})

    figures = (
        Figure(key, title, 3, 0.0, "", "lower"),
        Figure(f"{key}_shuffled", f"{title}, shuffled", 3),
    )
    return Metric(key, figures, score, (network,))


KL_PANNS = _metric("panns", "KL (PANNs)")
KL_PASST = _metric("passt", "KL (PaSST)")
