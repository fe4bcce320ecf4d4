"""What is said of prompts that the text encoder does not understand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mfmjt.data._captions import CLASSES, PACES, caption
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import MfmjtError
from mfmjt.families import PRETRAINED
from mfmjt.pipeline import Pipeline, Request, generate_together
from tests.support.bundles import write_model


@pytest.fixture(scope="module")
def encoders() -> NanoEncoders:
    """Those that ship."""
    return NanoEncoders.load(PRETRAINED / "nano" / "encoders.safetensors")


def test_all_captions_are_understood(encoders: NanoEncoders) -> None:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for pace in PACES:
            for split in ("train", "test"):
                text = caption(rng, name, pace, split)
                assert encoders.prompt_notes(text) == (), text


SOME = (
    "The text encoder was not trained on these words of the prompt: {}. What is heard depends on "
)
NONE = "The text encoder was trained on none of the prompt's words: {}. What is heard does not "


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [
        ("A dog, barking at the bell; a DOG!", SOME.format("'dog', 'barking'")),
        ("Thunderstorm", NONE.format("'thunderstorm'")),
        ("колокол звонит", NONE.format("'колокол', 'звонит'")),
        ("🔔 🔔", NONE.format("'🔔'")),
        (" ".join("vwxyzjq"), NONE.format("'v', 'w', 'x', 'y', 'z' and 2 more")),
        ("bell \ud800", SOME.format("'\\ud800'")),
    ],
)
def test_words_that_training_had_not_are_named(
    encoders: NanoEncoders, prompt: str, begin: str
) -> None:
    (note,) = encoders.prompt_notes(prompt)
    assert note.startswith(begin)
    assert "\n" not in note


@pytest.mark.parametrize("prompt", [None, "", "BELL", "...", "a bell: a bell, close-up!"])
def test_what_is_understood_has_no_note(encoders: NanoEncoders, prompt: str | None) -> None:
    assert encoders.prompt_notes(prompt) == ()


def test_what_is_cut_off_is_said_first(encoders: NanoEncoders) -> None:
    cut, unknown = encoders.prompt_notes("bell " * 30 + "dog cat")
    assert cut == "The prompt is too long: its end, from 'cat' on, is not read."
    assert "'dog'" in unknown
    assert "'cat'" not in unknown


def test_the_vocabulary_stays_with_the_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    loaded = NanoEncoders.load(folder / "encoders.safetensors")
    assert loaded.prompt_notes("a dog") == ()  # nothing is known of what it knows
    loaded.vocabulary = frozenset({"a", "cat", "größe"})
    loaded.save(folder / "encoders.safetensors")
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    (note,) = pipe(prompt="a dog", duration=0.32).notes  # type: ignore[union-attr]
    assert "words of the prompt: 'dog'. " in note
    assert pipe(prompt="a cat", duration=0.32).notes == ()  # type: ignore[union-attr]
    made = generate_together(pipe, [Request(prompt="groß", duration=0.32), Request(prompt="größe")])
    assert not any(isinstance(one, MfmjtError) for one in made)
    assert [len(one[0].notes) for one in made if isinstance(one, list)] == [1, 0]
