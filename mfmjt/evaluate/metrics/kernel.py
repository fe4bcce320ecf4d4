"""Kernel audio distance: a distance between sets that has no bias at any number of clips."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.intervals import halves, jackknife
from mfmjt.evaluate.sounds import Sounds
from mfmjt.evaluate.statistics import kernel_distance, median_distance

__all__ = ["KAD_PANNS", "KAD_PASST", "KAD_VGGISH", "KAD_YAMNET"]

LARGEST = 5000
"""Clips up to which there are intervals: each takes 20 times the work of the value."""


def _metric(network: str, title: str) -> Metric:
    key = f"kad_{network}"

    def score(made: Sounds, real: Sounds, known: Known) -> Score | None:
        """Measure the squared maximum mean discrepancy, times 100, without bias.

        The bandwidth is the median distance between real clips, whatever is compared with them. A
        clip of several pieces counts as their mean. For sets of one distribution the mean is 0, so
        a value may be a little negative. The interval is a jackknife over blocks of clips.
        """
        a, b = (_means(sounds.heard(network, "embedding", "kad")) for sounds in (made, real))
        sigma = median_distance(b)
        value = kernel_distance(a, b, sigma)
        figures, interval = {key: value}, {}
        if max(len(a), len(b)) <= LARGEST:

            def without(own: np.ndarray, other: np.ndarray) -> float:
                return kernel_distance(a[own], b[other], sigma)

            if (found := jackknife(value, (len(a), len(b)), without)) is not None:
                interval[key] = found
        if len(b) >= 8:
            pairs = halves(len(b))
            floor = [kernel_distance(b[one], b[other], sigma) for one, other in pairs]
            figures[f"{key}_real"] = float(np.mean(floor))
        return Score(figures, interval)

    figures = (Figure(key, title, 3, f"{key}_real", "", "lower"), Figure(f"{key}_real"))
    return Metric(key, figures, score, (network,))


def _means(clips: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.atleast_2d(clip).mean(axis=0, dtype=np.float64) for clip in clips])


KAD_VGGISH = _metric("vggish", "KAD (VGGish)")
KAD_PANNS = _metric("panns", "KAD (PANNs)")
KAD_PASST = _metric("passt", "KAD (PaSST)")
KAD_YAMNET = _metric("yamnet", "KAD (YAMNet)")
