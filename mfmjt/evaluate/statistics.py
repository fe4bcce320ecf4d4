"""What is computed of features: distances between sets, divergences, scores; all in float64.

Features are arrays or tensors with one row for each clip (or piece of one), logits and embeddings
alike. Of two sets the generated one comes first, as in `frechet(generated, reference)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mfmjt.errors import InputError

__all__ = [
    "cosine",
    "frechet",
    "frechet_unbiased",
    "inception_score",
    "kernel_distance",
    "kernel_inception_distance",
    "kl_sigmoid",
    "kl_softmax",
    "median_distance",
    "softmax_divergences",
]

Features: TypeAlias = "np.ndarray | Tensor"

_ROWS = 1024  # of a kernel matrix at once


def _rows(values: Features, name: str, least: int = 1) -> Tensor:
    """Return features as float64 `(n, d)`, or say what is wrong with them."""
    x = torch.as_tensor(values).detach()
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(
            f"The {name} features have the shape {tuple(x.shape)}: (clips, width) is needed."
        )
    if len(x) < least:
        raise InputError(
            f"There are {len(x)} {name} features: at least {least} are needed. Use more clips."
        )
    x = x.double()
    if bad := int((~x.isfinite()).any(dim=1).sum()):
        raise InputError(
            f"Of the {len(x):,} {name} features {bad:,} hold NaN or infinite values. Check the "
            "sounds that they are of."
        )
    return x


def _two_sets(generated: Features, reference: Features, least: int) -> tuple[Tensor, Tensor]:
    a, b = _rows(generated, "generated", least), _rows(reference, "reference", least)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"The generated features are {a.shape[1]} wide, the reference features {b.shape[1]}: "
            "take both from one network."
        )
    return a, b.to(a.device)


def _pairs(generated: Features, reference: Features) -> tuple[Tensor, Tensor]:
    a, b = _two_sets(generated, reference, 1)
    if len(a) != len(b):
        raise InputError(
            f"There are {len(a):,} generated features and {len(b):,} reference features: clips are "
            "compared pair by pair. Give one of each, in the same order."
        )
    return a, b


def _root(x: Tensor) -> Tensor:
    """Return R with at most `min(n, d)` rows, of which R^T R is the covariance of `(n, d)`."""
    centred = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    return torch.linalg.qr(centred, mode="r")[1] if len(x) > x.shape[1] else centred


def frechet(generated: Features, reference: Features) -> float:
    """Return the Fréchet distance between the Gaussians fitted to two sets.

    |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), with covariances over n - 1 (Heusel et al., 2017,
    arXiv:1706.08500). With C = RᵀR the last trace is the sum of the singular values of R_a R_bᵀ:
    nothing turns complex, and singular covariances (fewer samples than dimensions) need no epsilon.

    Biased upwards for few samples: compare sets of equal size only.

    Args:
        generated: Embeddings `(n, d)`, at least two.
        reference: Embeddings `(m, d)`, at least two.

    Returns:
        The distance in squared units of the embedding, not below 0.

    Raises:
        InputError: Other shapes, widths that differ, fewer than two rows, or values that are not
            finite.
    """
    a, b = _two_sets(generated, reference, 2)
    return max(_frechet(a, b, _root(a), _root(b)), 0.0)


def _frechet(a: Tensor, b: Tensor, root_a: Tensor, root_b: Tensor) -> float:
    shift = a.mean(dim=0) - b.mean(dim=0)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    total = shift.square().sum() + root_a.square().sum() + root_b.square().sum()
    return float(total - 2 * cross)


def frechet_unbiased(generated: Features, reference: Features) -> float:
    """Return `frechet` less what it is too large by, because the sets are finite.

    For two samples of Gaussians with covariances near C, whose eigenvalues are λ,

        E[frechet] - truth ≈ tr C_a / n + tr C_b / m
                             + (1/n + 1/m) (tr C / 4 + ½ Σ_ij λ_i λ_j / (λ_i + λ_j)),

    the error of the means and, to second order, that of the covariances; C is (C_a + C_b) / 2. The
    expansion holds where n and m are well above the number of eigenvalues that matter; elsewhere
    use `kernel_distance`.

    Args:
        generated: Embeddings `(n, d)`, at least two.
        reference: Embeddings `(m, d)`, at least two.

    Returns:
        The estimate, which varies around 0 for two samples of one distribution.

    Raises:
        InputError: As for `frechet`.
    """
    a, b = _two_sets(generated, reference, 2)
    root_a, root_b = _root(a), _root(b)
    values = torch.linalg.svdvals(torch.cat([root_a, root_b])).square() / 2
    values = values[values > 0]
    # λ_i λ_j / (λ_i + λ_j), one row at a time
    pairs = sum(float((value * values / (value + values)).sum()) for value in values)
    means = root_a.square().sum() / len(a) + root_b.square().sum() / len(b)
    spreads = (1 / len(a) + 1 / len(b)) * (values.sum() / 4 + pairs / 2)
    return _frechet(a, b, root_a, root_b) - float(means + spreads)


def softmax_divergences(generated_logits: Features, reference_logits: Features) -> np.ndarray:
    """Return KL(reference || generated) of the softmax of each pair of clips, `(n,)`, in nats.

    Raises:
        InputError: Other shapes than `(n, classes)` twice, or values that are not finite.
    """
    a, b = _pairs(generated_logits, reference_logits)
    log_p = F.log_softmax(b, dim=1)
    return (log_p.exp() * (log_p - F.log_softmax(a, dim=1))).sum(dim=1).cpu().numpy()


def kl_softmax(generated_logits: Features, reference_logits: Features) -> float:
    """Return the mean of KL(reference || generated) over pairs of clips, in nats.

    Args:
        generated_logits: Logits `(n, classes)` of which the softmax is compared.
        reference_logits: The same of the real clips, in the same order.

    Returns:
        The mean; without any epsilon.

    Raises:
        InputError: Other shapes, or values that are not finite.
    """
    return float(softmax_divergences(generated_logits, reference_logits).mean())


def kl_sigmoid(generated_logits: Features, reference_logits: Features) -> float:
    """Return av-benchmark's `kl_sigmoid`: the mean of Σ_c s (ln s - ln ŝ), s = sigmoid(logit).

    That is the positive half of the divergence between independent labels and may be negative. It
    is here for comparison with published numbers only.

    Args:
        generated_logits: Logits `(n, classes)`, of ŝ.
        reference_logits: The same of the real clips, in the same order.

    Raises:
        InputError: Other shapes, or values that are not finite.
    """
    a, b = _pairs(generated_logits, reference_logits)
    terms = b.sigmoid() * (F.logsigmoid(b) - F.logsigmoid(a))
    return float(terms.sum(dim=1).mean())


def inception_score(logits: Features, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Return exp(mean KL(p(y|x) || p(y))) over splits of the clips (Salimans et al., 2016).

    A split's score is at most its number of clips, and too small for small splits: below some
    thousand clips take one split, and compare equal numbers of clips only.

    Args:
        logits: `(n, classes)` of the generated clips.
        splits: Number of parts, which are equal up to one clip.
        seed: Of NumPy's `RandomState`, whose permutation comes before the division.

    Returns:
        Mean and standard deviation (over n) of the splits' scores.

    Raises:
        InputError: Fewer clips than splits, other shapes, or values that are not finite.
    """
    if splits < 1:
        raise InputError(f"{splits} splits: at least 1 is needed.")
    x = _rows(logits, "generated", splits)
    order = np.random.RandomState(seed).permutation(len(x))
    log_p = F.log_softmax(x[torch.from_numpy(order).to(x.device)], dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(x) // splits : (i + 1) * len(x) // splits]
        log_mean = part.logsumexp(dim=0) - math.log(len(part))
        scores.append(math.exp(float((part.exp() * (part - log_mean)).sum(dim=1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    generated: Features, reference: Features, bandwidth: float | None = None
) -> float:
    """Return the kernel audio distance (KAD) of Chung et al., 2025, arXiv:2502.15602.

    100 times the unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012)
    with the kernel exp(-|x - y|² / 2σ²). It has the right mean at any number of clips, so it may be
    a little below 0. Time grows with (n + m)² d, memory with n + m.

    Args:
        generated: Embeddings `(n, d)`, at least two.
        reference: Embeddings `(m, d)`, at least two.
        bandwidth: σ; by default `median_distance(reference)`.

    Returns:
        The distance times 100.

    Raises:
        InputError: Other shapes, fewer than two rows, values that are not finite, or a bandwidth
            that is not positive, such as that of equal references.
    """
    a, b = _two_sets(generated, reference, 2)
    sigma = median_distance(b) if bandwidth is None else bandwidth
    if not sigma > 0:
        raise InputError(
            f"The bandwidth is {sigma:g}: it must be positive. Use reference clips that differ."
        )
    # Differences of large squares lose digits: both sets around the same point lose fewer.
    middle = b.mean(dim=0)
    a, b = a - middle, b - middle

    def mean(blocks: Iterable[Tensor], count: int) -> float:
        return sum(float(torch.exp(block / (-2 * sigma**2)).sum()) for block in blocks) / count

    within = sum(mean(_squared_pairs(x), len(x) * (len(x) - 1) // 2) for x in (a, b))
    across = mean((_squares(rows, b) for rows in a.split(_ROWS)), len(a) * len(b))
    return 100 * (within - 2 * across)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances `(n, m)` of rows `(n, d)` and `(m, d)`."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)


def median_distance(features: Features) -> float:
    """Return the median Euclidean distance between two rows of a set `(n, d)`, of n (n - 1) / 2.

    It is exact for any n; beyond some thousand rows, a small part of the pairs is kept at a time.

    Raises:
        InputError: Fewer than two rows, another shape, or values that are not finite.
    """
    x = _rows(features, "reference", 2)
    x = x - x.mean(dim=0)
    # The median of evenly spaced rows tells where to look; only pairs near it are kept.
    sample = _joined(_squared_pairs(x[:: -(-len(x) // (2 * _ROWS))]))
    if len(x) <= 2 * _ROWS:
        return float(np.median(sample) ** 0.5)
    count = len(x) * (len(x) - 1) // 2
    middle = np.array([(count - 1) // 2, count // 2])
    brackets = [np.quantile(sample, (0.5 - part, 0.5 + part)) for part in (0.02, 0.1)]
    for low, high in (*brackets, (-np.inf, np.inf)):
        below, near = 0, []
        for block in _squared_pairs(x):
            below += int((block < low).sum())
            near.append(block[(block >= low) & (block <= high)])
        kept = np.sort(_joined(near))
        if below <= middle[0] and middle[1] < below + len(kept):
            break
    return float(kept[middle - below].mean() ** 0.5)


def _joined(blocks: Iterable[Tensor]) -> np.ndarray:
    return torch.cat(list(blocks)).cpu().numpy()


def _squared_pairs(x: Tensor) -> Iterator[Tensor]:
    """Yield the squared distances of all pairs of different rows, block by block."""
    for start in range(0, len(x), _ROWS):
        block = _squares(x[start : start + _ROWS], x[start:])
        yield block[torch.ones_like(block, dtype=torch.bool).triu(diagonal=1)]


def kernel_inception_distance(
    generated: Features,
    reference: Features,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Return the mean and standard deviation of KID (Binkowski et al., 2018) over random subsets.

    The unbiased squared maximum mean discrepancy with the kernel (xᵀy / d + 1)³. Subsets are drawn
    without replacement from NumPy's `RandomState`, in turn from both sets, as torch-fidelity does.

    Args:
        generated: Embeddings `(n, d)`.
        reference: Embeddings `(m, d)`.
        subsets: How many pairs of subsets.
        subset_size: Rows in each, at least two and at most n and m.
        seed: Of the random numbers.

    Returns:
        Mean and standard deviation (over the number of subsets).

    Raises:
        InputError: Sets smaller than a subset, other shapes, or values that are not finite.
    """
    if subsets < 1 or subset_size < 2:
        raise InputError(f"{subsets} subsets of {subset_size}: 1 of 2 is the least.")
    a, b = _two_sets(generated, reference, subset_size)
    rng = np.random.RandomState(seed)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    found = []
    for _ in range(subsets):
        x, y = (
            rows[torch.from_numpy(rng.choice(len(rows), subset_size, replace=False)).to(a.device)]
            for rows in (a, b)
        )
        within = sum(float(k.sum() - k.trace()) for k in (kernel(x, x), kernel(y, y)))
        across = 2 * float(kernel(x, y).mean())
        found.append(within / (subset_size * (subset_size - 1)) - across)
    return float(np.mean(found)), float(np.std(found))


def cosine(a: Features, b: Features) -> np.ndarray:
    """Return the cosine of each pair of rows, `(n,)`; norms below 1e-8 count as 1e-8.

    The mean over pairs of clips is the IB-score for ImageBind's embeddings of frames and of sound,
    and the CLAP score for embeddings of captions and of sound.

    Raises:
        InputError: Other shapes than `(n, d)` twice, or values that are not finite.
    """
    return F.cosine_similarity(*_pairs(a, b), dim=1, eps=1e-8).cpu().numpy()
