"""What is measured of sounds, one metric a file.

A `Metric` is a function and what is to be known of its figures. Those of every report on a network
are in `METRICS`; those of the field, which `mfmjt score` computes, in `PUBLISHED`. One of your own
goes to `mfmjt evaluate --metric package.module:name`.
"""

from mfmjt.evaluate.metrics.base import Figure, Metric, Score, choose_metrics, load_metric
from mfmjt.evaluate.metrics.clap import CLAP
from mfmjt.evaluate.metrics.classes import CLASSES
from mfmjt.evaluate.metrics.divergence import KL_PANNS, KL_PASST
from mfmjt.evaluate.metrics.frechet import FD_PANNS, FD_PASST, FD_VGGISH, FD_YAMNET
from mfmjt.evaluate.metrics.imagebind import IB
from mfmjt.evaluate.metrics.inception import IS_PANNS, IS_PASST
from mfmjt.evaluate.metrics.intervals import bootstrap, derangement
from mfmjt.evaluate.metrics.kernel import KAD_PANNS, KAD_PASST, KAD_VGGISH, KAD_YAMNET
from mfmjt.evaluate.metrics.made import CODEC, DIVERSITY, FRECHET, TEXT_ONLY
from mfmjt.evaluate.metrics.onsets import ONSETS
from mfmjt.evaluate.metrics.synchrony import DESYNC

__all__ = [
    "METRICS",
    "PUBLISHED",
    "Figure",
    "Metric",
    "Score",
    "bootstrap",
    "choose_metrics",
    "derangement",
    "load_metric",
]

METRICS = (ONSETS, CLASSES, FRECHET, DIVERSITY, TEXT_ONLY, CODEC)
"""The metrics of every report, in the order of the table's columns."""

PUBLISHED = (
    *(FD_VGGISH, FD_PANNS, FD_PASST, FD_YAMNET),
    *(KAD_VGGISH, KAD_PANNS, KAD_PASST, KAD_YAMNET),
    *(KL_PANNS, KL_PASST, IS_PANNS, IS_PASST, IB, DESYNC, CLAP, ONSETS, CLASSES),
)
"""The metrics of `mfmjt score`, in the order of its table."""
