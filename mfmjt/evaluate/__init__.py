"""How good generated sound is: examples with a known truth, metrics, judges and reports."""

from mfmjt.evaluate import networks, statistics
from mfmjt.evaluate.scoring import score

__all__ = ["networks", "score", "statistics"]
