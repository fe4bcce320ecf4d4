from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mfmjt.data import _captions, manifest
from mfmjt.data.recordings import Recording
from mfmjt.data.wordings import (
    FRAMES,
    FUNCTION_WORDS,
    HELD_FRAMES,
    caption,
    phrase,
    unseen_words,
    wordings,
    words,
)

SHIPPED = manifest.read_manifest(manifest.shipped())
TRAINING = [text for wording in wordings().values() for text in wording.training]
SHOWN = words(*_captions.words(), *FRAMES, *TRAINING, *(line.caption for line in SHIPPED))


def recording(label: str, text: str = "a hound of the moors") -> Recording:
    return Recording("a", 0, 16_000, "train", label, text, "set", "CC0", "someone")


def test_every_label_has_recordings_and_several_phrases() -> None:
    assert set(wordings()) == {line.label for line in SHIPPED}
    assert list(wordings()) == sorted(wordings())
    for label, wording in wordings().items():
        assert 4 <= len(wording.training) <= 8, label
        assert len(wording.test) == 2, label
    assert max(Counter(TRAINING).values()) == 1


def test_phrases_of_the_test_split_are_new_and_their_words_are_not() -> None:
    known = {*TRAINING, *(line.caption for line in SHIPPED)}
    for label, wording in wordings().items():
        assert not known & set(wording.test), label
        assert words(*wording.test) <= SHOWN | FUNCTION_WORDS, label
    assert words(*HELD_FRAMES) <= SHOWN | FUNCTION_WORDS | {"what"}


def test_unseen_words_are_in_no_caption_of_training() -> None:
    assert not unseen_words() & SHOWN
    assert not unseen_words() & words(*(text for w in wordings().values() for text in w.test))
    for wording in wordings().values():
        for text in wording.unseen:
            assert words(text) - FUNCTION_WORDS, text
    assert {"hound", "cockerel", "infant", "downpour", "surf", "chopper"} <= unseen_words()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_caption_is_a_phrase_in_a_sentence_of_its_split(split: str) -> None:
    wording = wordings()["dog"]
    phrases = wording.test if split == "test" else ("a hound of the moors", *wording.training)
    frames = HELD_FRAMES if split == "test" else FRAMES
    rng = np.random.default_rng(0)
    drawn = {caption(rng, recording("dog"), split) for _ in range(500)}
    assert drawn == {frame.format(text) for frame in frames for text in phrases}


def test_the_seed_decides_and_half_of_all_phrases_are_the_recordings_own() -> None:
    first, second = (
        [phrase(rng, recording("rain"), "train") for _ in range(400)]
        for rng in (np.random.default_rng(1), np.random.default_rng(1))
    )
    assert first == second
    # Binomial(400, 1/2): five standard deviations are 50.
    assert abs(first.count("a hound of the moors") - 200) <= 50


def test_a_label_without_wordings_has_its_caption_only() -> None:
    rng = np.random.default_rng(0)
    assert phrase(rng, recording("laser", "a laser"), "test") == "a laser"
