"""Six requests sound as they always did, to the last bit, whatever is rebuilt around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfmjt.media import read_video
from mfmjt.pipeline import Audio, Pipeline, Request, generate_together
from tests.support.clips import moving, write_video
from tests.support.digests import Digests
from tests.support.published import SIZES

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def nano() -> Pipeline:
    return Pipeline.from_pretrained("nano", device="cpu")


def waves(made: object) -> torch.Tensor:
    sounds = made if isinstance(made, list) else [made]
    assert all(isinstance(sound, Audio) for sound in sounds)
    return torch.cat([sound.waveform for sound in sounds])


def test_a_video(nano: Pipeline, digests: Digests) -> None:
    digests.check("video", waves(nano(EXAMPLES / "ball_wood.mp4")))


def test_a_text(nano: Pipeline, digests: Digests) -> None:
    digests.check("text", waves(nano(prompt="rain", steps=2, seed=3)))


def test_both(nano: Pipeline, digests: Digests) -> None:
    made = nano(EXAMPLES / "bell.mp4", "a bell rings", guidance=2.0, mode="cfg", count=2)
    digests.check("both", waves(made))


def test_three_windows(nano: Pipeline, digests: Digests, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "a.mp4", frames=220, rate=10, size=(48, 80), picture=moving)
    digests.check("three windows", waves(nano(clip, "footsteps", seed=5)))


def test_a_batch_of_four(nano: Pipeline, digests: Digests) -> None:
    video = read_video(EXAMPLES / "footsteps.mp4")
    requests = [
        Request(video, "steps"),
        Request(video, "a ball", seed=4),
        Request(video, seed=9, modes=("cfg", "none")),
    ]
    made = [sound for sounds in generate_together(nano, requests) for sound in sounds]
    digests.check("batch of four", waves(made))


def test_mmaudio(folder: Path, digests: Digests) -> None:
    pipe = Pipeline.from_mmaudio(folder, device="cpu", check="name", **SIZES)
    digests.check("MMAudio", waves(pipe(EXAMPLES / "ball_wood.mp4", "a ball", steps=4)))
