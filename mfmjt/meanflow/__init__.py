"""MeanFlow over any callable: objective, time sampling, guidance, sampling."""

from __future__ import annotations

from mfmjt.meanflow.guidance import guide
from mfmjt.meanflow.objective import LossStats, condition_dropout, loss
from mfmjt.meanflow.sampler import OneStep, sample
from mfmjt.meanflow.time import TimeSampler, logit_normal, time_pairs, uniform

__all__ = [
    "LossStats",
    "OneStep",
    "TimeSampler",
    "condition_dropout",
    "guide",
    "logit_normal",
    "loss",
    "sample",
    "time_pairs",
    "uniform",
]
