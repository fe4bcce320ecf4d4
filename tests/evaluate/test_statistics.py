from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mfmjt.errors import InputError
from mfmjt.evaluate import statistics as S

EPS = np.finfo(np.float64).eps
SINGLE = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def vector() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "vectors" / "statistics.safetensors")


def near(found: float, vector: dict[str, torch.Tensor], name: str, terms: int = 4) -> None:
    """The public functions keep means or kernels in float32; the rest is float64."""
    truth = float(vector[f"out.{name}"])
    assert abs(found - truth) <= (4 + math.sqrt(terms)) * SINGLE * max(1.0, abs(truth)), name


def test_equals_the_public_functions(vector) -> None:
    made, real = vector["in.features_generated"], vector["in.features_real"]
    near(S.frechet(made, real), vector, "fd")
    near(S.frechet(real, made), vector, "fd_swapped")
    near(S.frechet(real, real), vector, "fd_same")
    near(S.frechet(vector["in.wide_generated"], vector["in.wide_real"]), vector, "fd_wide")
    mean, std = S.kernel_inception_distance(made, real, subsets=20, subset_size=150)
    near(mean, vector, "kid_mean", 64)
    near(std, vector, "kid_std", 64)
    made, real = vector["in.logits_generated"], vector["in.logits_real"]
    near(S.kl_softmax(made, real), vector, "kl_softmax")
    near(S.kl_sigmoid(made, real), vector, "kl_sigmoid")
    near(S.inception_score(made, splits=1)[0], vector, "isc1_mean")
    for logits, name in ((made, "isc10"), (real, "isc10_real")):
        mean, std = S.inception_score(logits)
        near(mean, vector, f"{name}_mean")
        near(std, vector, f"{name}_std")
    found = S.cosine(vector["in.embedding_audio"], vector["in.embedding_video"])
    np.testing.assert_allclose(found, vector["out.cosine"].numpy(), rtol=0, atol=8 * SINGLE)
    near(float(found.mean()), vector, "cosine_mean")


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return n rows whose sample mean and covariance are these up to rounding."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    q, _ = np.linalg.qr(x - x.mean(axis=0))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    return mean + math.sqrt(n - 1) * q @ root


def spread(values: np.ndarray) -> float:
    return float(values.var(axis=0, ddof=1).sum() + (values.mean(axis=0) ** 2).sum())


def rounding(a: np.ndarray, b: np.ndarray) -> float:
    """Sums over n rows and d columns, then singular values off by d eps of the largest."""
    return (math.sqrt(len(a) + len(b)) + 10 * a.shape[1]) * EPS * (spread(a) + spread(b))


def test_frechet_in_one_dimension_has_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (50, 1)), rng.normal(-3, 0.5, (80, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert abs(S.frechet(a, b) - expected) < rounding(a, b)


def test_frechet_of_gaussians_whose_covariances_commute_has_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    left, right = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    mean_a, mean_b = rng.standard_normal((2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(left) - np.sqrt(right)) ** 2).sum()
    a = with_moments(mean_a, basis * left @ basis.T, 50, 2)
    b = with_moments(mean_b, basis * right @ basis.T, 60, 3)
    assert abs(S.frechet(a, b) - expected) < rounding(a, b)
    a[:, 0] = 1.0  # a singular covariance needs no epsilon
    assert S.frechet(a, a) < rounding(a, a)


def test_frechet_of_a_pushforward_by_a_symmetric_map_is_its_cost() -> None:
    # For y = A x with A symmetric positive, A is the optimal map, and the cost is E|Ax - x|².
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 5))
    root = rng.standard_normal((5, 5))
    y = x @ (root @ root.T + np.eye(5))
    expected = ((y - x).mean(axis=0) ** 2).sum() + np.trace(np.cov(y - x, rowvar=False))
    assert abs(S.frechet(x, y) - expected) < rounding(x, y)


def test_frechet_is_zero_for_equal_sets_and_symmetric_and_blind_to_order() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((40, 8)), rng.standard_normal((30, 8)) * 2
    assert S.frechet(a, a) < rounding(a, a)
    assert abs(S.frechet(a, b) - S.frechet(b, a)) < rounding(a, b)
    assert abs(S.frechet(a[::-1].copy(), b) - S.frechet(a, b)) < rounding(a, b)
    shift = np.arange(8.0)
    assert abs(S.frechet(a, a + shift) - shift @ shift) < rounding(a, a + shift)


def test_frechet_with_fewer_samples_than_dimensions_agrees_with_eigenvalues() -> None:
    # tr (C_a C_b)^½ is the sum of the roots of the eigenvalues of C_a^½ C_b C_a^½.
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((7, 32)), rng.standard_normal((9, 32)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    expected = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    # Eigenvalues that should vanish are off by d eps scale, and enter under a square root.
    allowed = 32 * np.sqrt(32 * EPS) * (spread(a) + spread(b))
    assert abs(S.frechet(a, b) - expected) < allowed


def test_the_correction_takes_the_bias_of_frechet_away() -> None:
    rng = np.random.default_rng(6)
    scale = np.arange(1, 17) ** -0.5
    plain, corrected = [], []
    for _ in range(200):
        a, b = (rng.standard_normal((n, 16)) * scale for n in (150, 250))
        plain.append(S.frechet(a, b))
        corrected.append(S.frechet_unbiased(a, b))
    error = np.std(corrected) / math.sqrt(200)
    # Four standard errors, and the third order of the expansion: a share of about d / n of it.
    assert abs(np.mean(corrected)) < 4 * error + 16 / 150 * np.mean(plain)
    assert np.mean(plain) > 10 * error


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert S.kl_softmax(np.log(q) + 3, np.log(p) - 5) == pytest.approx(expected, rel=16 * EPS)
    assert S.kl_softmax(p, p) == 0
    both = S.softmax_divergences(np.log([p[0], q[0]]), np.log([p[0], p[0]]))
    np.testing.assert_allclose(both, [0, -expected + 2 * expected], atol=16 * EPS)


def test_inception_score_of_known_distributions() -> None:
    confident = 1e3 * np.eye(4)[np.arange(40) % 4]
    assert S.inception_score(confident, splits=1) == (pytest.approx(4, rel=64 * EPS), 0)
    assert S.inception_score(np.ones((40, 4))) == (pytest.approx(1, rel=64 * EPS), 0)
    # Halves of two distributions: the exponential of their Jensen-Shannon divergence.
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]])
    expected = math.exp((p * np.log(p / p.mean(axis=0))).sum() / 2)
    found = S.inception_score(np.log(p).repeat(20, axis=0), splits=1)[0]
    assert found == pytest.approx(expected, rel=64 * EPS)


def test_kernel_distance_is_its_definition() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 0.5

    def squares(x, y):
        return ((x[:, None] - y) ** 2).sum(axis=2)

    upper = np.triu_indices(7, k=1)
    sigma = np.median(np.sqrt(squares(b, b)[upper]))
    k_aa, k_bb, k_ab = (
        np.exp(-squares(x, y) / (2 * sigma**2)) for x, y in ((a, a), (b, b), (a, b))
    )
    within = sum((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb))
    expected = 100 * (within - 2 * k_ab.mean())
    assert S.median_distance(b) == pytest.approx(sigma, rel=16 * EPS)
    assert S.kernel_distance(a, b) == pytest.approx(expected, rel=1e3 * EPS)
    # A common shift changes nothing, be it far.
    assert S.kernel_distance(a + 1e3, b + 1e3) == pytest.approx(expected, rel=1e3 * 1e3 * EPS)


def test_kernel_distance_of_equal_distributions_has_mean_0_and_the_right_spread() -> None:
    n, m, d, sigma, draws = 60, 80, 4, 2.0, 200
    rng = np.random.default_rng(8)
    found = [
        S.kernel_distance(rng.standard_normal((n, d)), rng.standard_normal((m, d)), sigma) / 100
        for _ in range(draws)
    ]
    # Variance of the two-sample U-statistic where both samples are of one distribution: that of
    # the centered kernel, whose moments are Gaussian integrals here.
    s = sigma**2
    mean = (s / (s + 2)) ** (d / 2)
    square = (s / (s + 4)) ** (d / 2)
    of_means = (s / (s + 1)) ** d * ((s + 1) / (s + 3)) ** (d / 2)
    centered = square - 2 * of_means + mean**2
    variance = (2 / (n * (n - 1)) + 2 / (m * (m - 1)) + 4 / (n * m)) * centered
    assert abs(np.mean(found)) < 4 * math.sqrt(variance / draws)
    # Its distribution is a weighted sum of chi-squares: fourth moments are a few times Gaussian's.
    assert abs(np.var(found) / variance - 1) < 4 * math.sqrt(5 / draws)


def test_the_median_of_many_pairs_is_exact() -> None:
    x = np.random.default_rng(9).standard_normal((2200, 3))
    x[:1500] *= 0.01  # so that evenly spaced rows tell little about where the median is
    truth = np.median(torch.pdist(torch.from_numpy(x)).numpy())
    # Squares of distances are differences of squares of norms.
    allowed = 16 * EPS * float((x**2).sum(axis=1).max()) / truth
    assert S.median_distance(x) == pytest.approx(truth, abs=allowed)
    split = np.concatenate([np.zeros((1100, 3)), np.ones((1100, 3))])
    assert S.median_distance(split[np.argsort(np.arange(2200) % 2)]) == pytest.approx(3**0.5)


def test_kernel_inception_distance_of_a_subset_that_is_everything() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal((6, 3))
    kernel = [(x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = sum((k.sum() - np.trace(k)) / 30 for k in kernel[:2])
    mean, std = S.kernel_inception_distance(a, b, subsets=3, subset_size=6)
    assert mean == pytest.approx(within - 2 * kernel[2].mean(), rel=1e3 * EPS)
    assert std == pytest.approx(0, abs=1e3 * EPS)


TWO_SETS = [
    S.frechet,
    S.frechet_unbiased,
    S.kernel_distance,
    S.kl_softmax,
    S.kl_sigmoid,
    S.cosine,
]


@pytest.mark.parametrize("statistic", TWO_SETS)
def test_arrays_and_tensors_of_any_precision_are_taken(statistic) -> None:
    a, b = np.random.default_rng(11).standard_normal((2, 5, 3)).astype(np.float16)
    truth = statistic(a.astype(np.float64), b.astype(np.float64))
    other = statistic(torch.from_numpy(a).float().requires_grad_(), torch.from_numpy(b))
    np.testing.assert_array_equal(statistic(a, b), truth)
    np.testing.assert_array_equal(other, truth)


@pytest.mark.parametrize("statistic", TWO_SETS)
@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.zeros((0, 4)), np.zeros((5, 4)), "0 generated"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "4 wide.* 3"),
        (np.zeros(5), np.zeros((5, 1)), r"generated features have the shape \(5,\)"),
        (np.zeros((5, 4)), np.full((5, 4), np.nan), "5 reference .* 5 hold NaN"),
    ],
    ids=["no clips", "other widths", "no clips axis", "not finite"],
)
def test_what_cannot_be_compared_is_refused(statistic, a, b, said) -> None:
    with pytest.raises(InputError, match=said):
        statistic(a, b)


def test_too_few_clips_are_refused() -> None:
    one, five = np.zeros((1, 4)), np.zeros((5, 4))
    for statistic in (S.frechet, S.frechet_unbiased, S.kernel_distance):
        with pytest.raises(InputError, match=r"1 generated .* at least 2"):
            statistic(one, five)
    for statistic in (S.kl_softmax, S.kl_sigmoid, S.cosine):
        with pytest.raises(InputError, match=r"1 generated .* 5 reference .* pair by pair"):
            statistic(one, five)
    with pytest.raises(InputError, match="at least 10"):
        S.inception_score(five)
    with pytest.raises(InputError, match="0 splits"):
        S.inception_score(five, splits=0)
    with pytest.raises(InputError, match="at least 1000"):
        S.kernel_inception_distance(five, five)
    with pytest.raises(InputError, match="1 of 2"):
        S.kernel_inception_distance(five, five, subset_size=1)
    with pytest.raises(InputError, match="bandwidth is 0"):
        S.kernel_distance(five, five)
