"""A data distribution whose average velocity is known: independent normals, mean m, spread s.

With S(t) = (1 − t)²s² + t² the variance of z at time t, the flow keeps (z − (1 − t)m) / √S(t), so
z_r = (1 − r)m + √(S(r)/S(t))·(z_t − (1 − t)m), u = (z_t − z_r)/(t − r), and the instantaneous
velocity is v = (t − (1 − t)s²)/S(t)·(z − (1 − t)m) − m.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, SPREAD = 0.7, 0.4


def _column(t: Tensor, z: Tensor) -> Tensor:
    return t.to(z.dtype).view(-1, *(1 for _ in z.shape[1:]))


def _variance(t: Tensor) -> Tensor:
    return (1 - t) ** 2 * SPREAD**2 + t**2


def velocity(z: Tensor, t: Tensor) -> Tensor:
    t = _column(t, z)
    return (t - (1 - t) * SPREAD**2) / _variance(t) * (z - (1 - t) * MEAN) - MEAN


def average_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    a, b = _column(r, z), _column(t, z)
    end = (1 - a) * MEAN + (_variance(a) / _variance(b)).sqrt() * (z - (1 - b) * MEAN)
    same = a == b
    return torch.where(same, velocity(z, t), (z - end) / torch.where(same, 1.0, b - a))


def pair(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise e of which z is the mixture at t, and e − x the velocity at z."""
    v, t = velocity(z, t), _column(t, z)
    return z - t * v, z + (1 - t) * v
