from __future__ import annotations

import numpy as np
import pytest

from mfmjt.errors import InputError
from mfmjt.evaluate.frechet import frechet_distance, gaussian_frechet_distance

EPS = np.finfo(np.float64).eps


def spread(values: np.ndarray) -> float:
    return float(values.var(axis=0, ddof=1).sum() + (values.mean(axis=0) ** 2).sum())


def rounding(a: np.ndarray, b: np.ndarray) -> float:
    """Eigenvalues that should vanish are off by d eps scale, and enter under a square root."""
    d = a.shape[1]
    return d * np.sqrt(d * EPS) * (spread(a) + spread(b))


def test_one_dimension_has_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (50, 1)), rng.normal(-3, 0.5, (80, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert abs(frechet_distance(a, b) - expected) < rounding(a, b)


def test_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    left, right = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    left[0] = 0  # a singular covariance needs no epsilon
    mean_a, mean_b = rng.standard_normal((2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(left) - np.sqrt(right)) ** 2).sum()
    found = gaussian_frechet_distance(
        mean_a, basis * left @ basis.T, mean_b, basis * right @ basis.T
    )
    assert abs(found - expected) < 6 * np.sqrt(6 * EPS) * (left.sum() + right.sum() + expected)


def test_a_pushforward_by_a_symmetric_map_costs_its_distance_from_identity() -> None:
    # For y = A x with A symmetric positive, A is the optimal map, and the cost is E|Ax - x|².
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 5))
    root = rng.standard_normal((5, 5))
    forward = root @ root.T + np.eye(5)
    y = x @ forward
    expected = ((y - x).mean(axis=0) ** 2).sum() + np.trace(np.cov(y - x, rowvar=False))
    assert abs(frechet_distance(x, y) - expected) < rounding(x, y)


def test_it_is_zero_for_equal_sets_and_symmetric_and_blind_to_order() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((40, 8)), rng.standard_normal((30, 8)) * 2
    assert frechet_distance(a, a) < rounding(a, a)
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < rounding(a, b)
    assert abs(frechet_distance(a[::-1], b) - frechet_distance(a, b)) < rounding(a, b)


def test_a_shift_alone_costs_its_square() -> None:
    a = np.random.default_rng(4).standard_normal((40, 8))
    shift = np.arange(8.0)
    assert abs(frechet_distance(a, a + shift) - shift @ shift) < rounding(a, a + shift)


def test_fewer_samples_than_dimensions_agree_with_the_nuclear_norm() -> None:
    # tr (C_a^½ C_b C_a^½)^½ is the nuclear norm of the product of the centred samples.
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((7, 32)), rng.standard_normal((9, 32)) + 1
    centred_a, centred_b = a - a.mean(axis=0), b - b.mean(axis=0)
    cross = np.linalg.norm(centred_a @ centred_b.T, "nuc") / np.sqrt(6 * 8)
    shift = a.mean(axis=0) - b.mean(axis=0)
    total = np.square(centred_a).sum() / 6 + np.square(centred_b).sum() / 8
    expected = shift @ shift + total - 2 * cross
    assert abs(frechet_distance(a, b) - expected) < rounding(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4))),
        (np.zeros((5, 4)), np.zeros((5, 3))),
        (np.zeros(5), np.zeros(5)),
        (np.full((5, 4), np.nan), np.zeros((5, 4))),
    ],
    ids=["one sample", "other sizes", "no samples axis", "not finite"],
)
def test_what_has_no_distance_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(InputError):
        frechet_distance(a, b)
