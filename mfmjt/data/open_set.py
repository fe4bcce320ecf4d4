"""The open set: real recordings, with the procedural set's moving pictures or with text alone.

In a scene, recorded strokes sound at the moments at which the picture shows a contact, as hard as
it shows them, and recordings that go on follow what is seen. The picture leaves the rest open: what
a gray ball is made of, what the ground is, which of many recordings it is, what else sounds off the
screen. Other clips have no picture: one recording, two at once, or one after the other. A clip is a
pure function of (split, seed, index) and the recordings, of which it takes those of its split.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfmjt.data import _open_captions as captions
from mfmjt.data import _takes, foley
from mfmjt.data._balls import BALLS, UNSEEN, ball
from mfmjt.data._scene import Scene, film
from mfmjt.data._scenes import SOURCES
from mfmjt.data._sound import SAMPLE_RATE, leveled
from mfmjt.data.foley import DURATION, FRAME_SIZE, SPLITS, Clip
from mfmjt.data.recordings import Recording, Recordings
from mfmjt.data.wordings import caption, phrase
from mfmjt.errors import InputError, some

__all__ = ["KINDS", "SOUNDS", "OpenSet", "clips_of", "has_picture", "open_set"]

Array = NDArray[np.floating[Any]]

KINDS = ("scene", "single", "mixture", "sequence")
"""Kinds of clips; all but scenes have no picture."""
_TURNS = ("scene", "single", "scene", "mixture", "scene", "single", "scene", "sequence")

SOUNDS: dict[str, tuple[str, ...]] = {
    "ball": ("wood hit", "glass hit", "metal hit", "stone hit", "plate hit", "thud"),
    "footsteps": ("footsteps",),
    "drum": ("drum", "metal hit", "wood hit", "thud"),
    "knock": ("knock", "wood hit"),
    "bell": ("bell",),
    "pendulum": ("clock",),
    "rain": ("rain",),
    "engine": ("engine", "machine"),
    "fan": ("fan", "machine"),
}
"""Sources of a picture -> labels of the recordings that may be heard with it."""
_ORDER = ("ball", "footsteps", "drum", "ball", "knock", "bell", "ball", "footsteps", "pendulum",
          "rain", "engine", "fan")  # fmt: skip
_CONTINUOUS = ("rain", "engine", "fan")
_MATERIALS = {
    "wood hit": "wood", "glass hit": "glass", "metal hit": "metal", "thud": "rubber",
}  # fmt: skip
_TAKES = 4  # strokes of one source that take turns
_COLORED = 0.3  # share of balls that look like what they are made of
_SECOND, _OFF_SCREEN = 0.15, 0.35  # shares of scenes with a second source, and with one unseen
_BELOW, _FAR_BELOW = (3, 9), (8, 20)  # dB, of loudness, by which these are below the first
_SWELL = SAMPLE_RATE // 2  # samples within which it rises
_APART = 0.05  # s between two events that are told apart


def has_picture(index: int, recordings: Path | None) -> bool:
    """Return whether clip number `index` has a picture: all procedural and every second open one.

    Args:
        index: Number of the clip.
        recordings: Of the open set; None means the procedural set.
    """
    return recordings is None or _TURNS[index % len(_TURNS)] == "scene"


def clips_of(recordings: Path | None) -> Callable[..., Clip]:
    """Return what makes clips: of the open set of these recordings, or of the procedural set.

    Args:
        recordings: Folder that `mfmjt data real` wrote, or None.

    Raises:
        InputError: What `OpenSet` raises.
    """
    return foley.clip if recordings is None else open_set(recordings).clip


@functools.cache
def open_set(recordings: Path) -> OpenSet:
    """Return the open set of these recordings, of which a process reads each once."""
    return OpenSet(recordings)


class _Draws(NamedTuple):
    """Random streams of a clip."""

    world: np.random.Generator
    look: np.random.Generator
    words: np.random.Generator
    sound: np.random.Generator
    level: np.random.Generator


class _Part(NamedTuple):
    """One of the sounds of a clip.

    Attributes:
        label: Of the recording.
        track: Samples of the whole clip (n,).
        text: Sentence about it.
        scene: What is seen of it, if anything is.
        seen: Its source, one of `SOUNDS`, or "".
    """

    label: str
    track: Array
    text: str
    scene: Scene | None = None
    seen: str = ""


class OpenSet:
    """The open set of a folder of recordings.

    Args:
        recordings: Folder that `mfmjt data real` wrote.

    Attributes:
        classes: Labels of the training recordings; those of most recordings first.

    Raises:
        InputError: What `Recordings` raises; a split without labelled recordings.
    """

    def __init__(self, recordings: Path | str) -> None:
        self.recordings = Recordings(Path(recordings))
        rows = [row for row in self.recordings.rows if row.label]
        counts = Counter(row.label for row in rows if row.split == "train")
        self.classes = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
        # Takes of one thing have one caption; every thing is as likely as another of its label.
        self._groups: dict[str, dict[str, list[list[Recording]]]] = {}
        for split in SPLITS:
            groups: dict[str, dict[tuple[str, str], list[Recording]]] = {}
            for row in rows:
                if row.split == split and row.label in counts:
                    things = groups.setdefault(row.label, {})
                    things.setdefault((row.set, row.caption), []).append(row)
            known = (label for label in self.classes if label in groups)
            self._groups[split] = {label: list(groups[label].values()) for label in known}
            if len(self._groups[split]) < 2:
                raise InputError(
                    f"{recordings} has recordings of {some(self._groups[split]) or 'nothing'} in "
                    f"split {split!r}: two labels are needed. Make it anew with `mfmjt data real`."
                )
        self._found: dict[tuple[str, str], list[list[tuple[Recording, _takes.Take]]]] = {}
        self._lasting: dict[tuple[str, str], list[Recording]] = {}

    def labels(self, split: str) -> tuple[str, ...]:
        """Return the labels that a split has recordings of, in the order of `classes`."""
        return tuple(self._groups[split])

    def in_scenes(self, split: str) -> frozenset[str]:
        """Return the labels that a split has recordings of which fit a picture."""
        return frozenset(label for s in SOUNDS for label in self._labels_of(s, split))

    def clip(
        self,
        index: int,
        split: str,
        seed: int = 0,
        *,
        duration: float = DURATION,
        size: int = FRAME_SIZE,
        render: bool = True,
        kind: str | None = None,
        class_name: str | None = None,
    ) -> Clip:
        """Make clip number `index` of a split.

        Args:
            index: Any non-negative number; clips go through the kinds and the sources in turn.
            split: "train", "validation" or "test": whose recordings and wordings are taken.
            seed: Another seed is another endless set.
            duration: Seconds, at least 0.5.
            size: Pixels along each side of a frame.
            render: Whether to draw the frames.
            kind: Force one of `KINDS`.
            class_name: Force the label of what is heard, of two sounds of the louder or the first.

        Returns:
            The clip. Its label is an index into `classes`, its events are those that are seen.

        Raises:
            InputError: An unknown split, kind or class, one that has no recordings in the split, a
                negative index, or a duration under 0.5 s.
        """
        foley.check(index, split, duration)
        kind = kind or _TURNS[index % len(_TURNS)]
        if kind not in KINDS:
            raise InputError(f"Unknown kind {kind!r}. Give one of {', '.join(KINDS)}.")
        entropy = np.random.SeedSequence([seed, SPLITS.index(split), index, KINDS.index(kind)])
        draws = _Draws(*(np.random.Generator(np.random.PCG64(s)) for s in entropy.spawn(5)))
        if kind == "scene":
            parts, text = self._scene(draws, index, split, duration, class_name)
        else:
            parts, text = self._text_alone(draws, kind, split, duration, class_name)
        scenes = [part.scene for part in parts if part.scene is not None]
        frames = None
        if render and scenes:
            frames = film(draws.look, scenes, foley.shown_at(duration), size)
        track = _takes.tone(draws.sound, np.sum([part.track for part in parts], axis=0))
        if draws.words.uniform() < 0.5:
            text = text[0].upper() + text[1:]
        return Clip(
            frames,
            leveled(draws.level, track),
            text,
            self.classes.index(parts[0].label),
            _apart([scene.events for scene in scenes]),
            index,
            split,
            parts[0].label,
            parts[0].seen,
        )

    def _scene(
        self, draws: _Draws, index: int, split: str, duration: float, class_name: str | None
    ) -> tuple[list[_Part], str]:
        """Make what is seen and heard, and what else may be: the main thing comes first."""
        rng, words = draws.sound, draws.words
        sources = [s for s in _ORDER if self._labels_of(s, split, class_name)]
        if not sources:
            raise InputError(
                f"No recording of {class_name or 'anything that can be seen'} in split {split!r} "
                f"fits a picture. Labels that do are {some(sum(SOUNDS.values(), ()), ', ', 20)}."
            )
        source = sources[index // 2 % len(sources)]
        first = self._seen(draws, source, split, duration, class_name)
        also, parts, text = rng.uniform(), [first], first.text
        struck = source not in _CONTINUOUS
        if also < _SECOND and struck:
            others = [
                other
                for other in dict.fromkeys(_ORDER)
                if other not in (source, "engine", "fan")
                and self._labels_of(other, split, but=first.label)
            ]
            if others:
                other = others[rng.integers(len(others))]
                second = self._seen(draws, other, split, duration, None, first.label)
                quieter = _FAR_BELOW if other in _CONTINUOUS else _BELOW
                parts.append(_below(first, second, rng.uniform(*quieter)))
                text = captions.together(words, text, second.text, split)
        elif also < _SECOND + _OFF_SCREEN:
            order = rng.permutation(len(self.labels(split)))
            labels = (self.labels(split)[i] for i in order)
            label = next((s for s in labels if s != first.label and self._steady(split, s)), None)
            if label is not None:
                second = self._going_on(draws, label, split, duration)
                parts.append(_below(first, second, rng.uniform(*_FAR_BELOW)))
                if words.uniform() < 0.5:
                    text = captions.beside(words, text, second.text, split)
        return parts, text

    def _labels_of(
        self, source: str, split: str, only: str | None = None, but: str | None = None
    ) -> list[str]:
        """Return labels of a source of which a split has what the source needs."""
        has = self._steady if source in _CONTINUOUS else self._strokes
        return [
            label
            for label in SOUNDS[source]
            if only in (None, label) and label != but and has(split, label)
        ]

    def _seen(
        self,
        draws: _Draws,
        source: str,
        split: str,
        duration: float,
        only: str | None = None,
        but: str | None = None,
    ) -> _Part:
        """Make a source's motion and its sound, of peak 1."""
        rng = draws.sound
        labels = self._labels_of(source, split, only, but)
        label = labels[rng.integers(len(labels))]
        if source == "ball":
            known = label in _MATERIALS and draws.world.uniform() < _COLORED
            material = BALLS[_MATERIALS[label]] if known else UNSEEN
            scene = ball(draws.world, duration, material)
        else:
            scene = SOURCES[source](draws.world, duration)
        if source in _CONTINUOUS:
            part = self._going_on(draws, label, split, duration)
            track, heard = np.multiply(part.track, scene.strength), part.text
        else:
            groups = self._strokes(split, label)
            strokes = groups[rng.integers(len(groups))]
            chosen = rng.permutation(len(strokes))[:_TAKES]
            semitones = rng.uniform(-2, 2)
            takes = [_takes.transposed(strokes[i][1], semitones) for i in chosen]
            track = _takes.place(takes, scene.events, scene.strength, round(duration * SAMPLE_RATE))
            heard = phrase(draws.words, strokes[chosen[0]][0], split)
        track /= max(float(np.abs(track).max()), 1e-6)
        return _Part(label, track, captions.scene(draws.words, source, heard, split), scene, source)

    def _going_on(self, draws: _Draws, label: str, split: str, duration: float) -> _Part:
        """Take a piece of a steady recording, of peak 1."""
        recordings = self._steady(split, label)
        recording = recordings[draws.sound.integers(len(recordings))]
        sound = self._shifted(draws.sound, recording, duration)
        track = _takes.lasting(draws.sound, sound, round(duration * SAMPLE_RATE))
        track = track / max(float(np.abs(track).max()), 1e-6)
        # From silence on: what begins with the clip would be an onset that the picture lacks.
        fade = min(_SWELL, len(track) // 4)
        track[:fade] *= np.linspace(0, 1, fade, dtype=np.float32) ** 2
        return _Part(label, track, phrase(draws.words, recording, split))

    def _text_alone(
        self, draws: _Draws, kind: str, split: str, duration: float, class_name: str | None
    ) -> tuple[list[_Part], str]:
        """Make one sound or two: the louder or the first comes first."""
        rng, words, samples = draws.sound, draws.words, round(duration * SAMPLE_RATE)
        first, sound = self._any(draws, split, duration, class_name)
        if kind == "single":
            track = _takes.spread(rng, sound, samples)
            return [_Part(first.label, track, "")], caption(words, first, split)
        second, other = self._any(draws, split, duration, None, first.label)
        texts = phrase(words, first, split), phrase(words, second, split)
        if kind == "sequence":
            cut = round(rng.uniform(0.35, 0.65) * samples)
            spans, quieter = ((0, cut), (cut, samples)), rng.uniform(-6, 6)
            text = captions.then(words, texts[0], texts[1], split)
        else:
            spans, quieter = ((0, samples), (0, samples)), rng.uniform(0, 12)
            earlier = rng.integers(2)
            text = captions.together(words, texts[earlier], texts[1 - earlier], split)
        parts: list[_Part] = []
        given = ((first, sound, spans[0], 0.0), (second, other, spans[1], quieter))
        for recording, heard, (begin, end), down in given:
            track = np.zeros(samples, np.float32)
            track[begin:end] = _takes.spread(rng, heard, end - begin)
            part = _Part(recording.label, track, "")
            parts.append(_below(parts[0], part, down) if parts else part)
        return parts, text

    def _any(
        self, draws: _Draws, split: str, duration: float, only: str | None, but: str | None = None
    ) -> tuple[Recording, Array]:
        """Draw a recording of a label, rare labels more often than they occur, and vary it."""
        rng = draws.sound
        labels = [label for label in self.labels(split) if only in (None, label) and label != but]
        if not labels:
            raise InputError(f"Split {split!r} has no recording of {only!r}. Give another class.")
        counts = [sum(map(len, self._groups[split][label])) for label in labels]
        weights = np.sqrt(counts)
        label = labels[rng.choice(len(labels), p=weights / weights.sum())]
        groups = self._groups[split][label]
        group = groups[rng.integers(len(groups))]
        recording = group[rng.integers(len(group))]
        return recording, self._shifted(rng, recording, duration)

    def _shifted(self, rng: np.random.Generator, recording: Recording, duration: float) -> Array:
        """Return a recording, or as much as a clip may need of it, up to two semitones off."""
        sound = self.recordings.sound(recording)
        most = round(1.2 * duration * SAMPLE_RATE)
        start = rng.integers(max(1, len(sound) - most + 1))
        return _takes.shifted(sound[start : start + most], rng.uniform(-2, 2))[0]

    def _strokes(self, split: str, label: str) -> list[list[tuple[Recording, _takes.Take]]]:
        """Return the single strokes in the recordings of a label, those of a group together."""
        if (split, label) not in self._found:
            groups = self._groups[split].get(label, [])
            found = [
                [
                    (row, take)
                    for row in group
                    for take in _takes.find_takes(self.recordings.sound(row))
                ]
                for group in groups
            ]
            self._found[split, label] = [strokes for strokes in found if strokes]
        return self._found[split, label]

    def _steady(self, split: str, label: str) -> list[Recording]:
        """Return the recordings of a label that go on and on."""
        if (split, label) not in self._lasting:
            self._lasting[split, label] = [
                row
                for group in self._groups[split].get(label, [])
                for row in group
                if _takes.is_steady(self.recordings.sound(row))
            ]
        return self._lasting[split, label]


def _below(first: _Part, second: _Part, decibels: float) -> _Part:
    """Return the second part, so much less loud than the first."""
    ratio = _takes.loudness(first.track) / _takes.loudness(second.track)
    return second._replace(track=second.track * np.float32(ratio * 10 ** (-decibels / 20)))


def _apart(events: Sequence[Array]) -> NDArray[np.float32]:
    """Return all events in order, without those that come too soon after another to be told."""
    kept: list[float] = []
    for time in sorted(float(t) for times in events for t in times):
        if not kept or time - kept[-1] >= _APART:
            kept.append(time)
    return np.array(kept, np.float32)
