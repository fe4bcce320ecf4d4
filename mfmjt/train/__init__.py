"""Training: the codec, the encoders, the features and the network, each a resumable stage."""

from __future__ import annotations

__all__ = [
    "checkpoint",
    "codec",
    "config",
    "distributed",
    "ema",
    "encoders",
    "log",
    "loop",
    "sharded",
    "step",
]
