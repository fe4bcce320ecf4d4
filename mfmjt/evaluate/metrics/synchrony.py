"""DeSync: how far a sound is from its video in time, as Synchformer hears and sees it."""

from __future__ import annotations

import contextlib

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.listening import Unheard
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.intervals import bootstrap_mean
from mfmjt.evaluate.sounds import Sounds

__all__ = ["DESYNC"]

NEAR = 0.2
"""Seconds, a class of offsets."""


def _desync(made: Sounds, real: Sounds, known: Known) -> Score | None:
    """Average the most probable offset over the first and the last 4.8 s of each clip, in seconds.

    Sound that ignores its video gets about 1.05 s, and no offset counts as more than 2 s. Models
    that are trained on Synchformer's features are judged by Synchformer here, and real sound gets
    more than they do. `desync_near` is the share of offsets of at most 0.2 s. The interval is a
    bootstrap of the mean over clips.
    """
    offsets = made.offsets()
    if offsets is None:
        return None
    each = offsets.mean(axis=1)
    figures = {"desync": float(each.mean()), "desync_near": _near(offsets)}
    with contextlib.suppress(Unheard):  # caches of av-benchmark have none of real sounds
        if (others := real.offsets()) is not None:
            figures |= {"desync_real": float(others.mean()), "desync_near_real": _near(others)}
    return Score(figures, {"desync": bootstrap_mean(each)}, per_clip={"desync": each})


def _near(offsets: np.ndarray) -> float:
    return float((offsets < 1.5 * NEAR).mean())


DESYNC = Metric(
    "desync",
    (
        Figure("desync", "DeSync, s", 3, "desync_real", "", "lower"),
        Figure("desync_near", "offset of 0.2 s at most", 3, "desync_near_real", "", "higher"),
        Figure("desync_real"),
        Figure("desync_near_real"),
    ),
    _desync,
    ("synchformer",),
)
