"""Figures of a network's sounds, and their intervals over seeds and clips."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import Classifier
from mfmjt.evaluate.examples import Examples
from mfmjt.evaluate.metrics.intervals import nested_bootstrap, student
from mfmjt.evaluate.metrics.onsets import TOLERANCE, f1_of
from mfmjt.evaluate.onsets import count_onsets
from mfmjt.evaluate.sounds import Sounds, generate
from mfmjt.evaluate.statistics import cosine, frechet, inception_score
from mfmjt.experiment.base import Row, Way
from mfmjt.families import Bundle

__all__ = ["MEASURES", "Measure", "Value", "cell", "compared", "measure", "value"]

SEEDS, MOST = 3, 10
"""Fewest and most seeds of an interval."""


class Measure(NamedTuple):
    """One figure of a row.

    Attributes:
        key: Its name in a row.
        title: Head of its column.
        digits: Decimals.
        better: `higher`, `lower` or "".
        clips: Name of the figures of single clips that it is computed from; "" where it is one of
            the whole set, whose interval is then over seeds alone.
        statistic: Of resampled figures of clips (m, n, ...), (m,).
    """

    key: str
    title: str
    digits: int
    better: str
    clips: str = ""
    statistic: Callable[[np.ndarray], np.ndarray] = lambda rows: rows.mean(axis=1)


MEASURES = (
    Measure("onset_f1", "onset F1", 3, "higher", "onsets", f1_of),
    Measure("class_accuracy", "class", 3, "higher", "right"),
    Measure("cosine", "cosine", 3, "higher", "cosine"),
    Measure("inception", "IS", 2, "higher"),
    Measure("frechet", "Fréchet", 1, "lower"),
    Measure("rtf", "RTF", 4, "lower"),
)
"""Onsets and class as `mfmjt evaluate` has them. `cosine`: of a sound's embedding with that of the
clip's own sound, both less the mean of the real sounds; in place of ImageBind's score."""


def measure(bundle: Bundle, examples: Examples, classifier: Classifier, way: Way) -> Row:
    """Make sound for all examples in one way; return its figures, and under `clips` theirs."""
    clock = time.process_time if bundle.device.type == "cpu" else time.perf_counter
    began = clock()
    waves = generate(bundle, examples, way.sampling, conditions=way.conditions)
    spent = clock() - began
    rate = bundle.codec.sample_rate
    made, real = (Sounds(w, rate, classifier) for w in (waves, examples.audio))
    assert examples.labels is not None
    assert examples.events is not None
    impact = examples.impact
    onsets = count_onsets(
        [examples.events[i] for i in impact], [made.onsets[i] for i in impact], TOLERANCE
    )
    middle = real.embedding.mean(axis=0)
    near = cosine(made.embedding - middle, real.embedding - middle)
    right = made.predicted == examples.labels.numpy()
    logits = classifier.logits(torch.from_numpy(made.embedding).float())
    return {
        "onset_f1": float(f1_of(onsets[None])[0]),
        "class_accuracy": float(right.mean()),
        "cosine": float(near.mean()),
        "inception": inception_score(logits, 1)[0],
        "frechet": frechet(made.embedding, real.embedding),
        "rtf": spent / (len(examples) * examples.duration),
        "clips": {
            "onsets": onsets.tolist(),
            "right": right.astype(int).tolist(),
            "cosine": np.round(near, 3).tolist(),
        },
    }


class Value(NamedTuple):
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """Return it as `mean (low to high)`."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def cell(rows: Sequence[Row], wanted: Mapping[str, Any]) -> list[Row]:
    """Return the rows with these values, one of each seed, in the order of the seeds.

    Raises:
        InputError: There are fewer than three seeds, or several rows of one.
    """
    found = [row for row in rows if all(row.get(key) == v for key, v in wanted.items())]
    seeds = sorted({row["seed"] for row in found})
    if len(seeds) != len(found):
        raise InputError(f"{wanted} picks several rows of one seed. Give more values.")
    if len(found) < SEEDS:
        raise InputError(
            f"{wanted} has {len(found)} seeds: an interval needs at least {SEEDS}. Run with "
            f"--seeds {SEEDS} or more."
        )
    return sorted(found, key=lambda row: row["seed"])


def value(rows: Sequence[Row], of: Measure) -> Value:
    """Return the mean over the rows of a cell, and its interval."""
    low, high = _interval(rows, None, of)
    return Value(float(np.mean([row[of.key] for row in rows])), low, high)


def compared(rows: Sequence[Row], others: Sequence[Row], of: Measure) -> Value:
    """Return by how much a cell is larger than another one of the same seeds and clips."""
    differences = [a[of.key] - b[of.key] for a, b in zip(rows, others, strict=True)]
    low, high = _interval(rows, others, of)
    return Value(float(np.mean(differences)), low, high)


def _interval(
    rows: Sequence[Row], others: Sequence[Row] | None, of: Measure
) -> tuple[float, float]:
    if not of.clips:
        figures = np.array([row[of.key] for row in rows])
        return student(figures - [row[of.key] for row in others] if others else figures)
    pair = [np.array([row["clips"][of.clips] for row in each]) for each in (rows, others or ())]
    return nested_bootstrap(pair[0], of.statistic, pair[1] if others else None)


def describe(of: Measure, difference: Value) -> str:
    """Say whether a difference, in the direction that is better, is one."""
    low, high = difference.low, difference.high
    if of.better == "lower":
        low, high = -high, -low
    if math.isnan(low):
        return "undecided"
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
