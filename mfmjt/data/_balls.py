"""Balls of four materials that fall and bounce."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from mfmjt.data._draw import Canvas, Color
from mfmjt.data._scene import FLOOR, Scene, jitter, pace
from mfmjt.data._sound import Body, mix_strikes

__all__ = ["BALLS", "UNSEEN", "Material", "ball"]

_GAP = 0.15  # no two events closer than this (s): the ear, too, would hear one

Range = tuple[float, float]


class Material(NamedTuple):
    """How a ball looks, bounces and sounds.

    Attributes:
        color: Of its surface.
        shine: Opacity of the highlight.
        squash: How much of its height it loses on the floor.
        restitution: Range of the part of its speed that a bounce leaves.
        base: Range of its lowest mode, in Hz.
        ratios: Frequencies of its modes over the lowest.
        detune: Range of a factor on each of these, or None.
        decay: Range of the lowest mode's decay, in seconds.
        damping: Power of a mode's ratio by which it decays faster.
        gains, contact, contact_seconds, glide: See `Body`.
        grain: Whether its surface has lines.
    """

    color: Color
    shine: float
    squash: float
    restitution: Range
    base: Range
    ratios: tuple[float, ...]
    detune: Range | None
    decay: Range
    damping: float
    gains: tuple[float, ...]
    contact: float
    contact_seconds: float
    glide: float = 0.0
    grain: bool = False

    def body(self, rng: np.random.Generator) -> Body:
        """Draw one ball's sound."""
        base, ratios = rng.uniform(*self.base), np.array(self.ratios)
        if self.detune is not None:
            ratios = ratios * rng.uniform(*self.detune, len(ratios))
        decays = rng.uniform(*self.decay) / ratios**self.damping
        return Body(
            rng, base * ratios, decays, self.gains, self.contact, self.contact_seconds, self.glide
        )


BALLS = {
    "wood": Material(
        (0.62, 0.40, 0.18), 0.25, 0.06, (0.60, 0.72), (240.0, 480.0),
        (1.0, 2.57, 4.95, 7.8), (0.97, 1.03), (0.06, 0.13), 0.4,
        (1, 0.6, 0.35, 0.2), 0.35, 0.002, grain=True,
    ),
    "glass": Material(
        (0.55, 0.85, 0.92), 0.9, 0.06, (0.66, 0.78), (1700.0, 3000.0),
        (1.0, 1.47, 2.09, 2.56, 3.1), (0.98, 1.02), (0.25, 0.6), 0.7,
        (1, 0.7, 0.6, 0.4, 0.3), 0.15, 0.001,
    ),
    "metal": Material(
        (0.62, 0.64, 0.68), 0.9, 0.06, (0.62, 0.74), (560.0, 1100.0),
        (1.0, 1.51, 2.33, 3.05, 4.16, 5.4, 6.7), (0.98, 1.02), (0.5, 1.2), 0.5,
        (0.8, 1, 0.7, 0.6, 0.5, 0.35, 0.25), 0.25, 0.0015,
    ),
    "rubber": Material(
        (0.86, 0.16, 0.22), 0.25, 0.3, (0.74, 0.84), (70.0, 150.0),
        (1.0, 1.8, 2.9), None, (0.08, 0.16), 0.5,
        (1, 0.35, 0.12), 0.12, 0.006, 0.6,
    ),
}  # fmt: skip
UNSEEN = BALLS["wood"]._replace(
    color=(0.5, 0.5, 0.5), shine=0.4, squash=0.1, restitution=(0.6, 0.84), grain=False
)
"""A gray ball, whose material the picture does not tell; its own sound is wood's."""


class _Flight(NamedTuple):
    """A parabola from one impact to the next: begin (s), height and upward speed there."""

    start: float
    height: float
    speed: float


def _bounces(
    rng: np.random.Generator, duration: float, gravity: float, restitution: float
) -> tuple[list[_Flight], list[float], list[float]]:
    """Draw falls of a ball, one after the other: its flights, and times and speeds of impacts."""
    flights: list[_Flight] = []
    events: list[float] = []
    speeds: list[float] = []
    now = rng.uniform(-0.2, 0.25)
    while now < duration:
        height = rng.uniform(0.75, 1.35)
        fall = np.sqrt(2 * height / gravity)
        flights.append(_Flight(now, height, 0.0))
        now += fall
        speed = gravity * fall
        while True:
            events.append(now)
            speeds.append(speed)
            speed *= restitution
            flight = 2 * speed / gravity
            if flight < _GAP + 0.03:
                break
            flights.append(_Flight(now, 0.0, speed))
            now += flight
        rest = rng.uniform(0.4, 1.0)
        flights.append(_Flight(now, 0.0, 0.0))  # lies still
        now += rest
    return flights, events, speeds


def ball(rng: np.random.Generator, duration: float, material: Material) -> Scene:
    """Draw a scene of a ball."""
    restitution = rng.uniform(*material.restitution)
    gravity = rng.uniform(5.0, 9.0)
    radius = rng.uniform(0.11, 0.19)
    flights, events, speeds = _bounces(rng, duration, gravity, restitution)
    starts = np.array([flight.start for flight in flights])
    x0, drift = rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.25)
    paint = jitter(rng, material.color)

    def draw(canvas: Canvas, t: float) -> None:
        i = int(np.searchsorted(starts, t, side="right")) - 1
        if i < 0:
            return
        start, height, speed = flights[i]
        dt = t - start
        lying = height == 0.0 and speed == 0.0
        y = 0.0 if lying else max(0.0, height + speed * dt - 0.5 * gravity * dt * dt)
        x = x0 + drift * np.sin(0.7 * t)
        flat = 1.0 - material.squash * max(0.0, 1.0 - y / 0.08) * (not lying)
        near = min(y, 1.0)
        shadow = (0.05, 0.05, 0.05)
        canvas.ellipse(x, FLOOR, radius * (1.1 - 0.3 * near), 0.035, shadow, 0.55 - 0.3 * near)
        center = FLOOR + y + radius * flat
        canvas.ellipse(x, center, radius * (2 - flat), radius * flat, paint)
        if material.grain:
            half = 0.55 * radius
            for offset in (-0.4, 0.0, 0.4):
                grain = center + offset * radius
                canvas.capsule(
                    (x - half, grain), (x + half, grain), 0.05 * radius, (0.40, 0.23, 0.08)
                )
        glint = 0.35 * radius
        canvas.ellipse(
            x - glint, center + glint, 0.28 * radius, 0.28 * radius, (1.0, 1.0, 1.0), material.shine
        )

    body = material.body(rng)
    times = np.array(events)
    keep = (times > 0.03) & (times < duration - 0.08)
    velocities = (np.array(speeds) / max(speeds))[keep]
    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times[keep], velocities, [body]),
        times[keep].astype(np.float32),
        velocities,
        pace(2 * np.sqrt(2 / gravity), 1.2, 1.0),
    )
