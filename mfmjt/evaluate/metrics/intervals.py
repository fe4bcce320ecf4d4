"""95 % intervals over clips, each by a method that is valid for its statistic.

A mean over clips is bootstrapped. A distance between sets must not be: a resampled set holds clips
twice, which adds to a Fréchet or kernel distance and lifts the whole interval above the value
itself. There the jackknife over blocks of clips is used, which only ever leaves clips out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mfmjt.errors import InputError

__all__ = [
    "bootstrap",
    "bootstrap_mean",
    "derangement",
    "halves",
    "jackknife",
    "nested_bootstrap",
    "student",
]

RESAMPLES = 1000
BLOCKS = 20
STUDENT = 2.093
"""97.5 % quantile of Student's t with BLOCKS - 1 degrees of freedom."""
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The same of 1 to 9 degrees of freedom."""


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


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over clips `(n,)`; memory does not grow.

    Valid for means: a clip that is drawn twice counts twice, and that is all it does.
    """
    rng, at_once = np.random.default_rng(seed), 50
    drawn = (
        rng.integers(0, len(values), (at_once, len(values))) for _ in range(0, RESAMPLES, at_once)
    )
    means = np.concatenate([values[rows].mean(axis=1) for rows in drawn])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def nested_bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    others: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a mean over trainings of a statistic over clips: both are resampled.

    All trainings are judged on the same clips, so a resampled clip is that of every training. A
    percentile bootstrap over s trainings is too narrow by (1 - 1/s)^½, which is a lot for three:
    deviations between trainings are widened by the inverse.

    Args:
        values: Figures of clips (s, n, ...) of s trainings.
        statistic: As for `bootstrap`.
        others: The same of other trainings, paired with these: the interval is of the difference.
        seed: Of the draws.

    Raises:
        InputError: Fewer than two trainings.
    """
    trainings, clips = values.shape[:2]
    if trainings < 2:
        raise InputError("One training has no spread. Use more seeds.")
    rng, wider = np.random.default_rng(seed), math.sqrt(trainings / (trainings - 1))
    rows = rng.integers(0, clips, (RESAMPLES, clips))
    drawn = rng.integers(0, trainings, (RESAMPLES, trainings))
    each = np.stack([statistic(own[rows]) for own in values])  # (s, RESAMPLES)
    if others is not None:
        each = each - np.stack([statistic(own[rows]) for own in others])
    middle = each.mean(axis=0)
    resampled = np.take_along_axis(each, drawn.T, axis=0).mean(axis=0)
    low, high = np.quantile(middle + wider * (resampled - middle), (0.025, 0.975))
    return float(low), float(high)


def student(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over 2 to 10 trainings, by Student's t.

    Raises:
        InputError: Fewer or more values (n,).
    """
    count = len(values)
    if not 2 <= count <= len(QUANTILES) + 1:
        raise InputError(f"{count} seeds: an interval takes 2 to {len(QUANTILES) + 1}.")
    half = QUANTILES[count - 2] * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


def jackknife(
    value: float, counts: Sequence[int], statistic: Callable[..., float]
) -> tuple[float, float] | None:
    """95 % interval from 20 values that each leave one block of clips out.

    value ± t₁₉ ((g - 1)/g Σ_b (θ_b - θ̄)²)^½ with g = 20 blocks (Tukey, 1958; delete-a-group). It
    is valid for smooth functions of means over clips, such as the Fréchet distance and the
    inception score at many clips, and for U-statistics such as the kernel distance, where it is
    wide if both sets have one distribution (Arvesen, 1969). It says how much the value would move
    with other clips; it does not take away the bias of a small set, and where there are fewer
    clips than the features have dimensions it is a rough guide.

    Args:
        value: The statistic of all clips.
        counts: Clips of each set. Clips of one number, which are pairs where sets are paired, are
            left out together.
        statistic: Takes a mask (count,) of the kept clips for each set.

    Returns:
        Low and high, or None for fewer than 20 clips.
    """
    if min(counts) < BLOCKS:
        return None
    numbers = [np.arange(count) % BLOCKS for count in counts]
    without = np.array([statistic(*(own != b for own in numbers)) for b in range(BLOCKS)])
    spread = math.sqrt((BLOCKS - 1) * float(without.var()))
    return value - STUDENT * spread, value + STUDENT * spread


def halves(count: int, repeats: int = 3, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return random divisions of `count` clips into two halves of equal size, as indices.

    Raises:
        InputError: Fewer than four clips.
    """
    if count < 4:
        raise InputError(f"{count} clips have no halves to compare: at least 4 are needed.")
    rng, half = np.random.default_rng(seed), count // 2
    orders = [rng.permutation(count) for _ in range(repeats)]
    return [(order[:half], order[half : 2 * half]) for order in orders]
