from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mfmjt.media import read_video
from mfmjt.pipeline import Audio, Pipeline, Request, generate_together
from tests.support.clips import write_video


@pytest.fixture(scope="module")
def pipes(model_folder: Path) -> tuple[Pipeline, Pipeline]:
    return tuple(
        Pipeline.from_pretrained(model_folder, device="cpu", compile=compile)
        for compile in (False, True)
    )


def waves(made: Audio | list[Audio]) -> torch.Tensor:
    return torch.cat([audio.waveform for audio in (made if isinstance(made, list) else [made])])


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "a bell", "duration": 1.0},
        {"prompt": "a bell", "duration": 1.0, "count": 3, "seed": 4},
        {"prompt": "a bell", "duration": 1.0, "guidance": 4.0, "mode": "cfg"},
        {"prompt": "a bell", "duration": 1.0, "mode": "none"},
        {"prompt": "a bell", "duration": 1.0, "steps": 3},
    ],
    ids=["one", "three", "cfg", "none", "steps"],
)
def test_compiled_sounds_the_same(pipes: tuple[Pipeline, Pipeline], given: dict[str, Any]) -> None:
    plain, compiled = (waves(pipe(**given)) for pipe in pipes)
    torch.testing.assert_close(compiled, plain)


def test_compiled_sounds_the_same_with_a_video(
    pipes: tuple[Pipeline, Pipeline], tmp_path: Path
) -> None:
    for frames in (30, 45, 30):
        video = write_video(tmp_path / f"{frames}.mp4", frames=frames)
        plain, compiled = (waves(pipe(video, "a bell", count=2)) for pipe in pipes)
        torch.testing.assert_close(compiled, plain)


def test_several_requests_at_once_sound_the_same(
    pipes: tuple[Pipeline, Pipeline], tmp_path: Path
) -> None:
    video = read_video(write_video(tmp_path / "clip.mp4", frames=30))
    requests = [
        Request(prompt="a bell", duration=1.2),
        Request(video, "a bell", modes=("cfg", "cfg_scaled")),
        Request(video, seed=3, count=2),
        Request(prompt="rain", duration=1.2, steps=2),
    ]
    plain, compiled = (generate_together(pipe, requests) for pipe in pipes)
    assert [len(made) for made in compiled if isinstance(made, list)] == [1, 2, 2, 1]
    for some, others in zip(plain, compiled, strict=True):
        assert isinstance(some, list)
        assert isinstance(others, list)
        torch.testing.assert_close(waves(others), waves(some))


def test_progress_ends_and_stages_are_timed(pipes: tuple[Pipeline, Pipeline]) -> None:
    seen: list[tuple[str, float]] = []
    made = pipes[1](prompt="a bell", duration=1.0, progress=lambda *at: seen.append(at))
    assert isinstance(made, Audio)
    assert ("generate", 1.0) in seen
    assert seen[-1] == ("decode", 1.0)
    assert made.timings["generate"] > 0
