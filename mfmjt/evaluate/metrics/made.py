"""What only a network's own sounds are asked, by the classifier that ships with mfmjt."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.classes import accuracy
from mfmjt.evaluate.metrics.intervals import bootstrap
from mfmjt.evaluate.metrics.onsets import f1_of, total
from mfmjt.evaluate.onsets import count_onsets
from mfmjt.evaluate.sounds import AGAIN, Made, Sounds
from mfmjt.evaluate.statistics import frechet

__all__ = ["CODEC", "DIVERSITY", "FRECHET", "TEXT_ONLY"]

CODEC_TOLERANCE = 0.02  # s, for decoded sound against the original


def _frechet(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    """Measure the Fréchet distance from the real sounds in the classifier's embedding.

    `frechet_real` is the distance between these real sounds and as many others: what perfect sound
    would get. There are no intervals, because resampling biases the distance.
    """
    figures = {"frechet": frechet(made.embedding, real.embedding)}
    if isinstance(made, Made) and made.others is not None:
        figures["frechet_real"] = frechet(made.others.embedding, real.embedding)
    return Score(figures)


def _diversity(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    """Measure how far apart two sounds for one example lie, over two real ones of a class.

    The two sounds are made from different noise; the distance is that of the classifier's
    embeddings. It is near 0 for a network that answers with the mean of all sounds that would fit,
    and below 1 for a good one, since the picture settles part of the sound.
    """
    if not isinstance(made, Made) or made.others is None:
        return None
    spread = np.linalg.norm(made.embedding[:AGAIN] - made.again.embedding, axis=1)
    apart = np.linalg.norm(real.embedding - made.others.embedding, axis=1)
    return Score({"diversity": float(spread.mean() / apart.mean())})


def _text_only(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    """Judge sounds made from the captions alone."""
    sounds = made.from_text if isinstance(made, Made) else None
    if sounds is None:
        return None
    score = Score({})
    if examples.labels is not None:
        score = accuracy("text_class_accuracy", sounds, examples, made.rng)
    score.figures["text_frechet"] = frechet(sounds.embedding, real.embedding)
    return score


def _codec(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    """Judge what encoding and decoding leave of the real sound, which bounds every network.

    Onsets are compared with those detected in the original, at ±20 ms.
    """
    kept = made.through_codec if isinstance(made, Made) else None
    if kept is None or examples.labels is None:
        return None
    score = Score(
        {
            "codec_class_kept": kept.share_of(real.predicted),
            "codec_class_accuracy": kept.share_of(examples.labels.numpy()),
            "frechet_codec": frechet(kept.embedding, real.embedding),
        }
    )
    impact = examples.impact
    if len(impact):
        original, decoded = ([sounds.onsets[i] for i in impact] for sounds in (real, kept))
        counts = count_onsets(original, decoded, CODEC_TOLERANCE)
        score.figures["codec_onset_f1_20ms"] = total(counts).f1
        score.interval["codec_onset_f1_20ms"] = bootstrap(counts, f1_of, made.rng)
    return score


FRECHET = Metric(
    "frechet",
    (Figure("frechet", "Fréchet", 2, "frechet_real", "frechet_codec"), Figure("frechet_real")),
    _frechet,
    ("classifier",),
)
DIVERSITY = Metric("diversity", (Figure("diversity", "diversity", 2, 1.0),), _diversity)
TEXT_ONLY = Metric(
    "text_only",
    (
        Figure("text_class_accuracy", "text only: class", 3),
        Figure("text_frechet", "text only: Fréchet", 2),
    ),
    _text_only,
)
CODEC = Metric(
    "codec",
    (
        Figure("codec_onset_f1_20ms"),
        Figure("codec_class_kept"),
        Figure("codec_class_accuracy"),
        Figure("frechet_codec"),
    ),
    _codec,
)
