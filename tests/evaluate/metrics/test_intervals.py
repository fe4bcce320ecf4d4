from __future__ import annotations

import numpy as np
import pytest

from mfmjt.errors import InputError
from mfmjt.evaluate.metrics.intervals import (
    bootstrap_mean,
    halves,
    jackknife,
    nested_bootstrap,
    student,
)
from mfmjt.evaluate.statistics import frechet, kernel_distance


def covered(low: float, high: float, truth: float) -> bool:
    return low <= truth <= high


def test_an_interval_of_a_mean_holds_it_in_95_of_100() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(1.0, (200, 60))
    hits = sum(covered(*bootstrap_mean(values), 1.0) for values in draws)
    # Percentile intervals of a skewed mean of 60 values hold it in about 93 %; the count of 200 has
    # a standard deviation of 4.
    assert hits >= 186 - 4 * 4


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    interval = jackknife(values.mean(), (400,), lambda own: float(values[own].mean()))
    assert interval is not None
    blocks = np.array([values[np.arange(400) % 20 == b].mean() for b in range(20)])
    error = blocks.std(ddof=1) / np.sqrt(20)
    assert np.allclose(interval, [values.mean() - 2.093 * error, values.mean() + 2.093 * error])


def test_the_jackknife_of_a_frechet_distance_holds_its_mean() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 60, 200, 4))
    a += 0.7
    found = [frechet(x, y) for x, y in zip(a, b, strict=True)]
    hits = 0
    for value, x, y in zip(found, a, b, strict=True):
        interval = jackknife(value, (200, 200), lambda p, q, x=x, y=y: frechet(x[p], y[q]))
        assert interval is not None
        hits += covered(*interval, float(np.mean(found)))
    # 95 % of 60 is 57, with a standard deviation of 1.7.
    assert hits >= 57 - 4 * 1.7


def test_kernel_distances_of_equal_distributions_have_mean_zero_and_the_right_spread() -> None:
    rng = np.random.default_rng(3)
    values = np.array(
        [kernel_distance(*rng.standard_normal((2, 40, 3)), bandwidth=2.0) for _ in range(200)]
    )
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    # Under the null the variance of the U-statistic is 2 (1/(n(n-1)) + 1/(m(m-1)) + 2/(nm)) times
    # that of the doubly centred kernel (Gretton et al., 2012), here from a large sample.
    x = rng.standard_normal((1500, 3))
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(axis=2) / 8)
    centred = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
    off = ~np.eye(len(x), dtype=bool)
    n = 40
    variance = 2 * (2 / (n * (n - 1)) + 2 / n**2) * float((centred[off] ** 2).mean())
    # The variance of 200 values is known to sqrt(2 / 200), more for the heavy tail: twice that.
    assert abs(values.var(ddof=1) / (100**2 * variance) - 1) < 4 * 2 * np.sqrt(2 / 200)


def test_few_clips_have_no_interval_and_no_halves() -> None:
    assert jackknife(1.0, (19, 30), lambda a, b: 0.0) is None
    with pytest.raises(InputError, match="at least 4"):
        halves(3)


def test_halves_share_nothing() -> None:
    for one, other in halves(9):
        assert len(one) == len(other) == 4
        assert not set(one) & set(other)


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=1)


def test_equal_trainings_leave_the_interval_over_clips() -> None:
    values = np.random.default_rng(0).standard_normal(80)
    interval = nested_bootstrap(np.stack([values] * 3), _mean)
    error = values.std() / np.sqrt(80)
    # 1,000 resamples place a 2.5 % quantile to about 0.08 standard errors.
    assert np.allclose(
        interval, [values.mean() - 1.96 * error, values.mean() + 1.96 * error], atol=0.35 * error
    )
    assert nested_bootstrap(np.stack([values] * 3), _mean, np.stack([values] * 3)) == (0, 0)


def test_trainings_widen_it() -> None:
    """Clips that are all alike leave the trainings' spread, as the unbiased variance has it."""
    levels = np.random.default_rng(0).standard_normal(200)
    low, high = nested_bootstrap(np.repeat(levels[:, None], 5, axis=1), _mean)
    error = levels.std(ddof=1) / np.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)  # 1,000 resamples
    few = nested_bootstrap(np.repeat(np.array([[0.0], [1.0], [2.0]]), 5, axis=1), _mean)
    # Three trainings: the largest mean is that of the third one thrice, 1 above the middle.
    assert few == pytest.approx((1 - 1.5**0.5, 1 + 1.5**0.5))
    with pytest.raises(InputError, match="Use more seeds"):
        nested_bootstrap(np.zeros((1, 5)), _mean)


def test_students_interval() -> None:
    # Mean 2, standard deviation 1, three values: 2 ± 4.303 / √3.
    assert student(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)
    with pytest.raises(InputError, match="1 seeds"):
        student(np.array([1.0]))
