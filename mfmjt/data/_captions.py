"""Wording: sentences for every class, some of them kept back for the test split."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["CLASSES", "caption", "words"]

# The last two phrases of each class, and the last five sentence frames, appear only in test clips.
# Their words are known from other phrases, their combination is not.
PHRASES: dict[str, tuple[str, ...]] = {
    "ball_wood": (
        "a wooden ball bouncing on the floor",
        "a ball made of wood drops and bounces",
        "a wood ball falling and hopping",
        "the knocking bounces of a wooden ball",
        "a dropped wooden sphere bouncing",
        "a hopping ball of wood",
        "a wooden sphere that falls and bounces",
    ),
    "ball_glass": (
        "a glass ball bouncing on the floor",
        "a marble drops and bounces",
        "a glass marble falling and hopping",
        "the clinking bounces of a glass marble",
        "a dropped glass sphere bouncing",
        "a hopping ball of glass",
        "a glass sphere that falls and clinks",
    ),
    "ball_metal": (
        "a metal ball bouncing on the floor",
        "a steel ball drops and bounces",
        "a metal sphere falling and hopping",
        "the ringing bounces of a steel ball",
        "a dropped steel sphere bouncing",
        "a hopping ball of metal",
        "a steel sphere that falls and rings",
    ),
    "ball_rubber": (
        "a rubber ball bouncing on the floor",
        "a soft rubber ball drops and bounces",
        "a bouncy ball falling and hopping",
        "the dull thuds of a bouncing rubber ball",
        "a dropped bouncy rubber ball",
        "a hopping ball of soft rubber",
        "a rubber bouncy ball that falls with thuds",
    ),
    "drum": (
        "a drum stick hitting a drum",
        "someone plays a drum",
        "drumming with a stick",
        "beats on a drum",
        "a drummer beats a single drum",
        "a stick that beats a drum",
        "someone drumming beats",
    ),
    "footsteps": (
        "a person walking",
        "footsteps of someone walking by",
        "steps on the ground",
        "someone walks with audible footsteps",
        "a walker taking steps",
        "a person taking steps on the ground",
        "footsteps of a walker",
    ),
    "rain": (
        "rain falling",
        "steady rain and drops of water",
        "a rain shower",
        "raindrops pouring down",
        "water pouring from the sky as rain",
        "a shower of raindrops",
        "falling rain pouring down",
    ),
    "pendulum": (
        "a ticking pendulum",
        "a clock ticking with its pendulum swinging",
        "the tick and tock of a clock",
        "a swinging pendulum that ticks",
        "a metronome ticking",
        "the ticking of a swinging metronome",
        "a clock that ticks and tocks",
    ),
    "engine": (
        "an engine running",
        "a motor rumbling and changing speed",
        "an idling engine that revs up",
        "the rumble of a machine with a motor",
        "an engine revving and slowing down",
        "a rumbling engine that changes speed",
        "a revving motor",
    ),
    "fan": (
        "a fan spinning",
        "an electric fan blowing air",
        "the whirring blades of a fan",
        "a ventilator whirring and changing speed",
        "air blown by spinning blades",
        "a whirring fan blowing",
        "a ventilator with spinning blades",
    ),
    "bell": (
        "a bell being struck",
        "a bell ringing out",
        "the chime of a church bell",
        "a hammer strikes a bell",
        "a bell chimes again and again",
        "a chiming bell",
        "a struck bell that chimes",
    ),
    "knock": (
        "someone knocking on a door",
        "knocks at the door",
        "a hand knocks on a wooden door",
        "a fist banging on a door",
        "a visitor knocking at the door",
        "a hand banging at the door",
        "knocks of a fist on a door",
    ),
}
CLASSES: tuple[str, ...] = tuple(PHRASES)

FRAMES = (
    "{}",
    "the sound of {}",
    "a recording of {}",
    "we hear {}",
    "{} in a quiet room",
    "{}, close up",
    "a video with {}",
    "you can hear {}",
    "{}, nothing else",
    "a short clip of {}",
    # kept back
    "what you can hear in the video is {}",
    "nothing else, a close recording: {}",
    "a quiet room, we hear the sound, {}",
    "short video, {}",
    "in the clip a sound of {}",
)
_HELD_PHRASES, _HELD_FRAMES = 2, 5
PACES = {
    "slow": ("", ", slowly", ", at a slow pace"),
    "fast": ("", ", fast", ", in quick succession"),
}


def caption(rng: np.random.Generator, class_name: str, pace: str, split: str) -> str:
    """Return a caption; those of tests join phrases and sentences that training never shows."""
    phrases = PHRASES[class_name]
    if split == "test":
        phrase = phrases[-_HELD_PHRASES:][rng.integers(_HELD_PHRASES)]
        frame = FRAMES[-_HELD_FRAMES:][rng.integers(_HELD_FRAMES)]
    else:
        phrase = phrases[rng.integers(len(phrases) - _HELD_PHRASES)]
        frame = FRAMES[rng.integers(len(FRAMES) - _HELD_FRAMES)]
    endings = PACES.get(pace, ("",))
    text = frame.format(phrase) + endings[rng.integers(len(endings))]
    return text[0].upper() + text[1:] if rng.uniform() < 0.5 else text


def words() -> frozenset[str]:
    """All words of captions, in lower case."""
    phrases = [phrase for phrases in PHRASES.values() for phrase in phrases]
    endings = [ending for endings in PACES.values() for ending in endings]
    return frozenset(re.findall(r"\w+", " ".join((*phrases, *FRAMES, *endings))))
