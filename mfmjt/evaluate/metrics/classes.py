"""Share of the sounds in which the classifier recognizes the known class."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score, by_class
from mfmjt.evaluate.metrics.intervals import bootstrap
from mfmjt.evaluate.sounds import Sounds

__all__ = ["CLASSES", "accuracy"]


def accuracy(key: str, sounds: Sounds, examples: Known, rng: np.random.Generator) -> Score:
    """Score in how many sounds the classifier hears the class that the example has."""
    assert examples.labels is not None
    right = sounds.predicted == examples.labels.numpy()
    return Score(
        {key: float(right.mean())},
        {key: bootstrap(right, lambda rows: rows.mean(axis=1), rng)},
        {key: by_class(examples.classes, lambda own: float(right[own].mean()))},
    )


def _classes(made: Sounds, real: Sounds, examples: Known) -> Score | None:
    if examples.labels is None:
        return None
    score = accuracy("class_accuracy", made, examples, made.rng)
    score.figures["class_accuracy_real"] = real.share_of(examples.labels.numpy())
    return score


CLASSES = Metric(
    "classes",
    (
        Figure(
            "class_accuracy", "class accuracy", 3, "class_accuracy_real", "codec_class_accuracy"
        ),
        Figure("class_accuracy_real"),
    ),
    _classes,
    ("classifier",),
)
