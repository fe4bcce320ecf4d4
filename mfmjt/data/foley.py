"""The procedural Foley set: endless short videos of things that make sound, with that sound.

Twelve sources, each a small physical model from which both the picture and the sound follow:
struck and dropped bodies ring in their modes at the very times at which the picture shows the
contact; rain, engine and fan are shaped noise and harmonics that follow what is seen. Camera,
colors, timing, pitch and level vary. A clip is a pure function of (split, seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfmjt.data._captions import CLASSES, caption
from mfmjt.data._scene import film
from mfmjt.data._scenes import SOURCES
from mfmjt.data._sound import SAMPLE_RATE, leveled
from mfmjt.errors import InputError

__all__ = [
    "CLASSES",
    "DURATION",
    "FPS",
    "FRAME_SIZE",
    "IMPACT_CLASSES",
    "SAMPLE_RATE",
    "SPLITS",
    "Clip",
    "check",
    "clip",
    "frames_shown",
    "shown_at",
]

FPS = 25
"""Frames per second."""
DURATION = 8.0
"""Seconds of a clip, unless asked otherwise."""
FRAME_SIZE = 64
"""Pixels along each side of a frame, unless asked otherwise."""
SPLITS = ("train", "validation", "test")
IMPACT_CLASSES: tuple[str, ...] = tuple(c for c in CLASSES if c not in ("rain", "engine", "fan"))
"""Classes with discrete events; the others sound all the time."""


@dataclass(frozen=True)
class Clip:
    """One clip of the set.

    Attributes:
        frames: uint8 `(T, H, W, 3)` at `FPS`, or None if there are none. Frame i shows the world at
            the middle of its display time, (i + 0.5) / FPS.
        audio: float32 `(samples,)` in [-1, 1], mono at `SAMPLE_RATE`.
        caption: One sentence.
        label: Index into `CLASSES`, or into those of the open set.
        events: float32 `(n,)`, audible onsets in seconds; empty for continuous classes.
        index: Number of the clip within its split.
        split: "train", "validation" or "test".
        class_name: Name of the class.
        seen: What the picture shows, the same word for all that look the same; "" without one.
    """

    frames: NDArray[np.uint8] | None
    audio: NDArray[np.float32]
    caption: str
    label: int
    events: NDArray[np.float32]
    index: int
    split: str
    class_name: str
    seen: str = ""


def clip(
    index: int,
    split: str,
    seed: int = 0,
    *,
    duration: float = DURATION,
    size: int = FRAME_SIZE,
    render: bool = True,
    class_name: str | None = None,
) -> Clip:
    """Make clip number `index` of a split.

    Args:
        index: Any non-negative number; clips go through the classes in turn.
        split: "train", "validation" or "test"; no two splits share a random stream, and test
            captions are worded as no other split's are.
        seed: Another seed is another endless set.
        duration: Seconds, at least 0.5.
        size: Pixels along each side of a frame.
        render: Whether to draw the frames (most of the time goes there).
        class_name: Force the source instead of taking turns.

    Raises:
        InputError: An unknown split or class, a negative index, or a duration under 0.5 s.
    """
    check(index, split, duration)
    if class_name is not None and class_name not in CLASSES:
        raise InputError(f"Unknown class {class_name!r}. Give one of {', '.join(CLASSES)}.")
    label = index % len(CLASSES) if class_name is None else CLASSES.index(class_name)
    entropy = np.random.SeedSequence([seed, SPLITS.index(split), index, label])
    world, look, words, level = (np.random.Generator(np.random.PCG64(s)) for s in entropy.spawn(4))
    scene = SOURCES[CLASSES[label]](world, duration)
    audio = leveled(level, scene.audio())
    frames = film(look, [scene], shown_at(duration), size) if render else None
    text = caption(words, CLASSES[label], scene.pace, split)
    name = CLASSES[label]
    return Clip(frames, audio, text, label, scene.events, index, split, name, name)


def check(index: int, split: str, duration: float) -> None:
    """Refuse a clip that cannot be made.

    Raises:
        InputError: An unknown split, a negative index, or a duration under 0.5 s.
    """
    if split not in SPLITS:
        raise InputError(
            f"Unknown split {split!r}: there are {', '.join(SPLITS)}. Give one of them."
        )
    if index < 0 or duration < 0.5:
        raise InputError(
            f"Clip {index} of {duration} s cannot be made: the index must be at least 0 and the "
            "duration at least 0.5 s. Give larger ones."
        )


def shown_at(duration: float) -> NDArray[np.float64]:
    """Return the moments that the frames of so many seconds show, (T,), in seconds."""
    return (np.arange(round(duration * FPS)) + 0.5) / FPS


def frames_shown(count: int, rate: int) -> NDArray[np.int64]:
    """Return which of `count` frames are on the screen at the times j / rate, in order.

    Args:
        count: Frames of a clip, at `FPS`.
        rate: Frames per second wanted.

    Returns:
        Indices (ceil(count * rate / FPS),).
    """
    return np.arange(-(-count * rate // FPS)) * FPS // rate
