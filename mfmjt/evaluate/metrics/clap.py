"""CLAP score: how near a sound is to its caption, in the embedding of LAION's CLAP."""

from __future__ import annotations

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.cosine import cosine_score
from mfmjt.evaluate.sounds import Sounds

__all__ = ["CLAP"]


def _clap(made: Sounds, real: Sounds, known: Known) -> Score | None:
    """Average the cosine between caption and sound over clips; real sound gets `clap_real`.

    Shuffled: against the caption of another clip. The interval is a bootstrap of the mean.
    """
    return cosine_score("clap", "clap", "clap", made, real, made.told("clap", known.captions))


CLAP = Metric(
    "clap",
    (
        Figure("clap", "CLAP (LAION)", 3, "clap_real", "", "higher"),
        Figure("clap_shuffled", "CLAP, shuffled", 3),
        Figure("clap_real"),
    ),
    _clap,
    ("clap",),
)
