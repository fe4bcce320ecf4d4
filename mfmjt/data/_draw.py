"""A few anti-aliased shapes on a small frame, by signed distances. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Camera", "Canvas", "Color"]

Array = NDArray[np.floating[Any]]
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """Looks at world point (x, y), up is +y; at zoom 1 the frame shows [-1, 1] x [-1, 1]."""

    x: float
    y: float
    zoom: float


class Canvas:
    """A frame `(size, size, 3)` of floats in [0, 1] on which world-space shapes are painted."""

    def __init__(self, size: int, camera: Camera) -> None:
        self.size = size
        self.camera = camera
        self.scale = 0.5 * size * camera.zoom
        self.pixels: Array = np.zeros((size, size, 3), dtype=np.float32)
        grid = np.arange(size, dtype=np.float32) + 0.5
        self._world_x = (grid - 0.5 * size) / self.scale + camera.x
        self._world_y = (0.5 * size - grid) / self.scale + camera.y

    def moved(self, x: float) -> Canvas:
        """Return the same pixels, with the world moved by `x` to the right."""
        other = Canvas(self.size, replace(self.camera, x=self.camera.x - x))
        other.pixels = self.pixels
        return other

    def copy_from(self, other: Canvas) -> None:
        """Start from another canvas's pixels (the static part of a scene)."""
        np.copyto(self.pixels, other.pixels)

    def gradient(self, top: Color, bottom: Color) -> None:
        """Fill with a vertical gradient."""
        w = np.linspace(0.0, 1.0, self.size, dtype=np.float32)[:, None, None]
        self.pixels[:] = np.asarray(top, np.float32) * (1 - w) + np.asarray(bottom, np.float32) * w

    def below(self, y: float, color: Color) -> None:
        """Fill everything under world height `y` (a floor)."""
        cover = np.clip((y - self._world_y) * self.scale + 0.5, 0.0, 1.0)[:, None, None]
        self.pixels += (np.asarray(color, np.float32) - self.pixels) * cover

    def texture(self, rng: np.random.Generator, amount: float) -> None:
        """Add fixed grain, coarse enough to survive video compression."""
        grain = rng.standard_normal((16, 16, 1)).astype(np.float32)
        index = np.arange(self.size) * 16 // self.size
        self.pixels += amount * grain[index][:, index]

    def _window(
        self, x0: float, x1: float, y0: float, y1: float
    ) -> tuple[slice, slice, Array, Array] | None:
        """Rows, columns and world coordinates of the pixels a shape can touch."""
        half, s, c = 0.5 * self.size, self.scale, self.camera
        left = max(0, int((x0 - c.x) * s + half) - 1)
        right = min(self.size, int((x1 - c.x) * s + half) + 2)
        top = max(0, int(half - (y1 - c.y) * s) - 1)
        bottom = min(self.size, int(half - (y0 - c.y) * s) + 2)
        if left >= right or top >= bottom:
            return None
        rows, columns = slice(top, bottom), slice(left, right)
        return rows, columns, self._world_x[None, columns], self._world_y[rows, None]

    def _paint(self, rows: slice, columns: slice, distance: Array, color: Color, a: float) -> None:
        cover = np.clip(0.5 - distance * self.scale, 0.0, 1.0)[..., None] * np.float32(a)
        region = self.pixels[rows, columns]
        region += (np.asarray(color, np.float32) - region) * cover

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, alpha: float = 1.0
    ) -> None:
        """Draw a filled ellipse; with rx == ry a disc."""
        window = self._window(x - rx, x + rx, y - ry, y + ry)
        if window is None:
            return
        rows, columns, wx, wy = window
        radius = np.sqrt(((wx - x) / rx) ** 2 + ((wy - y) / ry) ** 2)
        self._paint(rows, columns, (radius - 1.0) * min(rx, ry), color, alpha)

    def ring(
        self, x: float, y: float, radius: float, width: float, color: Color, alpha: float = 1.0
    ) -> None:
        """Draw a circle line of the given half width."""
        reach = radius + width
        window = self._window(x - reach, x + reach, y - reach, y + reach)
        if window is None:
            return
        rows, columns, wx, wy = window
        distance = np.abs(np.sqrt((wx - x) ** 2 + (wy - y) ** 2) - radius) - width
        self._paint(rows, columns, distance, color, alpha)

    def capsule(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        radius: float,
        color: Color,
        alpha: float = 1.0,
    ) -> None:
        """Draw a thick line with round ends."""
        (ax, ay), (bx, by) = start, end
        window = self._window(
            min(ax, bx) - radius, max(ax, bx) + radius, min(ay, by) - radius, max(ay, by) + radius
        )
        if window is None:
            return
        rows, columns, wx, wy = window
        dx, dy = bx - ax, by - ay
        along = np.clip(((wx - ax) * dx + (wy - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0.0, 1.0)
        distance = np.sqrt((wx - ax - along * dx) ** 2 + (wy - ay - along * dy) ** 2) - radius
        self._paint(rows, columns, distance, color, alpha)

    def box(self, x: float, y: float, half_width: float, half_height: float, color: Color) -> None:
        """Draw an upright filled rectangle."""
        window = self._window(x - half_width, x + half_width, y - half_height, y + half_height)
        if window is None:
            return
        rows, columns, wx, wy = window
        distance = np.maximum(np.abs(wx - x) - half_width, np.abs(wy - y) - half_height)
        self._paint(rows, columns, distance, color, 1.0)

    def streaks(self, x: Array, y: Array, length: float, color: Color, alpha: float) -> None:
        """Many thin vertical lines at once (rain): heads at world `(x, y)`."""
        steps = max(2, int(length * self.scale))
        columns = np.floor((x - self.camera.x) * self.scale + 0.5 * self.size).astype(np.int64)
        heads = np.floor(0.5 * self.size - (y - self.camera.y) * self.scale).astype(np.int64)
        rows = heads[:, None] - np.arange(steps)[None, :]
        columns = np.broadcast_to(columns[:, None], rows.shape)
        inside = (rows >= 0) & (rows < self.size) & (columns >= 0) & (columns < self.size)
        rows, columns = rows[inside], columns[inside]
        old = self.pixels[rows, columns]
        self.pixels[rows, columns] = old + (np.asarray(color, np.float32) - old) * np.float32(alpha)

    def to_uint8(self) -> NDArray[np.uint8]:
        """Return the frame as `(size, size, 3)` bytes."""
        return (np.clip(self.pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
