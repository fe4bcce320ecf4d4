"""Onset F1 against the known times of events."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score, by_class
from mfmjt.evaluate.metrics.intervals import bootstrap, derangement
from mfmjt.evaluate.onsets import OnsetScore, count_onsets, onset_f1
from mfmjt.evaluate.sounds import Sounds

__all__ = ["ONSETS", "f1_of", "total"]

TOLERANCE = 0.05  # s, for generated sound against the events


def f1_of(counts: np.ndarray) -> np.ndarray:
    """Micro-averaged F1 (m,) of resampled counts (m, n, 3)."""
    matched, reference, estimated = np.moveaxis(counts.sum(axis=1), 1, 0)
    return 2 * matched / np.maximum(reference + estimated, 1)


def total(counts: np.ndarray) -> OnsetScore:
    """Add up the counts (n, 3) of clips."""
    return OnsetScore(*counts.sum(axis=0).tolist())


def _onsets(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    """Score onsets against the known event times, at ±50 ms, of the clips of impact classes.

    Micro-averaged: onsets are counted over all clips. Shuffled: scored against the events of
    another impact clip, which is what sound made for another clip's video gets.
    """
    impact = examples.impact
    if examples.events is None or len(impact) < 2:
        return None
    events = [examples.events[i] for i in impact]
    others = [events[i] for i in derangement(len(impact), made.rng)]
    made_onsets = [made.onsets[i] for i in impact]
    real_onsets = [real.onsets[i] for i in impact]
    counts = count_onsets(events, made_onsets, TOLERANCE)
    shuffled = count_onsets(others, made_onsets, TOLERANCE)
    score = total(counts)
    classes = [examples.classes[i] for i in impact]
    return Score(
        {
            "impact_clips": len(impact),
            "onset_f1": score.f1,
            "onset_precision": score.precision,
            "onset_recall": score.recall,
            "onset_f1_shuffled": total(shuffled).f1,
            "onset_f1_real": onset_f1(events, real_onsets, TOLERANCE).f1,
            "onset_f1_real_shuffled": onset_f1(others, real_onsets, TOLERANCE).f1,
        },
        {
            "onset_f1": bootstrap(counts, f1_of, made.rng),
            "onset_f1_shuffled": bootstrap(shuffled, f1_of, made.rng),
        },
        {"onset_f1": by_class(classes, lambda own: total(counts[own]).f1)},
    )


ONSETS = Metric(
    "onsets",
    (
        Figure("impact_clips"),
        Figure("onset_f1", "onset F1", 3, "onset_f1_real", "codec_onset_f1_20ms"),
        Figure("onset_precision"),
        Figure("onset_recall"),
        Figure("onset_f1_shuffled", "shuffled", 3, "onset_f1_real_shuffled"),
        Figure("onset_f1_real"),
        Figure("onset_f1_real_shuffled"),
    ),
    _onsets,
    ("onsets",),
)
