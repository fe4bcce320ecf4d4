"""What is measured of sounds that a network made.

A `Metric` is a function and what is to be known of its figures. Those here are in `METRICS`; one of
your own goes to `mfmjt evaluate --metric package.module:name`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mfmjt.errors import InputError, reason
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.onsets import OnsetScore, count_onsets, onset_f1
from mfmjt.evaluate.sounds import AGAIN, Made, Sounds
from mfmjt.evaluate.statistics import frechet

__all__ = ["METRICS", "Figure", "Metric", "Score", "bootstrap", "derangement", "load_metric"]

TOLERANCE = 0.05  # s, for generated sound against the events
CODEC_TOLERANCE = 0.02  # s, for decoded sound against the original
RESAMPLES = 1000


class Figure(NamedTuple):
    """One number of a report.

    Attributes:
        key: Its name in the report.
        title: Head of its column in the table; "" for no column.
        digits: Decimals in the table.
        real: The figure, or the number, that real audio gets in this column.
        codec: The figure that the codec alone gets in this column.
    """

    key: str
    title: str = ""
    digits: int = 3
    real: str | float = ""
    codec: str = ""


@dataclass
class Score:
    """What a metric says.

    Attributes:
        figures: Its numbers by key; one that is left out is not applicable.
        interval: 95 % intervals of some of them.
        per_class: Some of them for each class by itself: key -> class -> number.
    """

    figures: dict[str, float]
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)


class Metric(NamedTuple):
    """What can be measured.

    Attributes:
        name: Short name, for progress.
        figures: Every figure that it can give.
        score: Judges sounds made for examples by the real ones and by what is known of them. None
            where the examples lack the truth that it needs.
    """

    name: str
    figures: tuple[Figure, ...]
    score: Callable[[Made, Sounds, Examples], Score | None]


def load_metric(name: str) -> Metric:
    """Return the metric that `package.module:name` stands for.

    Raises:
        InputError: No such module, or no such metric in it.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(
            f"metric {name}: {module!r} cannot be imported: {reason(error)}. Give "
            "package.module:name, and add the module's folder to PYTHONPATH."
        ) from error
    if not isinstance(found, Metric):
        raise InputError(
            f"metric {name}: {module} has no Metric {attribute!r}. Define one; see "
            "mfmjt.evaluate.metrics."
        )
    return found


def derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random permutation (count,) that moves every element: one cycle through all.

    Raises:
        InputError: Fewer than two elements.
    """
    if count < 2:
        raise InputError(f"{count} clips cannot be exchanged with one another. Use more clips.")
    order = rng.permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return result


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic over examples.

    Args:
        values: One row for each example, (n, ...).
        statistic: Takes resampled rows (m, n, ...) and gives (m,) numbers.
        rng: Draws the rows.
    """
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[drawn]), (0.025, 0.975))
    return float(low), float(high)


def _f1(counts: np.ndarray) -> np.ndarray:
    """Micro-averaged F1 (m,) of resampled counts (m, n, 3)."""
    matched, reference, estimated = np.moveaxis(counts.sum(axis=1), 1, 0)
    return 2 * matched / np.maximum(reference + estimated, 1)


def _total(counts: np.ndarray) -> OnsetScore:
    return OnsetScore(*counts.sum(axis=0).tolist())


def _by_class(classes: Sequence[str], score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """Score of the examples of each class, which are told to `score` by a mask (n,)."""
    names = np.array(classes)
    return {str(name): score(names == name) for name in dict.fromkeys(classes)}


def _onsets(made: Made, real: Sounds, examples: Examples) -> Score | None:
    """Score onsets against the known event times, at ±50 ms, of the clips of impact classes.

    Micro-averaged: onsets are counted over all clips. Shuffled: scored against the events of
    another impact clip, which is what sound made for another clip's video gets.
    """
    if examples.events is None:
        return None
    impact = examples.impact
    events = [examples.events[i] for i in impact]
    others = [events[i] for i in derangement(len(impact), made.rng)]
    made_onsets = [made.onsets[i] for i in impact]
    real_onsets = [real.onsets[i] for i in impact]
    counts = count_onsets(events, made_onsets, TOLERANCE)
    shuffled = count_onsets(others, made_onsets, TOLERANCE)
    score = _total(counts)
    classes = [examples.classes[i] for i in impact]
    return Score(
        {
            "impact_clips": len(impact),
            "onset_f1": score.f1,
            "onset_precision": score.precision,
            "onset_recall": score.recall,
            "onset_f1_shuffled": _total(shuffled).f1,
            "onset_f1_real": onset_f1(events, real_onsets, TOLERANCE).f1,
            "onset_f1_real_shuffled": onset_f1(others, real_onsets, TOLERANCE).f1,
        },
        {
            "onset_f1": bootstrap(counts, _f1, made.rng),
            "onset_f1_shuffled": bootstrap(shuffled, _f1, made.rng),
        },
        {"onset_f1": _by_class(classes, lambda own: _total(counts[own]).f1)},
    )


def _accuracy(key: str, sounds: Sounds, examples: Examples, rng: np.random.Generator) -> Score:
    """Score in how many sounds the classifier hears the class that the example has."""
    assert examples.labels is not None
    right = sounds.predicted == examples.labels.numpy()
    return Score(
        {key: float(right.mean())},
        {key: bootstrap(right, lambda rows: rows.mean(axis=1), rng)},
        {key: _by_class(examples.classes, lambda own: float(right[own].mean()))},
    )


def _classes(made: Made, real: Sounds, examples: Examples) -> Score | None:
    if examples.labels is None:
        return None
    score = _accuracy("class_accuracy", made, examples, made.rng)
    score.figures["class_accuracy_real"] = real.share_of(examples.labels.numpy())
    return score


def _frechet(made: Made, real: Sounds, examples: Examples) -> Score | None:
    """Measure the Fréchet distance from the real sounds in the classifier's embedding.

    `frechet_real` is the distance between these real sounds and as many others: what perfect sound
    would get. There are no intervals, because resampling biases the distance.
    """
    figures = {"frechet": frechet(made.embedding, real.embedding)}
    if made.others is not None:
        figures["frechet_real"] = frechet(made.others.embedding, real.embedding)
    return Score(figures)


def _diversity(made: Made, real: Sounds, examples: Examples) -> Score | None:
    """Measure how far apart two sounds for one example lie, over two real ones of a class.

    The two sounds are made from different noise; the distance is that of the classifier's
    embeddings. It is near 0 for a network that answers with the mean of all sounds that would fit,
    and below 1 for a good one, since the picture settles part of the sound.
    """
    if made.others is None:
        return None
    spread = np.linalg.norm(made.embedding[:AGAIN] - made.again.embedding, axis=1)
    apart = np.linalg.norm(real.embedding - made.others.embedding, axis=1)
    return Score({"diversity": float(spread.mean() / apart.mean())})


def _text_only(made: Made, real: Sounds, examples: Examples) -> Score | None:
    """Judge sounds made from the captions alone."""
    sounds = made.from_text
    if sounds is None:
        return None
    score = Score({})
    if examples.labels is not None:
        score = _accuracy("text_class_accuracy", sounds, examples, made.rng)
    score.figures["text_frechet"] = frechet(sounds.embedding, real.embedding)
    return score


def _codec(made: Made, real: Sounds, examples: Examples) -> Score | None:
    """Judge what encoding and decoding leave of the real sound, which bounds every network.

    Onsets are compared with those detected in the original, at ±20 ms.
    """
    kept = made.through_codec
    if kept is None or examples.labels is None:
        return None
    impact = examples.impact
    original, decoded = ([sounds.onsets[i] for i in impact] for sounds in (real, kept))
    counts = count_onsets(original, decoded, CODEC_TOLERANCE)
    return Score(
        {
            "codec_onset_f1_20ms": _total(counts).f1,
            "codec_class_kept": kept.share_of(real.predicted),
            "codec_class_accuracy": kept.share_of(examples.labels.numpy()),
            "frechet_codec": frechet(kept.embedding, real.embedding),
        },
        {"codec_onset_f1_20ms": bootstrap(counts, _f1, made.rng)},
    )


METRICS = (
    Metric(
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
    ),
    Metric(
        "classes",
        (
            Figure(
                "class_accuracy", "class accuracy", 3, "class_accuracy_real", "codec_class_accuracy"
            ),
            Figure("class_accuracy_real"),
        ),
        _classes,
    ),
    Metric(
        "Fréchet",
        (Figure("frechet", "Fréchet", 2, "frechet_real", "frechet_codec"), Figure("frechet_real")),
        _frechet,
    ),
    Metric("diversity", (Figure("diversity", "diversity", 2, 1.0),), _diversity),
    Metric(
        "text only",
        (
            Figure("text_class_accuracy", "text only: class", 3),
            Figure("text_frechet", "text only: Fréchet", 2),
        ),
        _text_only,
    ),
    Metric(
        "codec",
        (
            Figure("codec_onset_f1_20ms"),
            Figure("codec_class_kept"),
            Figure("codec_class_accuracy"),
            Figure("frechet_codec"),
        ),
        _codec,
    ),
)
"""The metrics of every report, in the order of the table's columns."""
