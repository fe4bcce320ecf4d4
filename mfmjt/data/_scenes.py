"""The twelve sources: for each, one physics gives the motion in the picture and the sound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mfmjt.data._balls import BALLS, ball
from mfmjt.data._draw import Canvas, Color
from mfmjt.data._scene import FLOOR, Scene, jitter, pace, random_times, swing, turns
from mfmjt.data._sound import SAMPLE_RATE, Body, mix_strikes, shaped_noise, smooth_random

__all__ = ["SOURCES"]


def _drum(rng: np.random.Generator, duration: float) -> Scene:
    beat = rng.uniform(0.22, 0.55)
    slots = np.arange(rng.uniform(0.15, 0.5), duration - 0.08, beat)
    slots = slots[rng.uniform(size=slots.size) < rng.uniform(0.6, 0.95)]
    times = slots + rng.uniform(-0.012, 0.012, slots.size)
    base = rng.uniform(95.0, 230.0)
    ratios = np.array([1.0, 1.59, 2.14, 2.30, 2.65, 2.92, 3.6])
    body = Body(
        rng,
        base * ratios,
        rng.uniform(0.2, 0.4) / ratios**0.8,
        [1, 0.7, 0.5, 0.45, 0.35, 0.3, 0.2],
        0.5,
        0.012,
        glide=0.35,
    )
    velocities = rng.uniform(0.45, 1.0, times.size)
    shell, x = jitter(rng, (0.75, 0.2, 0.15), 0.2), rng.uniform(-0.2, 0.1)
    top = FLOOR + rng.uniform(0.4, 0.55)

    def setting(canvas: Canvas) -> None:
        canvas.box(x, (FLOOR + top) / 2 - 0.03, 0.42, (top - FLOOR) / 2, shell)
        canvas.ellipse(x, FLOOR, 0.42, 0.09, shell)

    def draw(canvas: Canvas, t: float) -> None:
        gap = swing(t, times, lift=0.12, strike=0.1)
        recent = times[(times <= t) & (times > t - 0.12)]
        glow = 0.12 if recent.size else 0.0
        canvas.ellipse(x, top, 0.44, 0.11, (0.82 + glow, 0.80 + glow, 0.74 + glow))
        tip = (x + 0.05, top + 0.05 + 0.42 * gap)
        canvas.capsule(tip, (x + 0.75, top + 0.42 + 0.25 * gap), 0.035, (0.80, 0.62, 0.36))
        canvas.ellipse(*tip, 0.06, 0.06, (0.88, 0.72, 0.46))

    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times, velocities, [body]),
        times.astype(np.float32),
        velocities,
        pace(beat, 0.45, 0.3),
        setting,
    )


def _footsteps(rng: np.random.Generator, duration: float) -> Scene:
    period = rng.uniform(0.36, 0.8)
    offset = rng.uniform(0.1, 0.1 + period)
    times = np.arange(offset, duration - 0.08, period)
    base, grit = rng.uniform(80.0, 150.0), rng.uniform(0.3, 0.9)
    bodies = [
        Body(
            rng,
            base * k * np.array([1.0, 2.2, 3.7]),
            [0.09, 0.06, 0.04],
            [1, 0.4, 0.2],
            grit,
            rng.uniform(0.012, 0.03),
            glide=0.3,
        )
        for k in (1.0, 1.09)
    ]
    velocities = rng.uniform(0.7, 1.0, times.size)
    trousers, shirt = jitter(rng, (0.16, 0.2, 0.42), 0.1), jitter(rng, (0.2, 0.6, 0.3), 0.25)
    shoes: Color = (0.08, 0.07, 0.06)
    direction = rng.choice([-1.0, 1.0])
    speed = rng.uniform(0.06, 0.14)

    def draw(canvas: Canvas, t: float) -> None:
        x = direction * (-speed * duration / 2 + speed * t)
        phase = (t - offset) / period  # a foot lands whenever this is a whole number
        hip = (x, FLOOR + 0.62)
        for leg in (0, 1):
            u = (phase + leg) / 2 % 1.0  # 0 = this leg's landing, 0.5 = lift-off
            if u < 0.5:
                along, up = 0.24 - 0.96 * u, 0.0
            else:
                w = (u - 0.5) * 2
                along, up = -0.24 + 0.48 * w, 0.20 * np.sin(np.pi * w) ** 0.8
            foot = (x + direction * along, FLOOR + 0.04 + float(up))
            knee = ((hip[0] + foot[0]) / 2 + direction * 0.07, (hip[1] + foot[1]) / 2)
            shade = 1.0 if leg else 0.75
            color = (trousers[0] * shade, trousers[1] * shade, trousers[2] * shade)
            canvas.capsule(hip, knee, 0.07, color)
            canvas.capsule(knee, foot, 0.06, color)
            canvas.capsule(foot, (foot[0] + direction * 0.09, foot[1]), 0.045, shoes)
        bob = 0.02 * np.cos(2 * np.pi * phase)
        canvas.capsule((x, FLOOR + 0.66), (x, FLOOR + 1.0 - bob), 0.12, shirt)
        canvas.ellipse(x, FLOOR + 1.24 - bob, 0.11, 0.12, (0.85, 0.65, 0.5))

    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times, velocities, bodies),
        times.astype(np.float32),
        velocities,
        pace(period, 0.62, 0.46),
    )


def _rain(rng: np.random.Generator, duration: float) -> Scene:
    samples = round(duration * SAMPLE_RATE)
    knots, values = smooth_random(rng, duration, 0.25, 1.0, 0.6)
    t = np.arange(samples) / SAMPLE_RATE
    intensity = np.interp(t, knots, values).astype(np.float32)
    hiss = shaped_noise(rng, samples, rng.uniform(400, 900), rng.uniform(5000, 7500), -0.3)
    drops = np.zeros(samples, dtype=np.float32)
    count = int(duration * rng.uniform(60, 140))
    places = rng.integers(0, samples - 200, count)
    drop = np.exp(-np.arange(160) / 30.0) * np.sin(
        2 * np.pi * np.arange(160) * rng.uniform(1500, 3500) / SAMPLE_RATE
    )
    for place, gain in zip(places, rng.exponential(1.0, count), strict=True):
        drops[place : place + 160] += (gain * drop).astype(np.float32)
    level = intensity**1.5
    n = 150
    x, phase, fall = rng.uniform(-1.6, 1.6, n), rng.uniform(0, 3, n), rng.uniform(3.2, 4.5, n)
    tint = jitter(rng, (0.72, 0.8, 0.92), 0.05)

    def draw(canvas: Canvas, t: float) -> None:
        shown = int(n * np.interp(t, knots, values))
        y = 1.6 - (phase[:shown] + fall[:shown] * t) % 3.0
        canvas.streaks(x[:shown].astype(np.float32), y.astype(np.float32), 0.17, tint, 0.65)

    return Scene(draw, lambda: level * (hiss + 0.6 * drops), np.zeros(0, np.float32), level)


def _pendulum(rng: np.random.Generator, duration: float) -> Scene:
    half = rng.uniform(0.33, 0.95)  # seconds between two passes of the lowest point
    offset = rng.uniform(0.1, 0.1 + half)
    times = np.arange(offset, duration - 0.08, half)
    base = rng.uniform(1400.0, 2600.0)
    bodies = [
        Body(
            rng,
            base * k * np.array([1.0, 1.7, 2.6]),
            [0.05, 0.035, 0.025],
            [1, 0.7, 0.4],
            0.8,
            0.0012,
        )
        for k in (1.0, 0.82)
    ]
    velocities = rng.uniform(0.85, 1.0, times.size)
    swing, length = rng.uniform(0.45, 0.75), rng.uniform(0.75, 1.0)
    brass, case = jitter(rng, (0.85, 0.68, 0.22)), jitter(rng, (0.32, 0.18, 0.08))
    pivot = (rng.uniform(-0.15, 0.15), 0.62)

    def setting(canvas: Canvas) -> None:
        canvas.box(pivot[0], pivot[1] + 0.12, 0.34, 0.2, case)
        canvas.ellipse(pivot[0], pivot[1] + 0.12, 0.15, 0.15, (0.95, 0.93, 0.85))
        canvas.capsule((pivot[0], FLOOR + 0.12), (pivot[0], FLOOR + 0.2), 0.02, case)

    def draw(canvas: Canvas, t: float) -> None:
        angle = swing * np.sin(np.pi * (t - offset) / half)
        bob = (pivot[0] + length * np.sin(angle), pivot[1] - length * np.cos(angle))
        canvas.capsule(pivot, bob, 0.022, (0.25, 0.2, 0.15))
        canvas.ellipse(*bob, 0.14, 0.14, brass)
        canvas.ellipse(bob[0] - 0.04, bob[1] + 0.04, 0.04, 0.04, (1.0, 0.95, 0.75), 0.8)

    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times, velocities, bodies),
        times.astype(np.float32),
        velocities,
        pace(half, 0.7, 0.45),
        setting,
    )


def _engine(rng: np.random.Generator, duration: float) -> Scene:
    samples = round(duration * SAMPLE_RATE)
    t = np.arange(samples) / SAMPLE_RATE
    low = rng.uniform(22, 40)
    knots, values = smooth_random(rng, duration, low, low * rng.uniform(1.5, 2.6), 0.5)
    firing = 2 * np.pi * turns(knots, values, t, duration)
    audio = np.zeros(samples, dtype=np.float32)
    for k in range(1, 15):
        gain = rng.uniform(0.5, 1.0) / k**0.7
        audio += (gain * np.sin(k * firing + rng.uniform(0, 6.28))).astype(np.float32)
    chug = (0.5 + 0.5 * np.cos(firing)).astype(np.float32) ** 4
    audio += 0.8 * chug * shaped_noise(rng, samples, 80, rng.uniform(700, 1800), -0.4)
    loud = np.interp(t, knots, values) / values.max()
    level = (loud**1.3).astype(np.float32)
    paint, x = jitter(rng, (0.25, 0.42, 0.30), 0.2), rng.uniform(-0.2, 0.2)
    seed_shake = rng.uniform(0, 6.28)

    def draw(canvas: Canvas, time: float) -> None:
        speed = float(np.interp(time, knots, values))
        turn = 2 * np.pi * float(turns(knots, values, time, duration)) / 14.0
        shake = 0.012 * np.sin(61.0 * time + seed_shake) * speed / 40
        y = FLOOR + 0.36 + shake
        canvas.box(x, y, 0.42, 0.28, paint)
        canvas.box(x - 0.2, y + 0.36, 0.09, 0.1, (0.2, 0.2, 0.22))
        canvas.box(x + 0.12, y + 0.34 + 0.07 * np.sin(2 * turn), 0.1, 0.12, (0.55, 0.55, 0.58))
        wheel = (x + 0.5, y - 0.02)
        canvas.ellipse(*wheel, 0.27, 0.27, (0.15, 0.15, 0.16))
        for spoke in range(3):
            a = turn + spoke * np.pi / 3
            dx, dy = 0.22 * np.cos(a), 0.22 * np.sin(a)
            canvas.capsule(
                (wheel[0] - dx, wheel[1] - dy),
                (wheel[0] + dx, wheel[1] + dy),
                0.03,
                (0.7, 0.7, 0.68),
            )
        for puff in range(4):
            age = (time * speed / 14.0 + puff / 4) % 1.0
            canvas.ellipse(
                x - 0.2 + 0.15 * age,
                y + 0.5 + 0.7 * age,
                0.05 + 0.1 * age,
                0.05 + 0.1 * age,
                (0.75, 0.75, 0.75),
                0.5 * (1 - age),
            )

    return Scene(draw, lambda: audio * level, np.zeros(0, np.float32), level)


def _fan(rng: np.random.Generator, duration: float) -> Scene:
    samples = round(duration * SAMPLE_RATE)
    t = np.arange(samples) / SAMPLE_RATE
    knots, values = smooth_random(rng, duration, 1.2, 4.5, 0.5)  # turns per second
    blades = 3 * 2 * np.pi * turns(knots, values, t, duration)
    speed = np.interp(t, knots, values) / 4.5
    air = shaped_noise(rng, samples, 150, rng.uniform(1200, 3000), -0.5)
    whir = (0.6 + 0.4 * np.cos(blades)).astype(np.float32)
    hum = np.sin(2 * np.pi * rng.choice([100.0, 120.0]) * t)
    level = (speed**1.2).astype(np.float32)
    audio = level * (air * whir) + (0.15 * hum).astype(np.float32)
    color, center = jitter(rng, (0.3, 0.5, 0.8), 0.2), (rng.uniform(-0.15, 0.15), 0.1)

    def setting(canvas: Canvas) -> None:
        canvas.capsule(center, (center[0], FLOOR), 0.05, (0.85, 0.85, 0.87))
        canvas.ellipse(center[0], FLOOR, 0.3, 0.06, (0.85, 0.85, 0.87))
        canvas.ring(*center, 0.58, 0.03, (0.9, 0.9, 0.92))

    def draw(canvas: Canvas, time: float) -> None:
        turn = 2 * np.pi * float(turns(knots, values, time, duration))
        for blade in range(3):
            a = turn + blade * 2 * np.pi / 3
            reach = (center[0] + 0.38 * np.cos(a), center[1] + 0.38 * np.sin(a))
            canvas.capsule(center, reach, 0.12, color)
        canvas.ellipse(*center, 0.1, 0.1, (0.95, 0.95, 0.95))

    return Scene(draw, lambda: audio, np.zeros(0, np.float32), level, setting=setting)


def _bell(rng: np.random.Generator, duration: float) -> Scene:
    times = random_times(rng, duration, 0.55, rng.uniform(1.2, 2.2))
    base = rng.uniform(380.0, 900.0)
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.1]) * rng.uniform(0.995, 1.005, 9)
    body = Body(
        rng,
        base * ratios,
        rng.uniform(1.2, 2.4) / ratios**0.6,
        [0.5, 1, 0.6, 0.4, 0.8, 0.35, 0.3, 0.3, 0.2],
        0.12,
        0.002,
    )
    velocities = rng.uniform(0.6, 1.0, times.size)
    bronze, x = jitter(rng, (0.72, 0.52, 0.18)), rng.uniform(-0.25, 0.0)
    y = rng.uniform(-0.05, 0.2)

    def setting(canvas: Canvas) -> None:
        canvas.capsule((x - 0.5, y + 0.62), (x + 0.5, y + 0.62), 0.06, (0.35, 0.22, 0.12))

    def draw(canvas: Canvas, t: float) -> None:
        since = t - times[times <= t]
        tremble = 0.03 * np.exp(-since.min() / 0.25) * np.sin(40 * since.min()) if since.size else 0
        cx = x + float(tremble)
        canvas.capsule((cx, y + 0.6), (cx, y + 0.42), 0.03, (0.3, 0.2, 0.1))
        canvas.ellipse(cx, y + 0.2, 0.24, 0.28, bronze)
        canvas.box(cx, y - 0.02, 0.26, 0.18, bronze)
        canvas.ellipse(cx, y - 0.2, 0.36, 0.08, (bronze[0] * 0.8, bronze[1] * 0.8, bronze[2] * 0.8))
        gap = swing(t, times, lift=0.25, strike=0.14)
        head = (x + 0.40 + 0.38 * gap, y - 0.02 + 0.2 * gap)
        canvas.capsule(head, (head[0] + 0.55, head[1] - 0.25), 0.035, (0.55, 0.38, 0.2))
        canvas.ellipse(*head, 0.1, 0.1, (0.3, 0.3, 0.33))

    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times, velocities, [body]),
        times.astype(np.float32),
        velocities,
        setting=setting,
    )


def _knock(rng: np.random.Generator, duration: float) -> Scene:
    gap = rng.uniform(0.17, 0.34)
    times_list: list[float] = []
    now = rng.uniform(0.15, 0.6)
    while now < duration - 0.08:
        for _ in range(rng.integers(2, 6)):
            if now < duration - 0.08:
                times_list.append(now + rng.uniform(-0.01, 0.01))
            now += gap
        now += rng.uniform(0.5, 1.3)
    times = np.array(times_list)
    base = rng.uniform(130.0, 300.0)
    ratios = np.array([1.0, 1.42, 2.1, 2.9, 4.2]) * rng.uniform(0.97, 1.03, 5)
    body = Body(
        rng,
        base * ratios,
        rng.uniform(0.07, 0.14) / ratios**0.3,
        [1, 0.8, 0.6, 0.4, 0.25],
        0.5,
        0.004,
        glide=0.1,
    )
    velocities = rng.uniform(0.6, 1.0, times.size)
    door, x = jitter(rng, (0.50, 0.30, 0.16), 0.1), rng.uniform(-0.75, -0.55)
    skin, sleeve = jitter(rng, (0.85, 0.64, 0.5)), jitter(rng, (0.3, 0.3, 0.6), 0.25)
    y = rng.uniform(-0.05, 0.2)

    def setting(canvas: Canvas) -> None:
        dark = (door[0] * 0.7, door[1] * 0.7, door[2] * 0.7)
        canvas.box(x, FLOOR + 0.75, 0.45, 0.8, door)
        canvas.box(x, FLOOR + 1.1, 0.3, 0.28, dark)
        canvas.box(x, FLOOR + 0.4, 0.3, 0.28, dark)
        canvas.ellipse(x + 0.36, FLOOR + 0.72, 0.05, 0.05, (0.9, 0.8, 0.3))

    def draw(canvas: Canvas, t: float) -> None:
        away = swing(t, times, lift=0.09, strike=0.08)
        fist = (x + 0.52 + 0.3 * away, y)
        canvas.capsule((fist[0] + 0.08, y), (fist[0] + 0.7, y - 0.3), 0.09, sleeve)
        canvas.ellipse(*fist, 0.12, 0.13, skin)

    return Scene(
        draw,
        partial(mix_strikes, rng, duration, times, velocities, [body]),
        times.astype(np.float32),
        velocities,
        pace(gap, 0.29, 0.21),
        setting,
    )


SOURCES: dict[str, Callable[[np.random.Generator, float], Scene]] = {
    **{f"ball_{name}": partial(ball, material=material) for name, material in BALLS.items()},
    "drum": _drum,
    "footsteps": _footsteps,
    "rain": _rain,
    "pendulum": _pendulum,
    "engine": _engine,
    "fan": _fan,
    "bell": _bell,
    "knock": _knock,
}
