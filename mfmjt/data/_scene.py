"""What the scenes of all sources share: an empty room, paces, times and motions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfmjt.data._draw import Camera, Canvas, Color

__all__ = ["FLOOR", "Scene", "film", "jitter", "pace", "random_times", "swing", "turns"]

Array = NDArray[np.floating[Any]]
FLOOR = -0.62  # world height of the floor
_BESIDE = 0.4  # world distance from the middle to each of two scenes


@dataclass
class Scene:
    """What a source does in one clip.

    Attributes:
        draw: Paints the moving things of time t (s) onto a canvas.
        audio: Makes the synthetic sound, `(samples,)`, any level. It draws random numbers: once.
        events: Times of the audible onsets in seconds; empty for continuous sounds.
        strength: How hard each event is, (0, 1], of the same length; of continuous sounds their
            amplitude at every sample, `(samples,)`.
        pace: "slow", "fast" or "", for the caption.
        setting: Paints what does not move.
    """

    draw: Callable[[Canvas, float], None]
    audio: Callable[[], Array]
    events: Array
    strength: Array
    pace: str = ""
    setting: Callable[[Canvas], None] = field(default=lambda canvas: None)


def jitter(rng: np.random.Generator, color: Color, amount: float = 0.07) -> Color:
    """Draw a color near a given one."""
    r, g, b = (float(np.clip(c + rng.uniform(-amount, amount), 0.02, 0.98)) for c in color)
    return r, g, b


def pace(interval: float, slow: float, fast: float) -> str:
    """Return the word for events so many seconds apart: "slow", "fast" or ""."""
    return "slow" if interval > slow else "fast" if interval < fast else ""


def random_times(
    rng: np.random.Generator, duration: float, low: float, high: float
) -> NDArray[np.float64]:
    """Draw event times (s) with independent gaps between `low` and `high` seconds."""
    times, now = [], rng.uniform(0.15, 0.15 + high)
    while now < duration - 0.08:
        times.append(now)
        now += rng.uniform(low, high)
    return np.array(times)


def swing(t: float, times: NDArray[np.float64], lift: float, strike: float) -> float:
    """Return how far a striker is from its target, 0 at the hits and up to 1 between them.

    It comes down within `strike` seconds before a hit and goes up within `lift` seconds after.
    """
    if times.size == 0:
        return 1.0
    after = np.min(np.where(t >= times, t - times, np.inf))
    before = np.min(np.where(times > t, times - t, np.inf))
    up = min(1.0, after / lift)
    down = min(1.0, before / strike)
    return float(min(np.sin(0.5 * np.pi * up), 1.0 - (1.0 - down) ** 2))


def turns(
    knots: NDArray[np.float64],
    values: NDArray[np.float64],
    t: NDArray[np.float64] | float,
    duration: float,
) -> NDArray[np.float64]:
    """Return the turns made by time t at the speed (turns per second) given by the knots."""
    grid = np.linspace(0.0, duration, int(duration * 200) + 2)
    made = np.concatenate([[0.0], np.cumsum(np.interp(grid[1:], knots, values) * grid[1])])
    return np.interp(t, grid, made)


def stage(rng: np.random.Generator, size: int) -> Canvas:
    """Draw an empty room with a random camera, wall, floor and grain."""
    camera = Camera(rng.uniform(-0.15, 0.15), rng.uniform(-0.05, 0.15), rng.uniform(0.8, 1.05))
    canvas = Canvas(size, camera)
    wall = rng.uniform(0.35, 0.85)
    tint = rng.uniform(-0.08, 0.08, 3)
    top: Color = (wall + tint[0], wall + tint[1], wall + tint[2])
    canvas.gradient(top, (top[0] * 0.85, top[1] * 0.85, top[2] * 0.85))
    floor = rng.uniform(0.2, 0.5)
    canvas.below(FLOOR, (floor + 0.06, floor, floor - 0.05))
    canvas.texture(rng, rng.uniform(0.0, 0.02))
    return canvas


def film(
    rng: np.random.Generator, scenes: Sequence[Scene], times: Array, size: int
) -> NDArray[np.uint8]:
    """Draw what happens in a room.

    Args:
        rng: Draws the room and the camera.
        scenes: What happens; two stand beside each other.
        times: Moments to draw (T,), in seconds.
        size: Pixels along each side of a frame.

    Returns:
        Frames (T, size, size, 3).
    """
    background = stage(rng, size)
    canvas = Canvas(size, background.camera)
    places = [0.0] if len(scenes) == 1 else np.linspace(-_BESIDE, _BESIDE, len(scenes)).tolist()
    for scene, x in zip(scenes, places, strict=True):
        scene.setting(background.moved(x))
    views = [canvas.moved(x) for x in places]
    frames = np.empty((len(times), size, size, 3), dtype=np.uint8)
    for i, t in enumerate(times.tolist()):
        canvas.copy_from(background)
        for scene, view in zip(scenes, views, strict=True):
            scene.draw(view, t)
        frames[i] = canvas.to_uint8()
    return frames
