"""Wording of recordings: a label and several phrases for each sound, some kept back for tests.

`wordings.csv` has a line for each label, written by hand. Phrases of the test split join words that
training knows to what it never shows. Unseen phrases name the sound by words that no caption in
training has: "a hound" for a dog.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from mfmjt.data.recordings import Recording

__all__ = ["FUNCTION_WORDS", "Wording", "caption", "phrase", "unseen_words", "wordings", "words"]

FRAMES = ("{}", "{}", "{}", "the sound of {}", "a recording of {}", "we hear {}", "you can hear {}")
HELD_FRAMES = ("{}", "what you can hear is {}", "a recording of the sound of {}")
"""Sentences around phrases: of training, and of the test split."""


@dataclass(frozen=True)
class Wording:
    """The phrases of one label.

    Attributes:
        training: For training and validation.
        test: Kept back; their words are in other phrases.
        unseen: Kept back; their words are in no caption of training. May be empty.
    """

    training: tuple[str, ...]
    test: tuple[str, ...]
    unseen: tuple[str, ...]


@cache
def wordings() -> dict[str, Wording]:
    """Return the phrases of each label, labels in alphabetical order."""
    with (resources.files("mfmjt.data") / "wordings.csv").open(encoding="utf-8") as file:
        return {
            line["label"]: Wording(*(_phrases(line[use]) for use in ("training", "test", "unseen")))
            for line in csv.DictReader(file)
        }


def phrase(rng: np.random.Generator, recording: Recording, split: str) -> str:
    """Return what sounds, as "a dog barking": half the time in the recording's own words.

    Args:
        rng: Where the choice comes from.
        recording: What is described. Where its label has no wordings, its caption is all there is.
        split: Test phrases are none that training shows.
    """
    wording = wordings().get(recording.label)
    if wording is None:
        return recording.caption
    if split == "test":
        return str(rng.choice(wording.test))
    if rng.uniform() < 0.5:
        return recording.caption
    return str(rng.choice(wording.training))


def caption(rng: np.random.Generator, recording: Recording, split: str) -> str:
    """Return a caption of a recording: a phrase in a sentence; arguments as for `phrase`."""
    frame = rng.choice(HELD_FRAMES if split == "test" else FRAMES)
    return str(frame).format(phrase(rng, recording, split))


def words(*texts: str) -> frozenset[str]:
    """Return the words of texts, in lower case."""
    return frozenset(re.findall(r"\w+", " ".join(texts).lower()))


FUNCTION_WORDS = words(
    "a an and at by for from in into is it its of on one or someone something that the to who with"
)
"""Words that say nothing about what sounds; unseen phrases may share them with training."""


def unseen_words() -> frozenset[str]:
    """Return the words that no caption of training may have, whoever writes it."""
    phrases = [text for wording in wordings().values() for text in wording.unseen]
    return words(*phrases) - FUNCTION_WORDS


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())
