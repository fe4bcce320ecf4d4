"""Fréchet distances: FAD (VGGish), and FD in the embeddings of PANNs, PaSST and YAMNet."""

from __future__ import annotations

import numpy as np

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.intervals import halves, jackknife
from mfmjt.evaluate.sounds import Sounds
from mfmjt.evaluate.statistics import frechet, frechet_unbiased

__all__ = ["FD_PANNS", "FD_PASST", "FD_VGGISH", "FD_YAMNET"]

Rows = list[np.ndarray]
"""Embeddings of each clip, (d,) or (pieces, d)."""


def _metric(network: str, title: str) -> Metric:
    key = f"fd_{network}"

    def score(made: Sounds, real: Sounds, known: Known) -> Score | None:
        """Measure how far the embeddings of both sets are from one another.

        Three figures: the distance itself, as it is published; the distance less its bias in
        closed form (for FAD-infinity), where there are no fewer embeddings than dimensions; and the
        mean distance of random halves of the generated clips from the other halves of the real
        ones, beside that of the real halves from each other: what perfect sound would get at that
        size.

        The interval is a jackknife over blocks of clips, in which the pieces of a clip stay
        together; no bootstrap, which would count clips twice and lie above the value. That of the
        unbiased figure has the same width, since the bias hardly moves with the clips.
        """
        a, b = (sounds.heard(network, "embedding", "fd") for sounds in (made, real))
        rows, others = _rows(a), _rows(b)
        value = frechet(rows, others)
        figures, interval = {key: value}, {}
        enough = min(len(rows), len(others)) >= rows.shape[1]
        if enough:
            figures[f"{key}_unbiased"] = frechet_unbiased(rows, others)

        def without(own: np.ndarray, other: np.ndarray) -> float:
            return frechet(_rows(a, own), _rows(b, other))

        if (found := jackknife(value, (len(a), len(b)), without)) is not None:
            interval[key] = found
            if enough:
                low, high = (end - value + figures[f"{key}_unbiased"] for end in found)
                interval[f"{key}_unbiased"] = (low, high)
        if min(len(a), len(b)) >= 8:
            half, floor, zero = [], [], []
            for one, other in halves(min(len(a), len(b))):
                rest = _rows(b, other)
                half.append(frechet(_rows(a, one), rest))
                floor.append(frechet(_rows(b, one), rest))
                if enough:
                    zero.append(frechet_unbiased(_rows(b, one), rest))
            figures[f"{key}_half"] = float(np.mean(half))
            figures[f"{key}_half_real"] = float(np.mean(floor))
            if zero:
                figures[f"{key}_unbiased_real"] = float(np.mean(zero))
        return Score(figures, interval)

    figures = (
        Figure(key, title, 3, better="lower"),
        Figure(
            f"{key}_unbiased", f"{title}, less its bias", 3, f"{key}_unbiased_real", "", "lower"
        ),
        Figure(f"{key}_half", f"{title} of halves", 3, f"{key}_half_real", "", "lower"),
        Figure(f"{key}_unbiased_real"),
        Figure(f"{key}_half_real"),
    )
    return Metric(key, figures, score, (network,))


def _rows(clips: Rows, kept: np.ndarray | None = None) -> np.ndarray:
    """Return the rows of all clips, or of those of a mask or of indices, (rows, d)."""
    chosen = range(len(clips)) if kept is None else np.arange(len(clips))[kept]
    return np.concatenate([np.atleast_2d(clips[i]) for i in chosen])


FD_VGGISH = _metric("vggish", "FAD (VGGish)")
FD_PANNS = _metric("panns", "FD (PANNs)")
FD_PASST = _metric("passt", "FD (PaSST)")
FD_YAMNET = _metric("yamnet", "FD (YAMNet)")
