"""Fréchet distance between two sets of embeddings, each taken as a Gaussian, in float64."""

from __future__ import annotations

import numpy as np

from mfmjt.errors import InputError

__all__ = ["frechet_distance", "gaussian_frechet_distance"]


def _sqrtm(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix (d, d)."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def gaussian_frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½), the squared Wasserstein-2 distance.

    (Dowson and Landau 1982.) The symmetric form needs only eigenvalues of symmetric matrices, so
    nothing turns complex and singular covariances (fewer samples than dimensions) need no epsilon.

    Args:
        mean_a: (d,).
        covariance_a: (d, d), symmetric positive semi-definite.
        mean_b: (d,).
        covariance_b: (d, d), symmetric positive semi-definite.

    Returns:
        The distance, not below 0.
    """
    covariance_a = np.asarray(covariance_a, dtype=np.float64)
    covariance_b = np.asarray(covariance_b, dtype=np.float64)
    root = _sqrtm(covariance_a)
    product = root @ covariance_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    shift = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of embeddings.

    Biased upwards for few samples: compare sets of equal size only.

    Args:
        a: Embeddings (n, d), at least two.
        b: Embeddings (m, d), at least two.

    Returns:
        The distance, in squared units of the embedding.

    Raises:
        InputError: Other shapes, fewer than two samples, or values that are not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"The Fréchet distance compares two sets of at least 2 embeddings of one size: "
            f"got {a.shape} and {b.shape}. Use more clips."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("The embeddings hold NaN or infinite values. Check the generated audio.")
    return gaussian_frechet_distance(
        a.mean(axis=0),
        np.cov(a, rowvar=False).reshape(a.shape[1], -1),
        b.mean(axis=0),
        np.cov(b, rowvar=False).reshape(b.shape[1], -1),
    )
