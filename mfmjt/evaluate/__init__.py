"""How good generated sound is: examples with a known truth, metrics, judges and reports."""

from mfmjt.evaluate import networks, statistics

__all__ = ["networks", "statistics"]
