"""The model that ships, on the clips that ship: sound comes when something is hit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfmjt.data import foley
from mfmjt.evaluate.onsets import detect_onsets, onset_f1
from mfmjt.pipeline import Audio, Pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCES = ("ball_wood", "bell", "footsteps")
BAR = 0.75  # onset F1 at 50 ms that the model was trained to reach on held-out clips


@pytest.fixture(scope="module")
def onsets() -> dict[str, list[float]]:
    pipe = Pipeline.from_pretrained("nano", device="cpu")
    found = {}
    for source in SOURCES:
        audio = pipe(EXAMPLES / f"{source}.mp4")
        assert isinstance(audio, Audio)
        assert audio.duration == foley.DURATION
        found[source] = list(detect_onsets(audio.waveform[0], audio.sample_rate))
    return found


def events(source: str) -> list[float]:
    """When things are hit in the clip that examples/make_clips.py draws."""
    clip = foley.clip(foley.CLASSES.index(source), "test", render=False)
    return [float(time) for time in clip.events]


def test_one_step_is_in_time_with_the_picture(onsets: dict[str, list[float]]) -> None:
    score = onset_f1([events(s) for s in SOURCES], [onsets[s] for s in SOURCES])
    assert score.f1 >= BAR


def test_the_sound_of_another_clip_is_not(onsets: dict[str, list[float]]) -> None:
    others = (*SOURCES[1:], SOURCES[0])
    score = onset_f1([events(s) for s in SOURCES], [onsets[s] for s in others])
    assert score.f1 < BAR / 2
