"""MeanFlow over any callable: objective, time sampling, guidance, sampling."""

from __future__ import annotations

from mfmjt.meanflow.guidance import guide
from mfmjt.meanflow.objective import (
    LossStats,
    condition_dropout,
    loss,
    loss_and_errors,
    loss_ref,
)
from mfmjt.meanflow.one_step import OneStep
from mfmjt.meanflow.sampling import Sampling, sample
from mfmjt.meanflow.targets import (
    alpha_flow,
    control_variate,
    finite_difference,
    guided_velocity,
    improved_mean_velocity,
    lsd,
    mean_velocity,
    teacher_rollout,
    teacher_velocity,
    tvm,
)
from mfmjt.meanflow.times import TimeSampler, logit_normal, time_pairs, uniform

__all__ = [
    "LossStats",
    "OneStep",
    "Sampling",
    "TimeSampler",
    "alpha_flow",
    "condition_dropout",
    "control_variate",
    "finite_difference",
    "guide",
    "guided_velocity",
    "improved_mean_velocity",
    "logit_normal",
    "loss",
    "loss_and_errors",
    "loss_ref",
    "lsd",
    "mean_velocity",
    "sample",
    "teacher_rollout",
    "teacher_velocity",
    "time_pairs",
    "tvm",
    "uniform",
]
