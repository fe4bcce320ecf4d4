"""IB-score: how near a sound is to its video, in the embedding of ImageBind."""

from __future__ import annotations

from mfmjt.evaluate.examples import Known
from mfmjt.evaluate.metrics.base import Figure, Metric, Score
from mfmjt.evaluate.metrics.cosine import cosine_score
from mfmjt.evaluate.sounds import Sounds

__all__ = ["IB"]


def _ib(made: Sounds, real: Sounds, known: Known) -> Score | None:
    """Average the cosine between video and sound over clips; tables often show it times 100.

    Shuffled: against the video of another clip. The interval is a bootstrap of the mean.
    """
    videos = made.seen("imagebind")
    if videos is None:
        return None
    return cosine_score("ib", "imagebind", "video", made, real, videos)


IB = Metric(
    "ib",
    (
        Figure("ib", "IB-score (ImageBind)", 4, "ib_real", "", "higher"),
        Figure("ib_shuffled", "IB-score, shuffled", 4),
        Figure("ib_real"),
    ),
    _ib,
    ("imagebind",),
)
