"""Wording of the open set: what is seen, and how sentences about sounds are joined."""

from __future__ import annotations

import numpy as np

__all__ = ["beside", "scene", "then", "together"]

# Of each tuple the last one is kept back for the test split, as in `_captions`.
SEEN: dict[str, tuple[str, ...]] = {
    "ball": (
        "a ball bounces",
        "a ball drops and bounces on the floor",
        "a bouncing ball",
        "a ball falls and hops",
    ),
    "drum": (
        "a stick beats",
        "someone strikes with a stick",
        "a stick hitting again and again",
        "beats of a stick",
    ),
    "footsteps": ("a person walks", "someone walks by", "a person walking", "a walker passes by"),
    "pendulum": ("a pendulum swings", "a swinging pendulum", "the pendulum of a clock swings"),
    "knock": ("someone knocks at a door", "a fist on a door", "a hand knocks on a door"),
    "bell": ("a hammer strikes a bell", "a bell is struck", "someone strikes a bell"),
    "rain": ("rain falls", "falling rain", "it rains"),
    "engine": ("an engine runs", "a running engine", "a machine runs"),
    "fan": ("a fan spins", "a spinning fan", "the blades of a fan turn"),
}
TOGETHER = ("{} and {}", "{} while {}", "{}, and {} at the same time", "{} as {}")
BESIDE = (
    "{}, with {} in the background",
    "{}, and far away {}",
    "{}, in the background {}",
    "{}, and behind that {}",
)
THEN = ("{}, then {}", "{} and then {}", "first {}, then {}", "{}, after that {}")
AND = ("{}: {}", "{}, {}", "{}, we hear {}", "{}, the sound of {}")


def _one(rng: np.random.Generator, wordings: tuple[str, ...], split: str) -> str:
    if split == "test":
        return wordings[-1]
    return wordings[rng.integers(len(wordings) - 1)]


def scene(rng: np.random.Generator, source: str, heard: str, split: str) -> str:
    """Return what is seen of a source in `SEEN` and what is heard, or one of both if it says all.

    Args:
        rng: Of every draw.
        source: What is seen.
        heard: Sentence about the sound.
        split: "train", "validation" or "test".
    """
    seen = _one(rng, SEEN[source], split)
    whole = _one(rng, AND, split).format(seen, heard)
    # A bouncing ball is not heard in "a light hit on wood", but footsteps are in "steps on gravel".
    return whole if source in ("ball", "drum") or rng.uniform() < 0.5 else heard


def together(rng: np.random.Generator, first: str, second: str, split: str) -> str:
    """Join sentences about two sounds at once."""
    return _one(rng, TOGETHER, split).format(first, second)


def beside(rng: np.random.Generator, first: str, second: str, split: str) -> str:
    """Join a sentence with one about what is in the background."""
    return _one(rng, BESIDE, split).format(first, second)


def then(rng: np.random.Generator, first: str, second: str, split: str) -> str:
    """Join sentences about two sounds one after the other."""
    return _one(rng, THEN, split).format(first, second)
